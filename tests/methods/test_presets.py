"""discover(method=...): every method against its loop by hand, the numbers of its authors, what it leaves behind."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from subnets import DiscoveryConfig, discover, mask_model
from subnets.discovery import SGD
from subnets.discovery.presets import RescaledSigmoid
from subnets.discovery.scores import reset_scores
from subnets.methods import (
    METHODS,
    ContinuousSparsification,
    Csordas,
    EdgePopup,
    HardConcreteGates,
    LearnedSupermask,
    Lepori,
    Piggyback,
)
from subnets.training.seeds import seed_for
from torch import Tensor, nn
from torch.nn import functional as F

from subnet_kernels import use_backend
from subnet_kernels.masks import MOST_SAMPLES, HardConcrete, Sigmoid, Threshold, TopK
from subnet_kernels.random import random_bits

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
BATCHES = [(X[8 * i : 8 * i + 8], X[8 * i : 8 * i + 8, :3].argmax(1)) for i in range(3)]
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def network() -> nn.Sequential:
    """fp64, so that only a wrong formula differs from the loop by hand."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module) -> float:
    return (model(X).argmax(1) == X[:, :3].argmax(1)).double().mean().item()


def scores_of(masks) -> list[Tensor]:
    return [layer.scores.detach().clone() for layer in masks.layers.values()]


def assert_same_discovery(a, b) -> None:
    assert a.history == b.history and a.best == b.best
    assert all(torch.equal(mask, b.subnet.masks[name]) for name, mask in a.subnet.masks.items())
    assert a.subnet.provenance == b.subnet.provenance


# --- every method against its loop by hand ---------------------------------------------------------------------------

NUM_EPOCHS = 4


class ByHand:
    """A loop in plain torch. ``mask(scores, step, epoch, layer, sample)`` [weight's shape or less] and
    ``penalty(scores, epoch)`` per weight are a method's formulas, of which autograd makes the gradients."""

    def __init__(self, mask: Callable[..., Tensor], optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
                 rate: Callable[[int], float], penalty: Callable[..., Tensor] | None = None, lam: float = 0.0,
                 samples: int = 1, after_step: Callable[[Tensor], Any] = lambda scores: None,
                 clip: float = math.inf) -> None:  # fmt: skip
        self.mask, self.optimizer, self.rate, self.penalty, self.lam = mask, optimizer, rate, penalty, lam
        self.samples, self.after_step, self.clip = samples, after_step, clip

    def run(
        self, scores: list[Tensor], rounds: int = 1, reset: Callable[[Tensor], Tensor] = torch.clone
    ) -> list[Tensor]:
        base = network()
        scores = [its.clone().requires_grad_(True) for its in scores]
        optimizer, step = self.optimizer(scores), 0
        for epoch in range(rounds * NUM_EPOCHS):
            of_round = epoch % NUM_EPOCHS
            if epoch and not of_round:
                with torch.no_grad():
                    for its in scores:
                        its.copy_(reset(its))
            optimizer.param_groups[0]["lr"] = self.rate(of_round)
            for x, y in BATCHES:
                parts = []
                for sample, rows in enumerate(x.chunk(self.samples)):
                    for layer, (linear, its) in enumerate(zip((base[0], base[2]), scores, strict=True)):
                        m = self.mask(its, step, of_round, layer, sample)
                        rows = F.linear(rows, linear.weight.detach() * m, linear.bias.detach())
                        rows = rows.relu() if layer == 0 else rows
                    parts.append(rows)
                loss = F.cross_entropy(torch.cat(parts), y)
                if self.penalty is not None:
                    for linear, its in zip((base[0], base[2]), scores, strict=True):
                        per_score = linear.weight.numel() / its.numel()
                        loss = loss + self.lam * per_score * self.penalty(its, of_round).sum()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(scores, self.clip)
                optimizer.step()
                with torch.no_grad():
                    for its in scores:
                        self.after_step(its)
                step += 1
        return [its.detach() for its in scores]


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    return (hard - soft).detach() + soft


def uniform(scores: Tensor, step: int, layer: int, sample: int, seed: int = 0) -> Tensor:
    """The u that belongs to each score's draw."""
    first = layer * MOST_SAMPLES + sample
    bits = random_bits(seed_for(seed, "discover", "masks"), step, tuple(scores.shape), first_sample=first)[0]
    return (bits.double() + 0.5) / 2**16


