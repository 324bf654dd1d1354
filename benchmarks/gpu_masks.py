"""What gpu_check checks of several masks over one weight, and how fast they are beside one call a mask.

Masks of one weight are consecutive entries of the calls for many tensors. Every check draws fresh inputs from the seed,
fills outputs with NaN and returns its worst error as a multiple of the allowed one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from subnet_kernels import testing
from subnet_kernels.backends.base import AdamW, Backend

from .ceilings import Ceilings
from .gpu_correctness import effective_weights_error
from .gpu_cuda import DTYPES, HARD, KIND, Check, Inputs, equal_error, worst_ratio
from .rows import Row
from .runner import Settings, in_mode, make_row, set_floor
from .timing import time_interleaved

GROUPS = (1, 3, 8)
SHAPES = ((33, 131), (1,), (0, 5), (4097,))  # of weights that several masks share: more than a block, odd, empty
PRODUCTS = ((33, 65, 129), (1, 1, 1), (70, 48, 80), (1500, 512, 128))  # M, N, K
ALONE = ((7, 1), (65, 129))  # and of weights between them that have one


def _entries(
    num_masks: int, dtype: torch.dtype, randn: Inputs, shapes: Sequence[tuple[int, ...]]
) -> tuple[list[Tensor], list[Tensor]]:
    """(weights, scores) of the entries: runs of ``num_masks`` over one weight, between weights with one mask; scores of
    a run lie together."""
    weights, scores = [], []
    for i, shape in enumerate(shapes):
        masks = randn((num_masks, *shape))
        weights += [randn(shape, dtype)] * num_masks
        scores += list(masks.unbind())
        single = ALONE[i % len(ALONE)]
        weights.append(randn(single, dtype))
        scores.append(randn(single))
    return weights, scores


def numbers_of(num: int, form: str, device: str) -> tuple[AdamW | list[AdamW], list[AdamW]]:
    """(numbers of the entries as they are given, the same as floats). form: "one", or of each entry as "numbers",
    "tensors" (places in one tensor) or "mixed"."""
    if form == "one":
        return testing.STEP, [testing.STEP] * num
    lrs, lams = torch.linspace(0.01, 0.05, num), torch.linspace(0.0, 0.4, num)
    true = [testing.STEP._replace(lr=lr.item(), lam=lam.item()) for lr, lam in zip(lrs, lams, strict=True)]
    if form == "numbers":
        return true, true
    lrs, lams = lrs.to(device), lams.to(device)
    of_tensors = [one._replace(lr=lrs[i], lam=lams[i]) for i, one in enumerate(true)]
    if form == "mixed":
        of_tensors[::2] = [one._replace(lam=lams[2 * i]) for i, one in enumerate(true[::2])]
    return of_tensors, true


def effective_weights_checks(
    device: str, seed: int, backend: Backend, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> Iterator[Check]:
    """Effective weights and mask sums of runs: against fp64, those of one call a mask and those of a second run to the
    bit."""
    beta = torch.tensor(testing.STEP_BETA, device=device)
    for num_masks in GROUPS:
        for name, dtype in DTYPES.items():
            weights, scores = _entries(num_masks, dtype, Inputs(device, seed), shapes)
            for kind in (KIND, HARD):
                runs = []
                for _ in range(2):
                    out = [torch.full_like(w, float("nan")) for w in weights]
                    dtypes = [dtype] * len(weights)
                    runs.append(backend.effective_weights(weights, scores, beta, kind, dtypes, out))
                worst = effective_weights_error(weights, scores, testing.STEP_BETA, kind, *runs[0])
                pairs = list(zip([*runs[0][0], runs[0][1]], [*runs[1][0], runs[1][1]], strict=True))
                for w, s, w_eff, penalty in zip(weights, scores, *runs[0], strict=True):
                    made, total = backend.effective_weights([w], [s], beta, kind, [dtype])
                    pairs += [(w_eff, made[0]), (penalty, total[0])]
                what = f"{backend.name}, {num_masks} masks, effective weights, {kind.name}, {name}"
                yield what, worst
                yield f"{what}, to the bit", equal_error(pairs)


def grad_scores_checks(
    device: str, seed: int, backend: Backend, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> Iterator[Check]:
    """Score gradients of runs, each with its own gradient of the penalty or none, into memory that is given."""
    beta, u = torch.tensor(testing.STEP_BETA, device=device), testing.UNIT_ROUNDOFF[torch.float32]
    for num_masks in GROUPS:
        for name, dtype in DTYPES.items():
            randn = Inputs(device, seed)
            weights, scores = _entries(num_masks, dtype, randn, shapes)
            grads = [randn(tuple(w.shape), dtype) for w in weights]
            lams = torch.linspace(0.1, 0.9, len(weights), device=device)
            penalties = [None if i % 4 == 3 else lam for i, lam in enumerate(lams)]
            out = [torch.full_like(s, float("nan")) for s in scores]
            given = [grad.clone() for grad in grads]
            made = backend.grad_scores_of_many(given, penalties, weights, scores, beta, KIND, out)
            worst = 0.0 if all(m is o for m, o in zip(made, out, strict=True)) else float("inf")
            pairs = []
            for grad, lam, w, s, ds in zip(grads, penalties, weights, scores, out, strict=True):
                slope, product = KIND.slope(s.double(), testing.STEP_BETA), grad.double() * w.double()
                push = 0.0 if lam is None else lam.item()
                bound = 8 * u * (product.abs() + push) * slope * (1 + testing.STEP_BETA * s.double().abs())
                worst = max(worst, worst_ratio(ds, (product + push) * slope, bound))
                pairs.append((ds, backend.grad_scores_of_many([grad.clone()], [lam], [w], [s], beta, KIND)[0]))
            what = f"{backend.name}, {num_masks} masks, score gradients, {name}"
            yield what, worst
            yield f"{what}, to the bit", equal_error(pairs)


def stepped(
    backend: Backend, before: list[testing.Stepped], grads: list[Tensor], lams: list[Tensor] | None,
    numbers: AdamW | list[AdamW], parts: Sequence[Sequence[int]],
) -> list[testing.Stepped]:
    """What ``before`` becomes by one step of it, in a call for each of ``parts``."""
    beta, next_beta = (torch.tensor(value, device=grads[0].device) for value in (testing.STEP_BETA, testing.NEXT_BETA))
    after = [replace(state.map(lambda t: t), weight=state.weight) for state in before]
    for part in parts:
        scores, exp_avgs, exp_avg_sqs, steps, weights, slots = (
            [getattr(after[i], field.name) for i in part] for field in fields(testing.Stepped)
        )
        backend.mask_adamw_(
            scores, [grads[i] for i in part], exp_avgs, exp_avg_sqs, steps, weights, slots, beta, next_beta, KIND,
            numbers if isinstance(numbers, AdamW) else [numbers[i] for i in part],
            None if lams is None else [lams[i] for i in part],
        )  # fmt: skip
    return after


def step_checks(
    device: str, seed: int, backend: Backend, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> Iterator[Check]:
    """Steps of runs with numbers of their own, in every form: against fp64, and those of one call a mask to the bit."""
    cases = [(n, form, "fp32", "fp32", False) for n in GROUPS for form in ("one", "numbers", "tensors", "mixed")]
    cases += [(3, "tensors", name, "bf16", True) for name in DTYPES]
    for num_masks, form, name, moments, of_w_eff in cases:
        randn, dtype = Inputs(device, seed), DTYPES[name]
        before = []
        for i, (w, s) in enumerate(zip(*_entries(num_masks, dtype, randn, shapes), strict=True)):
            kept = None if i % 5 == 4 else dtype
            made = testing.stepped(tuple(w.shape), 1 + i, dtype, DTYPES[moments], kept, seed + i, device)
            before.append(replace(made, weight=w, scores=s))
        grads = [randn(tuple(old.weight.shape), dtype if of_w_eff else torch.float32) for old in before]
        lams = list(torch.linspace(0.1, 0.9, len(before), device=device)) if of_w_eff else None
        numbers, true = numbers_of(len(before), form, device)
        together = stepped(backend, before, grads, lams, numbers, [range(len(before))])
        apart = stepped(backend, before, grads, lams, numbers, [[i] for i in range(len(before))])
        worst, pairs = 0.0, []
        for i, (old, new, alone) in enumerate(zip(before, together, apart, strict=True)):
            truth = (grads[i].double(), 0.0)
            if lams is not None:
                truth = testing.grad_of_step(old, grads[i], 0.0, lams[i].item())
            worst = max(worst, *testing.worst_step_errors(old, new, *truth, numbers=true[i]).values())
            pairs += zip(new.written(), alone.written(), strict=True)
        what = f"{backend.name}, {num_masks} masks, step, {form}, {name}, moments {moments}"
        yield what, worst
        yield f"{what}, to the bit", equal_error(pairs)


def _by_torch(start: Tensor, grads: list[Tensor], lr: float, lam: float) -> Tensor:
    """The scores after a step of torch.optim.AdamW on each of the gradients, the penalty's added; in start's dtype."""
    param, one = start.clone().requires_grad_(), testing.STEP
    optimizer = torch.optim.AdamW([param], lr, (one.beta1, one.beta2), one.eps, one.weight_decay, foreach=False)
    for grad in grads:
        param.grad = grad.to(start.dtype) + lam * KIND.slope(param.detach(), testing.STEP_BETA)
        optimizer.step()
    return param.detach()


def training_checks(device: str, seed: int, backend: Backend, num_steps: int = 5) -> Iterator[Check]:
    """Several steps of masks of one weight, each with its own lr and lam in tensors [G], beside as many runs of
    torch.optim.AdamW in fp64 on gradients with the penalty's: within twice the error of those in fp32."""
    for num_masks in GROUPS:
        randn = Inputs(device, seed)
        weight, start = randn((40, 41)), randn((num_masks, 40, 41))
        grads = [randn((num_masks, 40, 41)) for _ in range(num_steps)]
        lrs, lams = (torch.linspace(0.01, last, num_masks, device=device) for last in (0.1, 0.5))
        beta, scores, steps = randn.number(testing.STEP_BETA), start.clone(), torch.zeros(num_masks, device=device)
        firsts, seconds = torch.zeros_like(start), torch.zeros_like(start)
        numbers = [testing.STEP._replace(lr=lrs[g], lam=lams[g]) for g in range(num_masks)]
        for grad in grads:
            steps += 1
            state, grads_of, m, v, number = (list(t.unbind()) for t in (scores, grad, firsts, seconds, steps))
            backend.mask_adamw_(
                state, grads_of, m, v, number, [weight] * num_masks, [None] * num_masks, beta, beta, KIND, numbers
            )
        worst = 0.0
        for g in range(num_masks):
            own = [grad[g] for grad in grads], lrs[g].item(), lams[g].item()
            true, eager = _by_torch(start[g].double(), *own), _by_torch(start[g], *own)
            error, size = (eager.double() - true).abs().max().item(), true.abs() + num_steps * lrs[g].item()
            worst = max(worst, worst_ratio(scores[g], true, testing.error_bound(error, size, torch.float32, False)))
        yield f"{backend.name}, {num_masks} masks, {num_steps} steps beside torch.optim.AdamW", worst


