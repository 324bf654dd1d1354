"""The same model and data masked by NeuroSurgeon's ContSparse layers and by ours: what they compute agrees within dtype
rounding, and discovery from one seed finds the same mask. Run with -s to see the figures."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from subnets import DiscoveryConfig, discover, mask_model
from subnets.masking import MaskSet
from torch import Tensor, nn

pytest.importorskip("NeuroSurgeon", reason="NeuroSurgeon is not installed")
from NeuroSurgeon.Masking.contsparse_layer import (
    ContSparseConv2d,
    ContSparseGPTConv1D,
    ContSparseLinear,
)
from transformers.pytorch_utils import Conv1D

BETA = 3.0
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


class SmallGPT(nn.Module):
    """Conv1D layers around a nonlinearity, as in GPT-2's MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.head = Conv1D(64, 32), Conv1D(32, 64), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c_proj(F.gelu(self.c_fc(x.flatten(1, -2)))).mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 10)), (32, 20)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(128, 10)),
        (32, 3, 8, 8),
    ),
    "conv1d": (SmallGPT, (32, 6, 32)),
}
each_model = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    new, shape = MODELS[name]
    model, x = new(), torch.randn(shape)
    if name == "conv1d":
        with torch.no_grad():
            model.c_fc.weight.mul_(10), model.c_proj.weight.mul_(10)
    return model, x, torch.randint(10, (32,))


def masked_by_theirs(model: nn.Module, score_init: float) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A copy of ``model`` with their layers, everything but the scores frozen, and the layers by weight name."""
    twins = {nn.Linear: ContSparseLinear, nn.Conv2d: ContSparseConv2d, Conv1D: ContSparseGPTConv1D}
    model = copy.deepcopy(model).requires_grad_(False)
    layers = {}
    for name, module in list(model.named_modules()):
        if type(module) in twins:
            twin = twins[type(module)].from_layer(module, mask_unit="weight", mask_init_value=score_init)
            twin.weight.requires_grad_(False)
            twin.bias.requires_grad_(False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, twin)
            layers[f"{name}.weight"] = twin
    return model, layers


def set_theirs(layers: dict[str, nn.Module], temperature: float, is_soft: bool = True) -> None:
    for layer in layers.values():
        layer.temperature = temperature
        layer.train(is_soft)


def l0_of(layers: dict[str, nn.Module]) -> Tensor:
    return torch.stack([layer.calculate_l0() for layer in layers.values()]).sum()


def both(name: str) -> tuple[nn.Module, MaskSet, nn.Module, dict[str, nn.Module], Tensor, Tensor]:
    """Our and their masked model with the same random scores."""
    model, x, y = made(name)
    theirs, layers = masked_by_theirs(model, -0.1)
    masks = mask_model(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight_name, layer in masks.layers.items():
            layer.scores.copy_(torch.randn(layer.scores.shape, generator=generator))
            layers[weight_name].weight_mask_params.copy_(layer.scores)
    masks.beta = BETA
    set_theirs(layers, BETA)
    return model, masks, theirs, layers, x, y


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16 autocast"])
def test_soft_output_l0_and_gradients_agree_within_rounding(name, dtype):
    ours, masks, theirs, layers, x, y = both(name)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with masks.collect_penalty() as penalty:
            our_out = ours(x)
        their_out = theirs(x)
    our_l0, their_l0 = penalty(), l0_of(layers)
    for out, l0 in ((our_out, our_l0), (their_out, their_l0)):
        (F.cross_entropy(out.float(), y) + 1e-3 * l0).backward()
    gradients = max(relative(layer.scores.grad, layers[n].weight_mask_params.grad) for n, layer in masks.layers.items())
    figures = {
        "output": relative(our_out, their_out), "l0": relative(our_l0, their_l0), "gradients of scores": gradients
    }
    u = UNIT_ROUNDOFF[dtype]
    print(f"\n{name} {dtype} soft: largest difference over largest value", {k: f"{v:.1e}" for k, v in figures.items()})
    assert our_out.dtype == their_out.dtype == dtype
    assert figures["output"] <= 8 * u and figures["gradients of scores"] <= 16 * u
    assert figures["l0"] <= 8 * UNIT_ROUNDOFF[torch.float32]


@each_model
def test_hard_output_and_l0_are_the_same_to_the_bit(name):
    ours, masks, theirs, layers, x, _ = both(name)
    set_theirs(layers, BETA, is_soft=False)
    with masks.hard(), torch.no_grad():
        our_out, their_out = ours(x), theirs(x)
        with torch.enable_grad(), masks.collect_penalty() as penalty:
            ours(x)
        our_l0, their_l0 = penalty(), l0_of(layers)
    print(f"\n{name} hard: output differs by {(our_out - their_out).abs().max():.0e}, l0 {our_l0:.0f}, {their_l0:.0f}")
    assert torch.equal(our_out, their_out)
    assert our_l0.item() == their_l0.item() > 0


def discovered_by_theirs(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], config: DiscoveryConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(masks, scores) of their layers by plain PyTorch: AdamW on the task loss + lam * their L0."""
    theirs, layers = masked_by_theirs(model, config.score_init)
    theirs_scores = {name: layer.weight_mask_params for name, layer in layers.items()}
    optimizer = torch.optim.AdamW(theirs_scores.values(), lr=config.lr, weight_decay=config.weight_decay)
    for epoch in range(config.epochs):
        set_theirs(layers, config.beta_end ** (epoch / config.epochs))
        for x, y in batches:
            loss = F.cross_entropy(theirs(x), y) + config.lam * l0_of(layers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    scores = {name: s.detach() for name, s in theirs_scores.items()}
    return {name: s > 0 for name, s in scores.items()}, scores


@each_model
def test_200_steps_of_discovery_from_one_seed_find_the_same_mask(name):
    model, _, _ = made(name)
    generator = torch.Generator().manual_seed(2)
    shape = MODELS[name][1]
    teacher = copy.deepcopy(model)
    batches = []
    for _ in range(20):
        x = torch.randn(shape, generator=generator)
        batches.append((x, teacher(x).argmax(1)))
    config = DiscoveryConfig(epochs=10, lr=0.02, lam=1e-5)
    masks, scores = discovered_by_theirs(model, batches, config)
    kept: dict[str, Tensor] = {}

    def keep_scores(row: dict, mask_set: MaskSet) -> None:
        kept.update({name: layer.scores.detach().clone() for name, layer in mask_set.layers.items()})

    def task_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    found = discover(model, batches, task_loss, config, callbacks=[keep_scores])
    differing = sum(int((found.subnet.masks[n] != mask).sum()) for n, mask in masks.items())
    total = sum(mask.numel() for mask in masks.values())
    drift = max(relative(kept[n], s) for n, s in scores.items())
    nearest = min(s.abs().min().item() for s in scores.values())
    print(
        f"\n{name}: {found.history[-1]['step']} steps, density {found.subnet.density():.4f} of {total} weights, "
        f"{differing} differ, scores differ by {drift:.1e} of the largest, the score nearest to 0 is {nearest:.1e}"
    )
    assert found.history[-1]["step"] == 200 and 0.05 < found.subnet.density() < 0.95
    assert differing == 0