def gumbel_mask(logits: Tensor, step: int, epoch: int, layer: int, sample: int) -> Tensor:
    u = uniform(logits, step, layer, sample)
    soft = torch.sigmoid((logits - torch.log(u / (1 - u))) / 0.7)
    return straight_through((soft > 0.5).double(), soft)


def bernoulli_mask(v: Tensor, step: int, epoch: int, layer: int, sample: int) -> Tensor:
    p = torch.sigmoid(v)
    return straight_through((uniform(v, step, layer, sample) < p).double(), p)


def hard_concrete_mask(log_alpha: Tensor, step: int, epoch: int, layer: int, sample: int) -> Tensor:
    u = 1 - uniform(log_alpha, step, layer, sample)
    s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + log_alpha) * 3 / 2)
    return (s * 1.2 - 0.1).clamp(0, 1)


def top_half_mask(scores: Tensor, *_: int) -> Tensor:
    sizes = scores.abs()
    cutoff = sizes.flatten().sort().values[int(0.5 * scores.numel())]
    return straight_through((sizes >= cutoff).double(), sizes)


def threshold_mask(r: Tensor, *_: int) -> Tensor:
    return straight_through((r > 5e-3).double(), r)


def beta_at(done: float) -> float:
    """200^done, rounded as the masks keep it."""
    return torch.tensor(200**done).item()


def sgd(nesterov: bool = False, decay: float = 0.0) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    return lambda scores: torch.optim.SGD(scores, 1.0, momentum=0.9, nesterov=nesterov, weight_decay=decay)


adam = torch.optim.Adam


LOOPS = {
    "csordas": (Csordas(mask_loss_weight=0.5, tau=0.7, clip_norm=0.05, score_init=0.3), ByHand(
        gumbel_mask, adam, lambda e: 1e-2, lambda logits, e: logits, 0.5 / 128, samples=4, clip=0.05)),
    "hard_concrete": (HardConcreteGates(l0=3.0, num_examples=100, drop_rate=0.3, score_range=(0.8, 0.86)), ByHand(
        hard_concrete_mask, adam, lambda e: 1e-3, lambda a, e: torch.sigmoid(a + 2 / 3 * math.log(11)), 0.03,
        after_step=lambda a: a.clamp_(0.8, 0.86))),
    "edge_popup": (EdgePopup(weight_decay=0.01), ByHand(
        top_half_mask, sgd(decay=0.01), lambda e: 0.1 * (1 + math.cos(math.pi * e / NUM_EPOCHS)) / 2)),
    "supermask": (LearnedSupermask(), ByHand(bernoulli_mask, sgd(), lambda e: 100.0)),
    "piggyback": (Piggyback(lr=2e-3), ByHand(threshold_mask, adam, lambda e: 2e-3 if e < NUM_EPOCHS / 2 else 2e-4)),
    "lepori": (Lepori(lam=1e-2), ByHand(
        lambda s, step, e, *_: torch.sigmoid(beta_at((e + 1) / NUM_EPOCHS) * s), adam, lambda e: 1e-2,
        lambda s, e: torch.sigmoid(beta_at((e + 1) / NUM_EPOCHS) * s), 1e-2)),
}  # fmt: skip


def run_discover(method, **config) -> tuple[list[Tensor], list[Tensor], Any]:
    """(initial scores, final scores, Discovery)"""
    first, last = [], []

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if not first:
            first.extend(layer.scores.detach().clone() for layer in (model[0], model[2]))
        return classify(model, batch)

    def callback(row: dict[str, Any], masks) -> None:
        last[:] = scores_of(masks)

    config = DiscoveryConfig(epochs=NUM_EPOCHS, **config)
    found = discover(network(), BATCHES, objective, config, method=method, callbacks=[callback])
    return first, last, found