class _Product(NamedTuple):
    """Inputs of linear_grad_scores_of_masks; x [G, M, K], or [M, K] for all masks."""

    grad_out: Tensor
    x: Tensor
    grad_penalty: Tensor | None
    weight: Tensor
    scores: Tensor

    def of(self, masks: slice) -> _Product:
        x = self.x[masks] if self.x.dim() == 3 else self.x
        penalty = None if self.grad_penalty is None else self.grad_penalty[masks]
        return self._replace(grad_out=self.grad_out[masks], x=x, grad_penalty=penalty, scores=self.scores[masks])

    def error(self, made: Tensor) -> float:
        """Products of M terms stay in fp32, summed in any order."""
        penalty = 0.0 if self.grad_penalty is None else self.grad_penalty.double()[:, None, None]
        factors = self.grad_out.double().mT, self.x.double()
        z, weight = testing.STEP_BETA * self.scores.double(), self.weight.double()
        slope = KIND.slope(self.scores.double(), testing.STEP_BETA)
        size = (factors[0].abs() @ factors[1].abs() * weight.abs() + penalty) * slope
        bound = (self.x.shape[-2] + 16) * 2.0**-24 * size * (1 + z.abs() / 4) + 1e-28
        return worst_ratio(made, (factors[0] @ factors[1] * weight + penalty) * slope, bound)


