"""Style noise: random convolutions that change an image's texture and colours and keep its outlines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_KERNEL_SIZES = (1, 3, 5, 7)


def style_noise(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """fp32 images in [0, 255], each with ``probability`` mixed with a random convolution of itself.

    ``a * x + (1 - a) * conv(x, K)`` with a uniform in [0, 1] and K ~ N(0, 1/(3 k^2)), k one of 1, 3, 5, 7 for the whole
    batch; every image has a kernel and an a of its own. Colours are centred meanwhile, so that brightness stays.

    Args:
        images: uint8 or floating point [B, 3, H, W].
        probability: of being changed.
        generator: on the CPU; draws everything.

    Source: RandConv with mixing (Xu et al., "Robust and Generalizable Visual Representation Learning via Random
    Convolutions", ICLR 2021), here as the augmentation baseline that the paper's code lacks.
    """
    x = images.float() / 127.5 - 1
    count = len(x)
    k = _KERNEL_SIZES[int(torch.randint(len(_KERNEL_SIZES), (), generator=generator))]
    kernels = torch.randn(count * 3, 3, k, k, generator=generator) / (3 * k * k) ** 0.5
    mix = torch.rand(count, 1, 1, 1, generator=generator)
    is_changed = torch.rand(count, 1, 1, 1, generator=generator) < probability
    padded = F.pad(x.flatten(0, 1)[None], (k // 2,) * 4, mode="replicate")
    styled = F.conv2d(padded, kernels.to(x.device), groups=count).unflatten(1, (count, 3))[0]
    share = torch.where(is_changed, mix, 1.0).to(x.device)
    return (torch.lerp(styled, x, share).clamp(-1, 1) + 1) * 127.5