@pytest.mark.parametrize("method, by_hand", LOOPS.values(), ids=LOOPS)
def test_scores_are_those_of_the_authors_loop_written_by_hand(method, by_hand):
    first, last, found = run_discover(method)
    expected = by_hand.run(first)
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(first, last, strict=True))
    for ours, theirs in zip(last, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    kept = [its > 0 for its in expected]
    if isinstance(method, EdgePopup):
        kept = [top_half_mask(its) > 0.5 for its in expected]
    elif isinstance(method, Piggyback):
        kept = [its > 5e-3 for its in expected]
    for mask, its in zip(found.subnet.masks.values(), kept, strict=True):
        assert torch.equal(mask, its.expand_as(mask))


@pytest.mark.parametrize("reset", ["paper", "code"])
@pytest.mark.parametrize("rescale", [False, True])
def test_continuous_sparsification_is_its_loop_by_hand_over_three_rounds(reset, rescale):
    s0 = -0.02
    scale = 1 + math.exp(-s0) if rescale else 1.0
    soft = lambda s, step, e, *_: scale * torch.sigmoid(beta_at(e / (NUM_EPOCHS - 1)) * s)  # noqa: E731
    by_hand = ByHand(
        soft, sgd(nesterov=True), lambda e: 0.01 * 0.1 ** ((e >= 2) + (e >= 3)), lambda s, e: soft(s, 0, e), 0.02
    )
    method = ContinuousSparsification(
        reset=reset, rescale=rescale, score_init=s0, lr=0.01, lr_schedule=(0.5, 0.75), lam=0.02
    )
    first, last, found = run_discover(method)
    assert all(bool((its == s0).all()) for its in first)
    expected = by_hand.run(first, 3, lambda s: (s * (200 if reset == "paper" else 1)).clamp(max=s0))
    for ours, theirs in zip(last, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert [row["round"] for row in found.history] == [0] * 4 + [1] * 4 + [2] * 4
    for mask, its in zip(found.subnet.masks.values(), expected, strict=True):
        assert torch.equal(mask, its > 0)


# --- the authors' numbers --------------------------------------------------------------------------------------------

NO_DECAY = {"weight_decay": 0.0, "beta_start": 1.0}
FIXED_BETA = {**NO_DECAY, "beta_end": 1.0}
NUMBERS = {
    "continuous_sparsification": dict(
        epochs=85, rounds=3, lr=0.1, optimizer=SGD(0.9, nesterov=True), lam=1e-8, score_init=0.0, beta_end=200.0,
        kind="sigmoid", reset="paper", **NO_DECAY),
    "continuous_sparsification_code": dict(
        epochs=85, rounds=3, lr=0.1, lam=1e-8, score_init=0.0, beta_end=200.0, kind=RescaledSigmoid(2.0), reset="code"),
    "lepori": dict(epochs=90, rounds=1, lr=1e-2, optimizer=None, lam=1e-8, score_init=0.0, beta_end=200.0, **NO_DECAY),
    "csordas": dict(score_init=2.0, lr=1e-2, optimizer=None, clip_norm=1.0, lam=7.8125e-7, **FIXED_BETA),
    "hard_concrete": dict(
        epochs=200, score_init=0.0, score_init_std=0.01, lr=1e-3, optimizer=None, lam=1 / 60_000, unit="gates",
        score_range=(-4.605170185988091, 4.605170185988092), kind=HardConcrete(), **FIXED_BETA),
    "edge_popup": dict(
        epochs=100, kind=TopK(0.5), init="kaiming_uniform", optimizer=SGD(0.9), lr=0.1, weight_decay=1e-4, lam=0.0,
        lr_schedule="cosine"),
    "supermask": dict(epochs=2000, score_init=0.0, optimizer=SGD(0.9), lr=100.0, lam=0.0, **FIXED_BETA),
    "piggyback": dict(
        epochs=30, kind=Threshold(5e-3), score_init=1e-2, lr=1e-4, optimizer=None, lam=0.0, **FIXED_BETA),
}  # fmt: skip


def test_every_preset_has_its_authors_numbers():
    assert set(NUMBERS) == set(METHODS)
    for name, numbers in NUMBERS.items():
        config = METHODS[name].config()
        assert {key: getattr(config, key) for key in numbers} == numbers, name
    assert (Csordas().config().kind.tau, Csordas().config().kind.samples) == (1.0, 4)
    assert HardConcreteGates(drop_rate=0.2).config().score_init == pytest.approx(math.log(4))


def test_rates_fall_where_the_authors_let_them_fall():
    savarese = METHODS["continuous_sparsification"].config()
    rates = [savarese.lr_at(epoch) for epoch in range(85)]
    assert rates == pytest.approx([0.1] * 56 + [0.01] * 15 + [0.001] * 14)
    piggyback = METHODS["piggyback"].config()
    assert [piggyback.lr_at(epoch) for epoch in range(30)] == pytest.approx([1e-4] * 15 + [1e-5] * 15)
    edge = METHODS["edge_popup"].config()
    assert [edge.lr_at(epoch) for epoch in (0, 25, 50, 99)] == pytest.approx(
        [0.1, 0.05 * (1 + math.sqrt(0.5)), 0.05, 0.05 * (1 - math.cos(math.pi / 100))]
    )


def idle(model: nn.Module, batch: Any) -> Tensor:
    """No gradient but the penalty's."""
    return 0 * model(torch.ones(4, 1)).sum()


@pytest.mark.parametrize("weight, batch, crossing", [(1e-4, 128, 203), (3e-4, 128, 201), (1e-6, 256, 713)])
def test_an_unused_logit_crosses_zero_at_the_step_that_adams_constant_step_gives(weight, batch, crossing):
    logits = []
    discover(
        nn.Linear(1, 1), lambda epoch: [0] * (1 if epoch else crossing - 1), idle, DiscoveryConfig(epochs=2),
        method=Csordas(mask_loss_weight=weight, batch_size=batch, samples=1),
        callbacks=[lambda row, masks: logits.append(masks.layers["weight"].scores.item())],
    )  # fmt: skip
    assert logits[0] >= 0 > logits[1]
    g = weight / batch
    step = 0.01 * g / (g + 1e-8)
    assert logits == pytest.approx([2 - (crossing - 1) * step, 2 - crossing * step], abs=2e-4)


def test_adam_takes_unused_logits_down_without_end_to_the_published_values():
    logits = nn.Parameter(torch.full((3,), 2.0))
    optimizer = torch.optim.Adam([logits], 1e-2, fused=True)  # whose steps the test above finds in discover
    logits.grad = torch.tensor([1e-4 / 128, 3e-4 / 128, 1e-6 / 256])
    seen = []
    for _ in range(2):
        for _ in range(10_000):
            optimizer.step()
        seen.append([round(its, 1) for its in logits.tolist()])
    assert [its[:2] for its in seen] == [[-96.7, -97.6], [-195.5, -197.2]] and round(seen[1][2]) == -54


def betas(method) -> list[float]:
    return [row["beta"] for row in discover(nn.Linear(1, 1), [0], idle, method=method).history]


def test_beta_of_continuous_sparsification_is_200_to_the_e_over_84_in_every_round():
    rounds = torch.tensor(betas("continuous_sparsification"), dtype=torch.float64).view(3, 85)
    assert torch.equal(rounds[0], rounds[1]) and torch.equal(rounds[0], rounds[2])
    assert rounds[0, [0, 1, 42, 83, 84]].tolist() == pytest.approx([1, 1.0651, 14.142, 187.775, 200], abs=6e-4)
    torch.testing.assert_close(rounds[0, 1:] / rounds[0, :-1], torch.full((84,), 1.065107).double(), rtol=0, atol=2e-6)


def test_beta_of_lepori_is_raised_before_the_first_epoch_and_ends_at_200():
    seen = betas("lepori")
    assert len(seen) == 90 and (seen[0], seen[-1]) == pytest.approx((1.060638, 200), abs=2e-5)


def test_the_masks_slope_and_distance_from_the_step_are_continuous_sparsifications():
    s = torch.tensor([0.0, 0.05, -0.05], dtype=torch.float64)
    assert Sigmoid().slope(s, 1.0).tolist() == pytest.approx([0.25, 0.249844, 0.249844], abs=5e-7)
    assert Sigmoid().slope(s, 200.0).tolist() == pytest.approx([50, 0.009079, 0.009079], abs=5e-7)
    assert Sigmoid().value(s[1:], 200.0).tolist() == pytest.approx([0.99995, 4.54e-5], abs=5e-6)
    s = torch.linspace(-1, 1, 200, dtype=torch.float64)  # 0 is not among them
    for beta in (1.0, 14.142, 200.0):
        distance = (Sigmoid().value(s, beta) - (s > 0).double()).abs()
        assert bool((distance <= torch.exp(-beta * s.abs()) + 2**-53).all())  # 1 - m is rounded


def test_a_score_that_stays_at_zero_is_out_of_the_subnet_though_its_soft_mask_is_a_half():
    method = ContinuousSparsification(lam=0.0, score_init=0.0, rounds=1)
    found = discover(nn.Linear(2, 2), [0], lambda m, b: 0 * m(torch.ones(1, 2)).sum(), method=method)
    assert found.subnet.num_kept() == 0 and found.best["undecided"] == 1.0


@pytest.mark.parametrize("reset, after", [("paper", [0.5, 0.018, 0.5, 0.0]), ("code", [0.5, 0.495, 0.5, 0.378])])
def test_the_two_resets_of_scores_between_rounds(reset, after):
    model = nn.Linear(4, 1, bias=False)
    s = torch.tensor([[0.3, -0.02, 0.0, -0.5]])
    masks = mask_model(model, init={"weight": s})
    reset_scores(masks, ContinuousSparsification(reset=reset).config())
    assert masks.layers["weight"].mask().flatten().tolist() == pytest.approx(after, abs=5e-4)


@pytest.mark.parametrize("s0", [0.0, 0.1, -0.1])
def test_rescaled_masks_begin_at_the_network_without_mask(s0):
    model = network()
    base, outputs = model(X), []

    def objective(model: nn.Module, batch: Any) -> Tensor:
        outputs.append(model(X).detach())
        return classify(model, batch)

    method = ContinuousSparsification(score_init=s0, rescale=True, lam=0.0)
    discover(model, BATCHES, objective, DiscoveryConfig(epochs=2), method=method)
    if s0 == 0:
        assert torch.equal(outputs[0], base)
    torch.testing.assert_close(outputs[0], base, rtol=1e-14, atol=1e-15)


def test_a_larger_initial_score_keeps_more():
    kept = [
        run_discover(ContinuousSparsification(score_init=s0, rounds=1, lr=0.02))[2].subnet.num_kept()
        for s0 in (-0.1, -0.02, 0.0, 0.02, 0.1)
    ]
    assert kept == sorted(kept) and kept[0] < kept[2] < kept[4]


class AtEveryDraw(HardConcrete):
    """The gate at each of the 2^16 draws instead of a random one."""

    def draws(self, scores: Tensor) -> Tensor:
        return torch.arange(2**16, dtype=torch.int32)


@pytest.mark.parametrize("log_alpha, p_open, p_one, mean, at_test", [
    (-2.0, 0.4010, 0.0266, 0.1426, 0.0430), (0.0, 0.8318, 0.1682, 0.5, 0.5), (2.0, 0.9734, 0.5990, 0.8573, 0.9570),
])  # fmt: skip
def test_hard_concrete_gates_have_the_published_probabilities(log_alpha, p_open, p_one, mean, at_test):
    kind = AtEveryDraw()
    scores = torch.full((2**16,), log_alpha, dtype=torch.float64)
    z = kind.value(scores, 1.0)
    assert (z > 0).double().mean().item() == pytest.approx(p_open, abs=7e-5)
    assert (z == 1).double().mean().item() == pytest.approx(p_one, abs=7e-5)
    t = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000  # E z is the integral of P(z > t)
    exact = torch.sigmoid(log_alpha - 2 / 3 * ((t + 0.1) / (1.1 - t)).log()).mean().item()
    assert z.mean().item() == pytest.approx(exact, abs=2e-6)
    assert exact == pytest.approx(mean, abs=1e-4)  # the published one was drawn 2 million times
    assert kind.penalty(scores[:1], 1.0).item() == pytest.approx(p_open, abs=5e-5)
    assert kind.penalty(scores[:1], 1.0).item() == pytest.approx(1 / (1 + math.exp(-log_alpha - 1.598597)), abs=1e-6)
    assert kind.mean_value(scores[:1], 1.0).item() == pytest.approx(at_test, abs=5e-5)
    slope = kind.slope(scores, 1.0)
    assert bool(((slope > 0) == ((z > 0) & (z < 1))).all())


def test_the_gate_without_noise_is_closed_and_open_beyond_2_397895():
    edges = torch.tensor([-2.3979, -2.3978, 2.3978, 2.3979], dtype=torch.float64)
    z = HardConcrete().mean_value(edges, 1.0)
    assert z[0] == 0 and z[1] > 0 and z[2] < 1 and z[3] == 1


def test_hard_concrete_has_one_gate_per_input_unit_or_filter_and_draws_them_near_log_alpha():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Flatten(), nn.Linear(256, 5))
    shapes, logits = {}, []

    def callback(row: dict[str, Any], masks) -> None:
        shapes.update({name: tuple(layer.scores.shape) for name, layer in masks.layers.items()})
        logits.extend(torch.cat([its.flatten() for its in scores_of(masks)]))

    method = HardConcreteGates(drop_rate=0.2, l0=0.0, lr=1e-12)
    found = discover(
        model, [0], lambda m, b: 0 * m(torch.ones(1, 3, 4, 4)).sum(), DiscoveryConfig(epochs=1), method=method,
        callbacks=[callback],
    )  # fmt: skip
    assert shapes == {"0.weight": (64, 1, 1, 1), "2.weight": (1, 256)}
    drawn = torch.stack(logits)
    assert drawn.mean().item() == pytest.approx(math.log(4), abs=0.002)
    assert drawn.std().item() == pytest.approx(0.01, rel=0.15)
    assert found.subnet.density() == 1.0


# --- edge-popup, Piggyback -------------------------------------------------------------------------------------------


def test_edge_popups_example_of_four_weights():
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2, 3, -4]]))
    masks = mask_model(
        layer, kind=EdgePopup(kept=0.5).config().kind, init={"weight": torch.tensor([[0.4, -0.3, 0.2, -0.1]])}
    )
    out = masks.model(torch.ones(1, 4))
    out.sum().backward()
    assert masks.layers["weight"].mask().tolist() == [[1, 1, 0, 0]] and out.item() == -1
    assert masks.layers["weight"].scores.grad.tolist() == [[1, 2, 3, 4]]
    assert layer.weight.tolist() == [[1, -2, 3, -4]]