def product_checks(
    device: str, seed: int, backend: Any, sizes: Sequence[tuple[int, int, int]] = PRODUCTS,
    groups: Sequence[int] = GROUPS, dtypes: Collection[str] = tuple(DTYPES),
) -> Iterator[Check]:
    """Score gradients of masks of a linear layer inside their batched product: against fp64, and those of one mask at a
    time and of a second run to the bit; rows of each mask and shared ones, odd sizes, transposed weights."""
    beta = torch.tensor(testing.STEP_BETA, device=device)
    for num_masks, name, (m, n, k) in itertools.product(groups, dtypes, sizes):
        randn, dtype = Inputs(device, seed), DTYPES[name]
        own = _Product(
            randn((num_masks, m, n), dtype), randn((num_masks, m, k), dtype),
            torch.linspace(0.1, 0.9, num_masks, device=device), randn((n, k), dtype), randn((num_masks, n, k)),
        )  # fmt: skip
        transposed = own._replace(weight=own.weight.t().contiguous().t(), scores=own.scores.mT.contiguous().mT)
        for form, given in {
            "own rows": own, "shared rows": own._replace(x=own.x[0], grad_penalty=None), "transposed": transposed,
        }.items():  # fmt: skip
            parts = [given, given, *(given.of(slice(g, g + 1)) for g in range(num_masks))]
            made = [backend.linear_grad_scores_of_masks(*part, beta, KIND, is_fused=True) for part in parts]
            what = f"{backend.name}, {num_masks} masks, products {m}x{n}x{k}, {form}, {name}"
            yield what, given.error(made[0])
            is_laid_alike = made[0].stride() == given.scores.stride()
            same = [(made[0], made[1]), (made[0], torch.cat(made[2:]))]
            yield f"{what}, to the bit", equal_error(same) if is_laid_alike else float("inf")


