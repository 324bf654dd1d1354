"""The same model and data masked by NeuroSurgeon's ContSparse layers and by ours: what they compute agrees within dtype
rounding, and discovery from one seed finds the same mask. Run with -s to see the figures."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from subnets import DiscoveryConfig, Subnet, discover, mask_model
from subnets.masking import MaskSet
from torch import Tensor, nn

pytest.importorskip("NeuroSurgeon", reason="NeuroSurgeon is not installed")
from NeuroSurgeon.Masking.contsparse_layer import (
    ContSparseConv2d,
    ContSparseGPTConv1D,
    ContSparseLinear,
)
from NeuroSurgeon.Masking.magprune_layer import MagPruneLinear
from NeuroSurgeon.Models import CircuitConfig, CircuitModel
from transformers import GPT2Config, GPT2LMHeadModel
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


# --- what docs/neurosurgeon.md says ----------------------------------------------------------------------------------

LAYERS = ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"]
EPOCHS, STEPS, LAM, LR, BETA_END = 3, 4, 1e-5, 0.02, 64.0  # beta 1, 4, 16: ours is fp32, theirs a float


def circuit_config(**hparams: object) -> CircuitConfig:
    """Theirs, with a mask per weight, over LAYERS. They round the initial score to fp32, so it is one that fp32 has."""
    settings = {"ablation": "none", "mask_unit": "weight", "mask_bias": False, "mask_init_value": -0.125}
    return CircuitConfig(mask_hparams={**settings, **hparams}, target_layers=LAYERS, l0_lambda=LAM)


def small_gpt2(dtype: torch.dtype) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=17, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).to(dtype)
    with torch.no_grad():
        for layer in LAYERS:
            model.get_submodule(layer).weight.mul_(10)
    return model, [torch.randint(17, (3, 8)) for _ in range(EPOCHS * STEPS)]


def scores_of_theirs(dtype: torch.dtype) -> dict[str, Tensor]:
    """Their scores after EPOCHS of STEPS steps, used as their documentation shows: temperature once per epoch."""
    model, batches = small_gpt2(dtype)
    circuit = CircuitModel(circuit_config(), model).to(dtype)
    optimizer = torch.optim.AdamW(circuit.parameters(), lr=LR)
    for step, ids in enumerate(batches):
        if step and step % STEPS == 0:
            circuit.temperature = circuit.temperature * BETA_END ** (1 / EPOCHS)
        loss = circuit(input_ids=ids, labels=ids).loss  # their penalty is in it
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {f"{name}.weight": model.get_submodule(name).weight_mask_params.detach() for name in LAYERS}


def scores_of_ours(dtype: torch.dtype, way: str) -> dict[str, Tensor]:
    model, batches = small_gpt2(dtype)
    model.eval()  # theirs keeps dropout off in training too
    if way == "discover":
        kept: dict[str, Tensor] = {}

        def keep(row: dict, masks: MaskSet) -> None:
            kept.update({name: layer.scores.detach().clone() for name, layer in masks.layers.items()})

        config = DiscoveryConfig(
            epochs=EPOCHS, steps_per_epoch=STEPS, lr=LR, lam=LAM, beta_end=BETA_END, targets=LAYERS, score_init=-0.125
        )
        discover(
            model, lambda epoch: iter(batches[epoch * STEPS : (epoch + 1) * STEPS]),
            lambda model, ids: model(input_ids=ids, labels=ids).loss, config,
            callbacks=[keep],
        )  # fmt: skip
        return kept
    masks = mask_model(model, LAYERS, score_init=-0.125)
    masks.anneal(to=BETA_END, steps=EPOCHS * STEPS, every=STEPS)
    in_loss = way == "penalty in the loss"
    optimizer = torch.optim.AdamW(masks.scores().values(), lr=LR) if in_loss else masks.adamw(lr=LR, lam=LAM)
    for ids in batches:
        with masks.collect_penalty() if in_loss else contextlib.nullcontext() as penalty:
            loss = model(input_ids=ids, labels=ids).loss
        (loss + LAM * penalty() if penalty else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if in_loss:
            masks.step()
    return {name: layer.scores.detach() for name, layer in masks.layers.items()}


@pytest.mark.parametrize("way", ["penalty in the optimizer", "penalty in the loss", "discover"])
def test_training_as_their_documentation_shows_gives_our_scores_within_rounding(way):
    truth = scores_of_theirs(torch.float64)
    exact = max(relative(s, truth[name]) for name, s in scores_of_ours(torch.float64, way).items())
    theirs = max(relative(s, truth[name]) for name, s in scores_of_theirs(torch.float32).items())
    ours = max(relative(s, truth[name]) for name, s in scores_of_ours(torch.float32, way).items())
    print(f"\n{way}: scores differ by {exact:.1e} in fp64; from fp64 in fp32: theirs {theirs:.1e}, ours {ours:.1e}")
    assert exact < 1e-11
    assert ours <= 2 * theirs + 4 * UNIT_ROUNDOFF[torch.float32]
    assert all(0.01 < float((s > 0).double().mean()) < 0.99 for s in truth.values())


@pytest.mark.parametrize("divisor", [1, 2])
def test_what_scales_the_loss_scales_their_penalty_and_not_ours(divisor):
    """Two micro-batches: with undivided losses their lambda counts twice, with halved ones once; ours always once."""
    model, (ids, *_) = small_gpt2(torch.float64)
    circuit = CircuitModel(circuit_config(), model).double()
    for _ in range(2):
        (circuit(input_ids=ids, labels=ids).loss / divisor).backward()
    theirs = model.get_submodule(LAYERS[1]).weight_mask_params.grad
    model, (ids, *_) = small_gpt2(torch.float64)
    masks = mask_model(model.eval(), LAYERS, score_init=-0.125)
    for _ in range(2):
        (model(input_ids=ids, labels=ids).loss / divisor).backward()
    scores = masks.layers[f"{LAYERS[1]}.weight"].scores
    slope = torch.sigmoid(scores) * torch.sigmoid(-scores)
    assert relative(scores.grad + 2 / divisor * LAM * slope, theirs) < 1e-12
    masks.adamw(lr=LR, lam=LAM).step()  # for fp64 scores it adds its penalty to .grad
    assert relative(scores.grad + (2 / divisor - 1) * LAM * slope.detach(), theirs) < 1e-12


def test_freezing_theirs_leaves_what_is_not_called_weight_or_bias():
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls_token, self.fc = nn.Parameter(torch.zeros(1, 4)), nn.Linear(4, 4)

    config = circuit_config()
    config.target_layers = ["fc"]
    trained = [name for name, p in CircuitModel(config, Patches()).named_parameters() if p.requires_grad]
    assert trained == ["wrapped_model.cls_token", "wrapped_model.fc.weight_mask_params"]
    model = Patches()
    mask_model(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["fc.scores"]


def test_making_theirs_draws_random_numbers_and_making_ours_does_not():
    linear, state = nn.Linear(3, 3), torch.get_rng_state()
    ContSparseLinear.from_layer(linear)
    assert not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    mask_model(linear)
    assert torch.equal(torch.get_rng_state(), state)


def test_their_samples_remove_as_many_weights_as_the_subnet_has():
    linear = nn.Linear(30, 20)
    theirs = ContSparseLinear.from_layer(linear)
    with torch.no_grad():
        theirs.weight_mask_params.uniform_(-0.9, 0.1)
    theirs.train(False)
    kept = int((theirs.weight_mask_params > 0).sum())
    for ablation in ("randomly_sampled", "complement_sampled"):
        theirs.ablation, theirs.force_resample = ablation, True
        assert int(theirs._compute_mask("weight_mask_params").sum()) == 600 - kept
    subnet = Subnet({"weight": theirs.weight_mask_params > 0})
    for control in (subnet.sample_like, subnet.complement_sample):
        with control(torch.Generator().manual_seed(0)).applied(linear, "ablate"):
            assert int((linear.weight != 0).sum()) == 600 - kept


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv"])
def test_their_neurons_are_our_units_with_the_same_penalty(kind):
    base: nn.Module = {"linear": nn.Linear(6, 4), "conv1d": Conv1D(4, 6), "conv": nn.Conv2d(6, 4, 3)}[kind]
    twin = {"linear": ContSparseLinear, "conv1d": ContSparseGPTConv1D, "conv": ContSparseConv2d}[kind]
    theirs = twin.from_layer(base, mask_unit="neuron", mask_init_value=-0.125)
    masks = mask_model(nn.Sequential(base), score_init=-0.125, unit=(1, 6, 1, 1) if kind == "conv" else "row")
    (layer,) = masks.layers.values()
    assert layer.scores.shape == theirs.weight_mask_params.shape
    with masks.collect_penalty() as penalty:
        pass
    assert relative(penalty(), theirs.calculate_l0()) <= 8 * UNIT_ROUNDOFF[torch.float32]


def test_their_magnitude_pruning_takes_the_largest_values_and_not_the_largest_sizes():
    linear = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[-4.0, -1.0, 1.0, 2.0]]))
    theirs = MagPruneLinear.from_layer(linear, prune_percentage=0.5)
    assert theirs._compute_mask("weight_mask_params").tolist() == [[0.0, 0.0, 1.0, 1.0]]
    by_size = linear.weight.abs() >= linear.weight.abs().quantile(0.5)
    assert by_size.tolist() == [[True, False, False, True]]


def test_their_masked_biases_are_biases_named_as_targets():
    model, (ids, *_) = small_gpt2(torch.float32)
    circuit = CircuitModel(circuit_config(mask_bias=True), copy.deepcopy(model))
    masks = mask_model(model.eval(), [*LAYERS, *(f"{name}.bias" for name in LAYERS)], score_init=-0.125)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in LAYERS:
            theirs = circuit.wrapped_model.get_submodule(name)
            for kind in ("weight", "bias"):
                model.get_submodule(name).bias.uniform_(-1, 1, generator=generator)
                theirs.bias.copy_(masks.layers[f"{name}.bias"].weight)
                scores = masks.layers[f"{name}.{kind}"].scores
                scores.normal_(generator=generator)
                getattr(theirs, f"{kind}_mask_params").copy_(scores)
    with masks.collect_penalty() as penalty:
        ours = model(input_ids=ids).logits
    assert relative(ours, circuit(input_ids=ids).logits) <= 8 * UNIT_ROUNDOFF[torch.float32]
    assert relative(penalty(), circuit._compute_l0_loss()) <= 8 * UNIT_ROUNDOFF[torch.float32]
    circuit.train(False)
    with masks.hard(), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, circuit(input_ids=ids).logits)
