"""What gpu_check checks of sampled masks, and how fast they are beside masks drawn by eager PyTorch.

Every check draws fresh inputs from the seed, fills outputs with NaN and returns its worst error as a multiple of the
allowed one. Decisions are integer comparisons, so effective weights are exact; score gradients are compared with fp64.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from subnet_kernels import BackendRefused, effective_weight, masked_linear, use_backend
from subnet_kernels.backends.base import SAMPLED, Backend, linear_of_masks
from subnet_kernels.dispatch import choose_for
from subnet_kernels.masks import NUM_DRAWS, Bernoulli, Gumbel, SampledKind, keep_thresholds, logistic_noise
from subnet_kernels.random import plain_random_bits, rows_and_columns
from subnet_kernels.testing import UNIT_ROUNDOFF, Case

from . import memory
from .cases import LayerCase
from .ceilings import Ceilings
from .contenders import Contender, Plain, Skipped, check_capturable
from .gpu_cuda import DTYPES, Check, Inputs, equal_error, worst_ratio
from .rows import Row
from .runner import PHASES, Settings, free_memory, in_mode, make_row, set_floor
from .sampled import eager_gumbel
from .timing import time_interleaved

SHAPES = ((1,), (13,), (7, 1), (1, 15), (33, 131), (48, 64), (6, 4, 3, 3), (0, 5), (3, 0))
LARGE = ((257, 389), (96, 1040))  # a hundred thousand weights; of one pair of dtypes
PAIRS = tuple(itertools.product(DTYPES, DTYPES))
KINDS = (Gumbel(samples=3, sample=4096 * 7 + 5), Gumbel(tau=2 / 3, sample=2**32 - 9), Bernoulli(samples=2))
BETA, U = 3.0, 2.0**-24
NUM_MASKS = 8  # that share the batch, where it is timed


def _key(seed: int, device: str) -> Tensor:
    """Both words of the seed are in use; the step counts mod 2^32."""
    return torch.tensor([seed * 0x1_0000_0F01 - 3, 2**32 + 9], device=device)


def plain_draws(kind: SampledKind, shape: Sequence[int]) -> Tensor:
    """int32 [samples, *shape], by random.py's definition."""
    assert kind.key is not None
    seed, step = kind.key.unbind()
    bits = plain_random_bits(seed, step, kind.samples, *rows_and_columns(shape), kind.sample)
    return bits.to(torch.int32).view(kind.samples, *shape)


def threshold_checks(device: str, seed: int, backend: Backend) -> Iterator[Check]:
    """ceil(2^16 p - 1/2) lies within 1/2 of 2^16 p, and p's rounding errors, unless it is clamped."""
    for beta in (0.0, 1.0, BETA, 200.0):
        worst = 0.0
        for i, shape in enumerate((*SHAPES, *LARGE) if beta == BETA else SHAPES):
            scores = Inputs(device, seed + i)(shape, offset=i % 3)
            given = torch.tensor(beta, device=device)
            made = backend.keep_thresholds(scores, given, KINDS[i % 3])
            assert made is not None and made.dtype == torch.uint16 and made.shape == scores.shape
            z = beta * scores.double()
            true = (NUM_DRAWS * torch.sigmoid(z)).clamp(max=NUM_DRAWS - 0.5)
            bound = 0.5 + NUM_DRAWS * 4 * U * torch.sigmoid(z) * (1 + z.abs())
            worst = max(worst, worst_ratio(made.to(torch.int32), true, bound))
        yield f"{backend.name}, thresholds, beta {beta:g}", worst


def decision_checks(
    device: str, seed: int, backend: Backend, large: Sequence[tuple[int, ...]] = LARGE,
    dtypes: Sequence[tuple[str, str]] = PAIRS,
) -> Iterator[Check]:
    """Effective weights for given thresholds are plain PyTorch's to the bit: all samples in one call and one by one,
    misaligned memory, thresholds of 0 and 2^16 - 1. Weights are numbers of both dtypes."""
    beta = torch.tensor(BETA, device=device)
    for number, (w_name, o_name) in enumerate(dtypes):
        w_dtype, o_dtype, pairs = DTYPES[w_name], DTYPES[o_name], []
        for i, shape in enumerate((*SHAPES, *large) if number == 0 else SHAPES):
            randn, kind = Inputs(device, seed + i), KINDS[i % 3].at(_key(seed, device))
            weight, scores = randn(shape, w_dtype, i % 3), randn(shape)
            weight.copy_(weight.to(o_dtype))
            high = torch.randint(-1, NUM_DRAWS + 1, shape, generator=randn.generator, device=device)
            thresholds = high.clamp(0, NUM_DRAWS - 1).to(torch.int32)
            is_kept = plain_draws(kind, shape) < thresholds
            wanted = (weight.float() * is_kept).to(o_dtype)
            memory = torch.full((wanted.numel() + 1,), float("nan"), dtype=o_dtype, device=device)
            out = memory[i % 2 :][: wanted.numel()].view(wanted.shape)
            given = thresholds.to(torch.uint16)
            backend.sampled_weights(weight, scores, given, beta, kind, out)
            pairs.append((out.clone(), wanted))
            for one, apart, true in zip(kind.each(), out.fill_(float("nan")), wanted, strict=True):
                backend.sampled_weight(weight, scores, given, beta, one, apart)
                pairs.append((apart, true))
        yield f"{backend.name}, sampled weights, {w_name} to {o_name}", equal_error(pairs)