def checks(
    device: str, seed: int, backend: Backend, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> Iterator[Check]:
    """All of them on one backend."""
    yield from effective_weights_checks(device, seed, backend, shapes)
    yield from grad_scores_checks(device, seed, backend, shapes)
    yield from step_checks(device, seed, backend, shapes)
    yield from training_checks(device, seed, backend)


# --- how fast --------------------------------------------------------------------------------------------------------

NUM_MASKS, BATCH = 8, 1024  # masks, and rows of x of each in the product
BYTES = {"effective_weights": 6, "grad_scores_of_many": 10, "mask_adamw": 30}  # a weight and mask, but the bf16 weight


def mask_functions(n: int, k: int, device: str, backend: Backend) -> dict[str, Callable[[slice], object]]:
    """Op -> its call over a part of NUM_MASKS masks of one bf16 weight [N, K]."""
    randn, bf16 = Inputs(device, 0), torch.bfloat16
    weight, scores, grads = randn((n, k), bf16), randn((NUM_MASKS, n, k)), randn((NUM_MASKS, n, k), bf16)
    w_eff, grad_scores = torch.empty_like(grads), torch.zeros_like(scores)
    firsts, seconds = torch.zeros_like(scores), torch.zeros_like(scores)
    beta, steps = randn.number(testing.STEP_BETA), torch.ones(NUM_MASKS, device=device)
    penalties, lams = torch.zeros(NUM_MASKS, device=device), torch.linspace(0.0, 1e-7, NUM_MASKS, device=device)
    numbers = [testing.STEP._replace(lr=1e-4, lam=lam) for lam in lams]
    grad_out, x = randn((NUM_MASKS, BATCH, n), bf16), randn((NUM_MASKS, BATCH, k), bf16)

    def parts(part: slice, *tensors: Tensor) -> tuple[list[Tensor], ...]:
        return tuple(list(tensor[part].unbind()) for tensor in tensors)

    def score_gradients(part: slice, of: Tensor) -> object:
        own, out = parts(part, scores, grad_scores)
        weights, none = [weight] * len(own), [None] * len(own)
        return backend.grad_scores_of_many(list(of.unbind()), [*none], weights, own, beta, KIND, out)

    def effective_weights(part: slice) -> object:
        own, out = parts(part, scores, w_eff)
        return backend.effective_weights([weight] * len(own), own, beta, KIND, [bf16] * len(own), out)

    def mask_adamw(part: slice) -> object:
        own, given, m, v, step, w_effs, sums = parts(
            part, scores, grad_scores, firsts, seconds, steps, w_eff, penalties
        )
        weights, slots = [weight] * len(own), [*zip(w_effs, sums, strict=True)]
        return backend.mask_adamw_(own, given, m, v, step, weights, [*slots], beta, beta, KIND, numbers[part])

    return {
        "effective_weights": effective_weights,
        "grad_scores_of_many": lambda part: score_gradients(part, grads[part]),
        "mask_adamw": mask_adamw,
        "product_and_pass": lambda part: score_gradients(part, torch.bmm(grad_out[part].mT, x[part])),
        "product": lambda part: cast(Any, backend).linear_grad_scores_of_masks(
            grad_out[part], x[part], None, weight, scores[part], beta, KIND, is_fused=True
        ),
    }


def run_masks(n: int, k: int, settings: Settings, ceilings: Ceilings, backends: tuple[Backend, ...]) -> list[Row]:
    """Rows of NUM_MASKS masks in one call ("together") beside a call each ("apart"), per op and backend; the linear
    layer's score gradient also inside its product, by the backend that has one."""
    rows, num = [], n * k
    for backend in backends:
        functions = mask_functions(n, k, settings.device, backend)
        for op in (*BYTES, "product"):
            ways: dict[str, Callable[[], object]] = {}
            if op != "product" or backend.name == "triton":
                ways["together"] = functools.partial(functions[op], slice(None))
            each = functions["product_and_pass" if op == "product" else op]
            ways["apart"] = lambda each=each: [each(slice(g, g + 1)) for g in range(NUM_MASKS)]
            if op == "product":
                ways["bmm_and_pass"] = functools.partial(each, slice(None))
            case = f"{NUM_MASKS}masks_{n}x{k}_{op}_{backend.name}"
            for mode in settings.modes:
                timings = time_interleaved(in_mode(mode, ways, case, settings), settings.device, settings.timing)
                for name in timings:
                    row = make_row("kernels", case, "step" if op == "mask_adamw" else "backward", name, mode, timings)
                    flops = 2.0 * NUM_MASKS * BATCH * num if op == "product" else 0.0
                    num_bytes = num * (2 * (NUM_MASKS if name == "apart" else 1) + NUM_MASKS * BYTES.get(op, 8))
                    set_floor(row, ceilings, flops, num_bytes, torch.bfloat16)
                    rows.append(row)
    return rows