@pytest.mark.parametrize("k", [0.1, 0.3, 0.5, 1.0])
def test_edge_popup_keeps_n_minus_int_of_1_minus_k_n_weights_of_every_layer(k):
    found = run_discover(EdgePopup(kept=k))[2]
    kept = [int(mask.sum()) for mask in found.subnet.masks.values()]
    assert kept == [n - int((1 - k) * n) for n in (24, 18)]
    assert all(row["density"] == sum(kept) / 42 for row in found.history)


def test_edge_popups_scores_begin_uniform_within_1_over_the_root_of_inputs_of_each_layout():
    seen = []
    model = nn.Sequential(nn.Conv2d(4, 200, 3), nn.Flatten(), nn.Linear(200, 100))
    objective = lambda m, b: (seen.extend(p.clone() for n, p in m.named_parameters() if "scores" in n),  # noqa: E731
                              m(torch.ones(1, 4, 3, 3)).sum())[1]  # fmt: skip
    discover(model, [0], objective, DiscoveryConfig(epochs=1, seed=1), method="edge_popup")
    for scores, inputs in zip(seen, (36, 200), strict=True):
        bound = inputs**-0.5
        assert scores.abs().max() <= bound and scores.abs().max() > 0.99 * bound
        assert scores.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)  # uniform's
        assert scores.mean().abs() < 0.03 * bound