def slopes(kind: SampledKind, scores: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """In fp64, [samples, ...]: dm/ds, and by how much of it fp32 arithmetic may be off."""
    z = beta * scores.double().expand(kind.samples, *scores.shape)
    if not isinstance(kind, Gumbel):
        return beta * torch.sigmoid(z) * torch.sigmoid(-z), U * (16 + 4 * z.abs())
    noise = logistic_noise(plain_draws(kind, scores.shape), torch.float64)
    y = (z + noise) / kind.tau
    slope = beta * torch.sigmoid(y) * torch.sigmoid(-y) / kind.tau
    return slope, U * (16 + (12 * (1 + noise.abs()) + 4 * z.abs()) / kind.tau + 4 * y.abs())


def grad_checks(
    device: str, seed: int, backend: Backend, large: Sequence[tuple[int, ...]] = LARGE,
    dtypes: Sequence[tuple[str, str]] = PAIRS,
) -> Iterator[Check]:
    """Score gradients, added to what is there: all samples in one call and one by one."""
    beta = torch.tensor(BETA, device=device)
    for number, (g_name, w_name) in enumerate(dtypes):
        g_dtype, w_dtype, worst = DTYPES[g_name], DTYPES[w_name], 0.0
        for i, shape in enumerate((*SHAPES, *large) if number == 0 else SHAPES):
            randn, kind = Inputs(device, seed + i), KINDS[(i + 1) % 3].at(_key(seed, device))
            weight, scores, before = randn(shape, w_dtype, i % 3), randn(shape), randn(shape, offset=i % 2)
            grads = randn((kind.samples, *shape), g_dtype)
            slope, off = slopes(kind, scores, BETA)
            parts = grads.double() * weight.double() * slope
            total = before.double() + parts.sum(0)
            bound = (parts.abs() * off).sum(0) + 1e-28  # a slope below 2^-100 is 0
            bound += (kind.samples + 3) * U * (parts.abs().sum(0) + before.double().abs())
            together, apart = before.clone(), before.clone()
            backend.sampled_grad_scores_of_all_(together, grads, weight, scores, beta, kind)
            for one, grad in zip(kind.each(), grads, strict=True):
                backend.sampled_grad_scores_(apart, grad, weight, scores, beta, one)
            worst = max(worst, worst_ratio(together, total, bound), worst_ratio(apart, total, bound))
        yield f"{backend.name}, sampled score gradients, gradients {g_name}, weights {w_name}", worst


def checks(
    device: str, seed: int, backend: Backend, large: Sequence[tuple[int, ...]] = LARGE,
    dtypes: Sequence[tuple[str, str]] = PAIRS,
) -> Iterator[Check]:
    """All of them on one backend. dtypes: names, of weights and what is made of them."""
    yield from threshold_checks(device, seed, backend)
    yield from decision_checks(device, seed, backend, large, dtypes)
    yield from grad_checks(device, seed, backend, large, dtypes)


def graph_check(device: str, seed: int, backend: Backend) -> Iterator[Check]:
    """A captured launch draws by the seed and step that stand in the key when it is replayed."""
    from .timing import as_cuda_graph

    randn, kind = Inputs(device, seed), KINDS[0].at(_key(seed, device))
    weight, beta = randn((65, 131)), torch.tensor(BETA, device=device)
    assert kind.key is not None
    thresholds = torch.full(weight.shape, 30_000, dtype=torch.int32, device=device)
    given, out = thresholds.to(torch.uint16), torch.empty(kind.samples, *weight.shape, device=device)
    replay = as_cuda_graph(lambda: backend.sampled_weights(weight, weight, given, beta, kind, out))
    pairs = []
    for _ in range(2):
        kind.key[0] -= 2**40
        kind.key[1] += 1
        replay()
        pairs.append((out.clone(), weight * (plain_draws(kind, weight.shape) < thresholds)))
    yield f"{backend.name}, replayed graph draws by the new key", equal_error(pairs)


# --- a layer's training step -----------------------------------------------------------------------------------------


class Gumbel8(Contender):
    """A linear layer with NUM_MASKS masks, each for its part of the batch."""

    def make(self) -> Tensor:
        self.key = torch.tensor([1, 0], device=self.weight.device)
        self.kind = Gumbel(samples=NUM_MASKS).at(self.key)
        return super().make()

    def step(self) -> None:
        super().step()
        self.key[1] += 1

    def own_tensors(self) -> list[Tensor]:
        return [*super().own_tensors(), self.key]


class EagerGumbel(Gumbel8):
    """eager_gumbel: all masks in memory, one batched product."""

    name = "eager"

    def forward(self) -> tuple[Tensor, Tensor]:
        logits = self.beta * self.trained
        mask = eager_gumbel(logits, NUM_MASKS)
        return linear_of_masks(self.x, (self.weight * mask).to(self.x.dtype), self.bias, False), logits.sum()


class CompiledGumbel(EagerGumbel):
    """torch.compile of the same."""

    name = "compile"

    def make(self) -> Tensor:
        torch._dynamo.reset()
        self.compiled = torch.compile(super().forward, fullgraph=True, dynamic=False)
        return super().make()

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.compiled()


class OursGumbel(Gumbel8):
    """Our op: one effective weight at a time, made again in the backward pass."""

    name = "ours"
    backend: str | None = None

    def make(self) -> Tensor:
        case = self.case
        try:
            self.chosen = choose_for(SAMPLED, case.weight, case.scores, "gumbel", case.x.dtype, None, self.backend)
        except BackendRefused as refusal:
            raise Skipped(str(refusal)) from refusal
        return super().make()

    def forward(self) -> tuple[Tensor, Tensor]:
        leaves = self.x, self.weight, self.trained, self.beta, self.bias
        return masked_linear(*leaves, kind=self.kind, backend=self.chosen.name)

    def note(self) -> str:
        return f"backend {self.chosen.name}"


class OursTriton(OursGumbel):
    """The same on Triton."""

    name = "ours_triton"
    backend = "triton"


class OursTogether(OursGumbel):
    """All effective weights in one launch and one batched product; they are kept for the backward pass."""

    name = "ours_together"

    def forward(self) -> tuple[Tensor, Tensor]:
        with use_backend(self.chosen.name):
            w_eff, penalty = effective_weight(
                self.weight, self.trained, self.beta, kind=self.kind, dtype=self.x.dtype, key=self.key
            )
        return linear_of_masks(self.x, w_eff, self.bias, False), penalty


CONTENDERS: tuple[type[Contender], ...] = (
    EagerGumbel, CompiledGumbel, Plain, OursGumbel, OursTriton, OursTogether,
)  # fmt: skip


def truth(case: Case, kind: SampledKind, draws_from: Backend) -> dict[str, Tensor]:
    """Output and gradients in fp64, with the masks of the backend's thresholds: straight through each sample."""
    x, weight, scores = (t.double() for t in (case.x, case.weight, case.scores))
    assert case.grad_out is not None
    beta = torch.tensor(case.beta, device=x.device)
    thresholds = draws_from.keep_thresholds(case.scores, beta, kind)
    if thresholds is None:
        thresholds = keep_thresholds(case.scores, beta)
    bias = None if case.bias is None else case.bias.double()
    outs, grads_x, grad_scores = [], [], torch.full_like(scores, case.grad_penalty * case.beta)
    parts = zip(x.chunk(kind.samples), case.grad_out.double().chunk(kind.samples), kind.each(), strict=True)
    for part, grad, one in parts:
        w_eff = weight * (one.draws(case.scores) < thresholds.to(torch.int32))
        outs.append(F.linear(part, w_eff, bias))
        grads_x.append(grad @ w_eff)
        grad_scores += grad.mT @ part * weight * slopes(one, case.scores, case.beta)[0][0]
    return {"out": torch.cat(outs), "grad_x": torch.cat(grads_x), "grad_scores": grad_scores}


def gate(contender: OursGumbel, kind: SampledKind) -> float:
    """Its worst ||error|| / ||true|| of output and gradients, in multiples of 16 unit roundoffs of x's dtype; what is
    true has the masks of ``kind``."""
    contender.forward_backward()
    true = truth(contender.case, kind, contender.chosen)
    out, worst = contender.forward()[0], 0.0
    for name, value in {"out": out, "grad_x": contender.x.grad, "grad_scores": contender.trained.grad}.items():
        assert value is not None
        error = (value.detach().double() - true[name]).norm() / true[name].norm()
        ratio = error.item() / (16 * UNIT_ROUNDOFF[contender.x.dtype])
        worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst


def run_layer(case: LayerCase, settings: Settings, ceilings: Ceilings) -> list[Row]:
    """Rows of one layer with NUM_MASKS sampled masks beside eager ones, compiled ones, and no mask."""
    inputs, name = case.build(settings.device), case.name.replace("linear", f"gumbel{NUM_MASKS}")
    contenders: list[Contender] = []
    gates: dict[str, float | None] = {}
    for kind in CONTENDERS:
        if kind is CompiledGumbel and "compile" not in settings.baselines:
            continue
        try:
            made = kind(inputs)
            made.forward_backward()  # compiles, too
            gates[made.name] = gate(made, made.kind) if isinstance(made, OursGumbel) else None
            contenders.append(made)
        except Skipped as reason:
            settings.say(f"left out {kind.name}: {reason}")
        except Exception as error:
            settings.broke(name)(kind.name, error)
    kept = {c.name: (memory.kept_bytes(c), memory.peak_bytes(c)) for c in contenders}
    by_name, rows = {c.name: c for c in contenders}, []

    def check(of: str) -> None:
        if by_name[of].optimizer is not None:
            check_capturable(by_name[of].optimizer)

    for phase, mode in itertools.product(PHASES, settings.modes):
        functions = {c.name: getattr(c, phase) for c in contenders}
        leaves = {c.name: c.leaves() for c in contenders}
        timed = in_mode(mode, functions, f"{name} {phase}", settings, leaves.__getitem__, check)
        timings = time_interleaved(timed, settings.device, settings.timing)
        for contender in timings:
            row = make_row("layers", name, phase, contender, mode, timings)
            row.gate, row.note = gates[contender], by_name[contender].note()
            row.kept_mb, row.peak_mb = (number / 2**20 for number in kept[contender])
            row.kept_weights = kept[contender][0] / inputs.weight.nbytes
            products = 1 if phase == "forward" else 3
            set_floor(
                row, ceilings, products * case.product_flops(), case.fewest_bytes(phase), DTYPES[case.dtype],
                case.working_set(phase),
            )  # fmt: skip
            rows.append(row)
        free_memory(settings.device)
    return rows


# --- the passes over memory ------------------------------------------------------------------------------------------

BYTES = {"keep_thresholds": (6, 0), "sampled_weights": (4, 2), "sampled_grad_scores": (14, 2)}  # a weight; and mask


def pass_functions(n: int, k: int, device: str, backend: Backend) -> dict[str, Callable[[], object]]:
    """Each pass over NUM_MASKS masks of one bf16 weight [N, K], in one call and in a call for each mask ("_apart")."""
    randn, kind = Inputs(device, 0), Gumbel(samples=NUM_MASKS).at(torch.tensor([1, 0], device=device))
    weight, scores, beta = randn((n, k), torch.bfloat16), randn((n, k)), randn.number(BETA)
    w_eff, each = torch.empty(NUM_MASKS, n, k, dtype=torch.bfloat16, device=device), kind.each()
    grads, grad_scores = randn((NUM_MASKS, n, k), torch.bfloat16), torch.zeros_like(scores)
    thresholds = backend.keep_thresholds(scores, beta, kind)
    given = weight, scores, thresholds, beta

    def weights_apart() -> None:
        for one, out in zip(each, w_eff, strict=True):
            backend.sampled_weight(*given, one, out)

    def grads_apart() -> None:
        for one, grad in zip(each, grads, strict=True):
            backend.sampled_grad_scores_(grad_scores, grad, weight, scores, beta, one)

    whole = functools.partial(backend.sampled_grad_scores_of_all_, grad_scores, grads, weight, scores, beta, kind)
    return {
        "keep_thresholds": lambda: backend.keep_thresholds(scores, beta, kind),
        "sampled_weights": lambda: backend.sampled_weights(*given, kind, w_eff), "sampled_weights_apart": weights_apart,
        "sampled_grad_scores": whole, "sampled_grad_scores_apart": grads_apart,
    }  # fmt: skip


def run_passes(n: int, k: int, settings: Settings, ceilings: Ceilings, backends: tuple[Backend, ...]) -> list[Row]:
    """Rows of the passes on each backend; ceiling_fraction is the fraction of the copy bandwidth of this run."""
    case, rows = f"gumbel{NUM_MASKS}_{n}x{k}_passes", []
    functions = {
        f"ours_{op}_{backend.name}": function
        for backend in backends for op, function in pass_functions(n, k, settings.device, backend).items()
    }  # fmt: skip
    for mode in settings.modes:
        timings = time_interleaved(in_mode(mode, functions, case, settings), settings.device, settings.timing)
        for name in timings:
            op, _, _ = name.removeprefix("ours_").replace("_apart", "").rpartition("_")
            fixed, per_mask = BYTES[op]
            num_calls = NUM_MASKS if "_apart" in name else 1
            row = make_row("kernels", case, "forward", name, mode, timings)
            set_floor(row, ceilings, 0.0, n * k * (fixed * num_calls + per_mask * NUM_MASKS), torch.bfloat16)
            rows.append(row)
    return rows
