"""ResNet-18 in plain PyTorch, for the benchmark of whole models."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is 1x1 where the shape changes."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or num_in != num_out:
            self.shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for images [B, 3, H, W] (He et al., CVPR 2016)."""

    def __init__(self, width: int = 64, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages, num_in = [], width
        for i in range(4):
            num_out = width << i
            stages += [BasicBlock(num_in, num_out, 1 if i == 0 else 2), BasicBlock(num_out, num_out, 1)]
            num_in = num_out
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(num_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # 1.4: what the masks take from a layer's variance
                fan_out = module.out_channels * module.kernel_size[0] ** 2
                nn.init.normal_(module.weight, std=1.4 * (2 / fan_out) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(self.stages(x).mean((2, 3)))