def test_piggyback_begins_at_the_pretrained_network_and_a_weight_goes_after_more_than_50_steps_of_adam():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0]]))
    outputs, kept = [], []

    def objective(model: nn.Module, batch: Any) -> Tensor:
        out = model(torch.tensor([[3e-4, 1e-4]]))  # gradients of r: 3e-4 and -1e-4
        outputs.append(out.item())
        return out.sum()

    discover(
        model, [0], objective, DiscoveryConfig(epochs=120), method="piggyback",
        callbacks=[lambda row, masks: kept.append(masks.kept()["weight"].flatten().tolist())],
    )  # fmt: skip
    assert outputs[0] == model(torch.tensor([[3e-4, 1e-4]])).item()
    # a step is lr * g / (g + eps): 50 of them are a hair less than 5e-3
    assert kept[:50] == [[True, True]] * 50 and kept[50:] == [[False, True]] * 70


# --- what every method leaves behind ---------------------------------------------------------------------------------


@EVERY
def test_the_subnet_is_the_kinds_binary_mask_which_evaluate_saw_and_the_model_is_as_before(method):
    model = network()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    modules = [(type(module), sorted(vars(module))) for module in model.modules()]
    seen: dict[str, Any] = {}

    def callback(row: dict[str, Any], masks) -> None:
        with masks.hard(), torch.no_grad():
            seen.update(masks=masks.kept(), out=masks.model(X), density=masks.density())

    found = discover(model, BATCHES, classify, DiscoveryConfig(epochs=3), method=method, callbacks=[callback])
    assert all(torch.equal(mask, seen["masks"][name]) for name, mask in found.subnet.masks.items())
    assert found.subnet.density() == seen["density"] == found.history[-1]["density"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [(type(module), sorted(vars(module))) for module in model.modules()] == modules
    assert torch.equal(torch.get_rng_state(), random_state)
    assert found.subnet.provenance["method"] == method.name
    if not getattr(method, "rescale", False):
        with found.subnet.applied(model), torch.no_grad():
            torch.testing.assert_close(model(X), seen["out"], rtol=1e-13, atol=1e-13)


@EVERY
def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(method, tmp_path):
    def stop_after(epoch: int) -> Callable[..., None]:
        def callback(row: dict[str, Any], masks) -> None:
            if row["epoch"] > epoch:
                raise KeyboardInterrupt

        return callback

    config = DiscoveryConfig(epochs=3, seed=4)
    whole = discover(network(), BATCHES, classify, config, method=method, evaluate=accuracy)
    config = replace(config, checkpoint=tmp_path / "run.ckpt")
    for epoch in range(len(whole.history) - 1):
        with pytest.raises(KeyboardInterrupt):
            stop = [stop_after(epoch)]
            discover(network(), BATCHES, classify, config, method=method, evaluate=accuracy, callbacks=stop)
    assert_same_discovery(discover(network(), BATCHES, classify, config, method=method, evaluate=accuracy), whole)


@EVERY
def test_fp32_on_the_best_backend_and_on_the_reference_find_the_same(method):
    batches = [(x.float(), y) for x, y in BATCHES]
    found = []
    for context in (contextlib.nullcontext(), use_backend("reference")):
        with context:
            found.append(discover(network().float(), batches, classify, DiscoveryConfig(epochs=2), method=method))
    losses = [[row["loss"] for row in its.history] for its in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(torch.equal(mask, found[1].subnet.masks[name]) for name, mask in found[0].subnet.masks.items())


@pytest.mark.parametrize("name", ["csordas", "hard_concrete", "edge_popup", "supermask"])
def test_the_seed_decides_all_that_is_drawn(name):
    first, last, found = run_discover(name, seed=3)
    torch.rand(3)
    again = run_discover(name, seed=3)
    other = run_discover(name, seed=4)
    assert all(map(torch.equal, first, again[0])) and all(map(torch.equal, last, again[1]))
    assert_same_discovery(found, again[2])
    assert not any(map(torch.equal, last, other[1]))
    assert any(map(torch.equal, first, other[0])) == (name in ("csordas", "supermask"))  # those begin at a constant


def test_a_method_takes_length_and_targets_from_config_and_the_authors_epochs_without_one():
    config = DiscoveryConfig(epochs=7, targets=["2"], seed=5, unit="row")
    merged = Csordas().config(config)
    assert (merged.epochs, merged.targets, merged.seed, merged.unit, merged.lr) == (7, ["2"], 5, "row", 1e-2)
    assert Csordas().config().epochs == 50 and Piggyback().config().epochs == 30
    assert Piggyback().config(epochs=3, targets=["0"]).targets == ["0"]
    found = discover(network(), BATCHES, classify, DiscoveryConfig(epochs=1, targets=["2"]), method="csordas")
    assert list(found.subnet.masks) == ["2.weight"] and len(found.history) == 1


def test_lepori_trains_several_members_in_one_run():
    config = DiscoveryConfig(epochs=3, seeds=(0, 1), penalties=None)
    runs = discover(network(), BATCHES, classify, config, method="lepori")
    alone = discover(network(), BATCHES, classify, DiscoveryConfig(epochs=3, seed=1), method="lepori")
    assert len(runs) == 2
    assert all(torch.equal(mask, alone.subnet.masks[name]) for name, mask in runs[1].subnet.masks.items())


def test_members_side_by_side_of_another_kind_are_refused_by_layer():
    config = DiscoveryConfig(epochs=1, seeds=(0, 1), targets={"0": {}, "2": {"kind": TopK(0.5)}})
    with pytest.raises(ValueError, match="side by side, targets have {'2.weight': 'topk'}; call discover once"):
        discover(network(), BATCHES, classify, config)


def test_ranks_of_edge_popup_go_by_size():
    config = DiscoveryConfig(epochs=2, keep_ranks=True)
    scores = []
    found = discover(
        network(), BATCHES, classify, config, method="edge_popup",
        callbacks=[lambda row, masks: scores.__setitem__(slice(None), scores_of(masks))],
    )  # fmt: skip
    top = found.subnet.top(0.5)
    sizes = torch.cat([its.abs().flatten() for its in scores])
    chosen = torch.cat([mask.flatten() for mask in top.masks.values()])
    kept = torch.cat([mask.flatten() for mask in found.subnet.masks.values()])
    assert chosen.sum() == kept.sum() // 2
    assert sizes[chosen].min() > sizes[kept & ~chosen].max()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, message", [
    (lambda: Csordas(tau=0.0), "tau, the temperature, must be finite and > 0 .1e-6 at least., got 0.0"),
    (lambda: HardConcreteGates(tau=-1.0), "tau, the temperature, must be finite and > 0 .1e-6 at least., got -1.0"),
    (lambda: EdgePopup(kept=0.0), r"kind topk: kept, .* must be in \(0, 1\], got 0.0"),
    (lambda: EdgePopup(kept=1.5), r"must be in \(0, 1\], got 1.5"),
    (lambda: ContinuousSparsification(rounds=0), "rounds must be >= 1, got 0"),
    (lambda: ContinuousSparsification(reset="both"), r"reset must be one of \['paper', 'code'\], got 'both'"),
    (lambda: Csordas(samples=0), "samples must be from 1 to 4096, got 0"),
    (lambda: Csordas(batch_size=0), "batch_size must be finite and > 0, got 0"),
    (lambda: Csordas(mask_loss_weight=-1), "mask_loss_weight must be finite and >= 0, got -1"),
    (lambda: HardConcreteGates(drop_rate=1.0), r"drop_rate must be in \(0, 1\), got 1.0"),
    (lambda: HardConcreteGates(score_range=(1, 0)), r"score_range must be two numbers \(low, high\) or None"),
    (lambda: Piggyback(lr_schedule="linear"), "lr_schedule must be one of"),
    (lambda: Piggyback(lr_schedule=(1.5,)), r"or fractions of the run in \(0, 1\), got \(1.5,\)"),
    (lambda: SGD(momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
    (lambda: SGD(momentum=0.0, nesterov=True), "nesterov needs momentum > 0"),
    (lambda: DiscoveryConfig(clip_norm=0.0), "clip_norm must be > 0 or None, got 0.0"),
    (lambda: DiscoveryConfig(clip_norm=1.0, seeds=(0, 1)), "side by side, which can't be had with clip_norm; call"),
    (lambda: DiscoveryConfig(kind="gumbel", seeds=(0, 1)), "can't be had with kind 'gumbel'; call discover once"),
    (lambda: DiscoveryConfig(clip_norm=1.0, cuda_graph=True), "cuda_graph=True can't be had with clip_norm"),
    (lambda: EdgePopup().config(target_density=0.1), "does not set the density|lam and penalties must be > 0"),
    (lambda: Piggyback().config(DiscoveryConfig(lr=0.3)), "Piggyback: lr of the config are the method's to set"),
    (lambda: Piggyback().config(lr=0.3), "Piggyback: lr of the config are the method's to set"),
])  # fmt: skip
def test_a_bad_number_is_refused_in_one_sentence(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_an_unknown_method_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match=r"method must be one of \['continuous_sparsification', .* got 'l0'"):
        discover(network(), BATCHES, classify, method="l0")
    with pytest.raises(TypeError, match="must be a method's name or a Method, got 3"):
        discover(network(), BATCHES, classify, method=3)  # pyright: ignore
    with pytest.raises(TypeError, match="config must be a DiscoveryConfig"):
        discover(network(), BATCHES, classify, {"epochs": 3}, method="csordas")  # pyright: ignore
    with pytest.raises(TypeError, match=r"optimizer must be an SGD\(...\) or None"):
        DiscoveryConfig(optimizer="sgd")  # pyright: ignore


def test_scores_by_inputs_of_a_unit_need_weights_that_have_some():
    model = network()
    with pytest.raises(ValueError, match=r"0.bias of shape \[6\] has no inputs per unit"):
        discover(model, BATCHES, classify, DiscoveryConfig(targets=["0.bias"], epochs=1), method="edge_popup")
    assert not hasattr(model[0], "bias_mask") and type(model[0]) is nn.Linear
