"""What gpu_check checks of several masks over one weight, and how fast they are beside one call a mask.

Masks of one weight are consecutive entries of the calls for many tensors. Every check draws fresh inputs from the seed,
fills outputs with NaN and returns its worst error as a multiple of the allowed one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from subnet_kernels import testing
from subnet_kernels.backends.base import AdamW, Backend

from .gpu_correctness import effective_weights_error
from .gpu_cuda import DTYPES, HARD, KIND, Check, Inputs, equal_error, worst_ratio

GROUPS = (1, 3, 8)
SHAPES = ((33, 131), (1,), (0, 5), (4097,))  # of weights that several masks share: more than a block, odd, empty
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


def checks(
    device: str, seed: int, backend: Backend, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> Iterator[Check]:
    """All of them on one backend."""
    yield from effective_weights_checks(device, seed, backend, shapes)
    yield from grad_scores_checks(device, seed, backend, shapes)
    yield from step_checks(device, seed, backend, shapes)
    yield from training_checks(device, seed, backend)
