"""What the elementwise kernels need around them: memory, tables of addresses, launches. products.py has the rest."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ...capturing import capture_number, keep_if_captured, memory_number
from ...masks import MaskKind
from ..base import KIND_CODES, AdamW, Backend, gradients_wanted, numbers_of_entries
from ..layout import aligned, is_dense, with_strides_of
from . import configs, rules
from .elementwise import (
    add_penalty_grad_kernel,
    add_up_kernel,
    effective_weight_kernel,
    effective_weights_kernel,
    grad_scores_kernel,
    grad_scores_of_many_kernel,
)
from .mask_adamw import mask_adamw_kernel, mask_adamw_of_many_kernel
from .units import effective_weight_unit_kernel, finish_scores_kernel, score_sums_kernel

TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
IS_INTERPRETED = isinstance(effective_weight_kernel, InterpretedFunction)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def _on_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers; to a GPU without waiting for it."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@functools.lru_cache(maxsize=64)
def _addresses(addresses: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """A table of addresses (the last number of a row: how many weights). Kept, because a model's addresses stay: no
    copy to the device per step, none in a captured CUDA graph."""
    return _on_device(addresses, torch.int64, device)


@functools.lru_cache(maxsize=64)
def _blocks(runs: tuple[tuple[int, int], ...], block: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Which block is whose, from which element on, and whose partials are where (see add_up_kernel), for runs of so
    many weights and so many tensors: those of a run take turns, block by block."""
    owner, first, places = [], [], []
    for num, count in runs:
        starts, tensor, begin = range(0, num, block), len(places), len(owner)
        owner += list(range(tensor, tensor + count)) * len(starts)
        first += [start for start in starts for _ in range(count)]
        places += [(begin + i, len(starts), count) for i in range(count)]
    return (
        _on_device(owner, torch.int32, device), _on_device(first, torch.int64, device),
        _on_device(places, torch.int64, device),
    )


def _table(
    addresses: tuple[tuple[int, ...], ...], weight_at: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernels for many tensors read. weight_at: the column of weights' addresses; consecutive tensors over one
    weight are a run."""
    table = _addresses(addresses, device)
    runs = itertools.groupby(addresses, key=lambda row: (row[weight_at], row[-1]))
    blocks = _blocks(tuple((num, len(list(run))) for (_, num), run in runs), configs.ELEMENTWISE.block, device)
    keep_if_captured(table, *blocks)
    return table, *blocks


@functools.lru_cache(maxsize=64)
def _values(values: tuple[float, ...], device: torch.device) -> Tensor:
    return _on_device(values, torch.float32, device)


def _places_of_numbers(values: list[float | Tensor], device: torch.device) -> tuple[list[int], float, list[Tensor]]:
    """Where the kernel finds a number of each tensor: (addresses, the number where these are 0, what must live until
    the launch)."""
    numbers = tuple(0.0 if isinstance(value, Tensor) else float(value) for value in values)
    are_tensors = [isinstance(value, Tensor) for value in values]
    if not any(are_tensors) and len(set(numbers)) == 1:
        return [0] * len(values), numbers[0], []
    table = None if all(are_tensors) else _values(numbers, device)
    kept = [
        value.to(torch.float32) if isinstance(value, Tensor) else table[i]  # pyright: ignore[reportOptionalSubscript]
        for i, value in enumerate(values)
    ]
    return [tensor.data_ptr() for tensor in kept], 0.0, kept


@functools.lru_cache(maxsize=64)
def _index(members: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(members, device=device)


def step_arguments(
    beta: Tensor, next_beta: Tensor, kind: MaskKind, numbers: AdamW
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the kernels of a step get last: (numbers, beta, next_beta, lr, lam), and how they read these."""
    lr, lam, beta1, beta2 = numbers.lr, numbers.lam, numbers.beta1, numbers.beta2
    logarithms = (math.log2(value) if value else -1e4 for value in (beta1, beta2))
    values = 1 - beta1, beta2, 1 - beta2, *logarithms, numbers.eps, numbers.weight_decay
    flags = {"READS_LR": isinstance(lr, Tensor), "READS_LAM": isinstance(lam, Tensor)}
    return (values, beta, next_beta, lr, lam), flags | {"KIND": KIND_CODES[kind.name]}


_loaded: set[tuple[Any, ...]] = set()  # kernels for one tensor that ran beside those for many


class _Unit:
    """Coarse scores over a dense weight, as the kernels of units.py see them."""

    def __init__(self, weight: Tensor, scores: Tensor) -> None:
        order = sorted(range(weight.dim()), key=weight.stride, reverse=True)
        self.order, self.given = order, scores
        sizes = [1] * (4 - len(order)) + [weight.shape[d] for d in order]
        counts = [1] * (4 - len(order)) + [scores.shape[d] for d in order]
        groups = [size // count for size, count in zip(sizes, counts, strict=True)]
        self.geometry = (*sizes[1:], *groups)
        self.per_score = weight.numel() // scores.numel()
        self.scores = scores.detach().permute(order).contiguous()

    def as_given(self, values: Tensor) -> Tensor:
        """A tensor like self.scores, in the dimensions and strides of the scores that were given."""
        inverse = [self.order.index(d) for d in range(len(self.order))]
        return torch.empty_like(self.given).copy_(values.view(self.scores.shape).permute(inverse))


class TritonElementwise(Backend):
    """The elementwise methods of TritonBackend (what that refuses does not come here)."""

    name = "triton"

    # --- elementwise ----------------------------------------------------------------------------------------------

    def effective_weight(
        self, weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind, dtype: torch.dtype,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not is_dense(weight):
            weight = weight.contiguous()
        scores = aligned(weight, scores)
        fits = out is not None and out[0].stride() == weight.stride()
        w_eff = out[0] if out is not None and fits else torch.empty_like(weight, dtype=dtype)
        penalty = torch.zeros_like(beta) if out is None else out[1]
        num, config = weight.numel(), configs.ELEMENTWISE
        if num:
            partials = beta.new_empty(triton.cdiv(num, config.block))
            if scores.shape == weight.shape:
                kernel, arguments = effective_weight_kernel, (weight, scores, beta, w_eff, partials, num)
            else:
                unit = _Unit(weight, scores)
                kernel = effective_weight_unit_kernel
                arguments = weight, unit.scores, beta, w_eff, partials, num, *unit.geometry
            with on_device_of(weight):
                kernel[(len(partials),)](*arguments, KIND_CODES[kind.name], config.block, num_warps=config.num_warps)
            torch.sum(partials, 0, out=penalty)
        else:
            penalty.zero_()
        if out is not None:
            out[0].copy_(w_eff) if not fits else torch.autograd.graph.increment_version(w_eff)
        return (w_eff, penalty) if out is None else out

    def effective_weights(
        self, weights: list[Tensor], scores: list[Tensor], beta: Tensor, kind: MaskKind, dtypes: list[torch.dtype],
        out: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        weights = [w if is_dense(w) else w.contiguous() for w in weights]
        scores = [aligned(w, s) for w, s in zip(weights, scores, strict=True)]
        w_effs = [torch.empty_like(w, dtype=d) for w, d in zip(weights, dtypes, strict=True)] if out is None else [
            o if o.stride() == w.stride() else torch.empty_like(w, dtype=o.dtype)
            for o, w in zip(out, weights, strict=True)
        ]  # fmt: skip
        penalties = beta.new_zeros(len(weights))
        groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
        for i, (weight, w_eff) in enumerate(zip(weights, w_effs, strict=True)):
            if scores[i].shape != weight.shape:
                self.effective_weight(weight, scores[i], beta, kind, w_eff.dtype, (w_eff, penalties[i]))
            elif weight.numel():
                groups.setdefault((weight.dtype, w_eff.dtype), []).append(i)
        for (w_dtype, o_dtype), members in groups.items():
            if (what := (w_dtype, o_dtype, kind.name)) not in _loaded and not capture_number(beta):
                # a capture by somebody else goes tensor by tensor, and can't load the kernel for that
                _loaded.add(what)
                self.effective_weight(weights[members[0]], scores[members[0]], beta, kind, o_dtype)
            sums = self._launch_many(
                [weights[i] for i in members], [scores[i] for i in members], [w_effs[i] for i in members], beta, kind,
                w_dtype, o_dtype,
            )  # fmt: skip
            if len(members) == len(weights):
                penalties = sums
            else:
                index = _index(tuple(members), beta.device)
                keep_if_captured(index)
                penalties.index_copy_(0, index, sums)
        if out is not None:
            for given, made in zip(out, w_effs, strict=True):
                given.copy_(made) if given is not made else torch.autograd.graph.increment_version(given)
            return out, penalties
        return w_effs, penalties

    def _launch_many(
        self, weights: list[Tensor], scores: list[Tensor], w_effs: list[Tensor], beta: Tensor, kind: MaskKind,
        w_dtype: torch.dtype, o_dtype: torch.dtype,
    ) -> Tensor:
        config = configs.ELEMENTWISE
        addresses = tuple(
            (w.data_ptr(), s.data_ptr(), o.data_ptr(), w.numel())
            for w, s, o in zip(weights, scores, w_effs, strict=True)
        )
        table, owner, first, places = _table(addresses, 0, beta.device)
        is_aligned = all(number % 16 == 0 for row in addresses for number in row)
        partials = beta.new_empty(len(owner))
        with on_device_of(beta):
            effective_weights_kernel[(len(owner),)](
                table, owner, first, beta, partials, TL_DTYPES[w_dtype], TL_DTYPES[o_dtype], KIND_CODES[kind.name],
                is_aligned, config.block, num_warps=config.num_warps,
            )  # fmt: skip
            return self._add_up(partials, places)

    def grad_scores(
        self, grad_w_eff: Tensor | None, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor, beta: Tensor,
        kind: MaskKind, needs_scores: bool, needs_weight: bool, may_overwrite: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        wants_scores, wants_weight = gradients_wanted(kind, grad_w_eff, grad_penalty, needs_scores, needs_weight)
        if not wants_scores and not wants_weight:
            return None, None
        if not is_dense(weight):
            weight = weight.contiguous()
        if grad_w_eff is not None:
            grad_w_eff = with_strides_of(weight, grad_w_eff)
        if scores.shape != weight.shape:
            return (
                self._unit_grad_scores(grad_w_eff, grad_penalty, weight, scores, beta, kind) if wants_scores else None,
                self.effective_weight(grad_w_eff, scores, beta, kind, weight.dtype)[0] if wants_weight else None,
            )
        given, scores = scores, aligned(weight, scores)
        can_reuse = may_overwrite and grad_w_eff is not None and grad_w_eff.dtype == scores.dtype
        grad_scores = grad_w_eff if can_reuse else torch.empty_like(scores)
        assert grad_scores is not None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        num, config = weight.numel(), configs.ELEMENTWISE
        if num:
            with on_device_of(weight):
                grad_scores_kernel[(triton.cdiv(num, config.block),)](
                    scores if grad_w_eff is None else grad_w_eff, beta if grad_penalty is None else grad_penalty,
                    weight, scores, beta, grad_scores, weight if grad_weight is None else grad_weight, num,
                    grad_w_eff is not None, grad_penalty is not None, wants_scores, wants_weight,
                    KIND_CODES[kind.name], config.block, num_warps=config.num_warps,
                )  # fmt: skip
        if wants_scores and given is not scores:  # back to the strides that the caller's scores have
            grad_scores = torch.empty_like(given).copy_(grad_scores)
        return grad_scores if wants_scores else None, grad_weight

    def grad_scores_of_many(
        self, grad_w_effs: list[Tensor], grad_penalties: list[Tensor | None], weights: list[Tensor],
        scores: list[Tensor], beta: Tensor, kind: MaskKind, out: list[Tensor] | None = None,
    ) -> list[Tensor]:
        if memory_number(beta):  # in a graph, or its warm-up: gradients have other addresses in the capture than before
            return super().grad_scores_of_many(grad_w_effs, grad_penalties, weights, scores, beta, kind, out)
        given = list(zip(grad_w_effs, grad_penalties, weights, scores, strict=True))
        made: dict[int, Tensor] = {}
        groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
        for i, (grad, _, weight, score) in enumerate(given):
            is_flat = is_dense(weight) and score.shape == weight.shape and score.stride() == weight.stride()
            if is_flat and weight.numel():
                groups.setdefault((grad.dtype, weight.dtype), []).append(i)
            else:
                made[i] = super().grad_scores_of_many(*([part] for part in given[i]), beta, kind)[0]
        for (g_dtype, w_dtype), members in groups.items():
            grads = [with_strides_of(weights[i], grad_w_effs[i]) for i in members]  # alive until the launch
            for i in members:
                is_into = out is not None and out[i].stride() == scores[i].stride()
                made[i] = out[i] if out is not None and is_into else torch.empty_like(scores[i])
            addresses = tuple(
                (
                    grad.data_ptr(), weights[i].data_ptr(), scores[i].data_ptr(), made[i].data_ptr(),
                    0 if (penalty := grad_penalties[i]) is None else penalty.data_ptr(), weights[i].numel(),
                )
                for grad, i in zip(grads, members, strict=True)
            )  # fmt: skip
            table, owner, first, _ = _table(addresses, 1, beta.device)
            is_aligned = all(number % 16 == 0 for row in addresses for number in (*row[:4], row[5]))
            with on_device_of(beta):
                grad_scores_of_many_kernel[(len(owner),)](
                    table, owner, first, beta, TL_DTYPES[g_dtype], TL_DTYPES[w_dtype], KIND_CODES[kind.name],
                    is_aligned, configs.ELEMENTWISE.block, num_warps=configs.ELEMENTWISE.num_warps,
                )  # fmt: skip
        if out is None:
            return [made[i] for i in range(len(given))]
        for i, into in enumerate(out):
            into.copy_(made[i]) if made[i] is not into else torch.autograd.graph.increment_version(into)
        return out

    def _unit_grad_scores(
        self, grad_w_eff: Tensor | None, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor, beta: Tensor,
        kind: MaskKind,
    ) -> Tensor:
        if not weight.numel():
            return torch.zeros_like(scores)
        unit, config = _Unit(weight, scores), configs.ELEMENTWISE
        num, per_score = scores.numel(), unit.per_score
        num_parts, per_part = rules.score_parts(num, per_score, rules.chip(weight.device).num_processors)
        sums = beta.new_empty(num_parts if grad_w_eff is not None else 0, num)
        grad_scores = torch.empty_like(unit.scores)
        with on_device_of(weight):
            if grad_w_eff is not None:
                score_sums_kernel[(num, num_parts)](
                    grad_w_eff, weight, sums, num, *unit.geometry, per_score, per_part, configs.SCORE_SUMS.block,
                    num_warps=configs.SCORE_SUMS.num_warps,
                )  # fmt: skip
            finish_scores_kernel[(triton.cdiv(num, config.block),)](
                sums, beta if grad_penalty is None else grad_penalty, unit.scores, beta, grad_scores, num, len(sums),
                float(per_score), grad_penalty is not None, KIND_CODES[kind.name], config.block,
                num_warps=config.num_warps,
            )  # fmt: skip
        return unit.as_given(grad_scores)

    def add_penalty_grad_(
        self, grads: list[Tensor], scores: list[Tensor], weights_per_score: list[int], beta: Tensor,
        lam: float | Tensor, kind: MaskKind,
    ) -> None:
        config = configs.ELEMENTWISE
        on_device = lam.to(torch.float32) if isinstance(lam, Tensor) else None
        for grad, score, count in zip(grads, scores, weights_per_score, strict=True):
            if not grad.numel():
                continue
            dense = grad if is_dense(grad) else grad.contiguous()
            with on_device_of(grad):
                add_penalty_grad_kernel[(triton.cdiv(grad.numel(), config.block),)](
                    dense, aligned(dense, score), beta, beta if on_device is None else on_device,
                    lam * count if on_device is None else float(count), grad.numel(), on_device is not None,
                    KIND_CODES[kind.name], config.block, num_warps=config.num_warps,
                )  # fmt: skip
            grad.copy_(dense) if dense is not grad else torch.autograd.graph.increment_version(grad)

    # --- optimizer ------------------------------------------------------------------------------------------------

    def mask_adamw_(
        self, scores: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
        steps: list[Tensor], weights: list[Tensor], slots: list[tuple[Tensor, Tensor] | None], beta: Tensor,
        next_beta: Tensor, kind: MaskKind, numbers: AdamW | Sequence[AdamW],
        grad_penalties: list[Tensor | None] | None = None,
    ) -> None:
        each = numbers_of_entries(numbers, len(scores))
        groups: dict[tuple[torch.dtype, torch.dtype | None, torch.dtype, torch.dtype], list[int]] = {}
        for i, (weight, slot) in enumerate(zip(weights, slots, strict=True)):
            if weight.numel():
                dtypes = weight.dtype, None if slot is None else slot[0].dtype, grads[i].dtype, exp_avgs[i].dtype
                groups.setdefault(dtypes, []).append(i)
            elif slot is not None:
                slot[1].zero_()
        common = {"OF_W_EFF": grad_penalties is not None, "BLOCK": configs.ELEMENTWISE.block}
        options = {"num_warps": configs.ELEMENTWISE.num_warps}
        for (w_dtype, o_dtype, g_dtype, m_dtype), members in groups.items():
            tensors = [
                (scores[i], grads[i], exp_avgs[i], exp_avg_sqs[i], weights[i],
                 weights[i] if (slot := slots[i]) is None else slot[0], steps[i]) for i in members
            ]  # fmt: skip
            penalties = [None if grad_penalties is None else grad_penalties[i] for i in members]
            common["WRITES"] = o_dtype is not None
            # no table where gradients have new addresses at each step: in a graph (see grad_scores_of_many), and in a
            # backward pass, which steps a layer at a time
            is_alone = len(members) == 1 and grad_penalties is not None
            with on_device_of(beta):
                if memory_number(beta) or is_alone:
                    sums = []
                    for i, given, penalty in zip(members, tensors, penalties, strict=True):
                        num = given[0].numel()
                        partials = beta.new_empty(triton.cdiv(num, common["BLOCK"]))
                        rest, flags = step_arguments(beta, next_beta, kind, each[i])
                        mask_adamw_kernel[(len(partials),)](
                            *given[:6], partials, given[6], beta if penalty is None else penalty, num, *rest,
                            HAS_PENALTY=penalty is not None, **flags, **common, **options,
                        )  # fmt: skip
                        if o_dtype is not None:
                            sums.append(partials.sum(dtype=torch.float64))  # as _add_up does
                else:
                    lrs_at, lr, lrs = _places_of_numbers([each[i].lr for i in members], beta.device)
                    lams_at, lam, lams = _places_of_numbers([each[i].lam for i in members], beta.device)
                    addresses = tuple(
                        (*(tensor.data_ptr() for tensor in given), 0 if penalty is None else penalty.data_ptr(),
                         lr_at, lam_at, given[0].numel())
                        for given, penalty, lr_at, lam_at in zip(tensors, penalties, lrs_at, lams_at, strict=True)
                    )  # fmt: skip
                    table, owner, first, places = _table(addresses, 4, beta.device)
                    is_aligned = all(number % 16 == 0 for row in addresses for number in (*row[:6], row[-1]))
                    partials = beta.new_empty(len(owner))
                    rest, flags = step_arguments(beta, next_beta, kind, each[members[0]])
                    self._load_for_captures(tensors[0], penalties, partials, rest, flags | common, options)
                    mask_adamw_of_many_kernel[(len(owner),)](
                        table, owner, first, partials, *rest[:-2], lr, lam, TL_DTYPES[g_dtype], TL_DTYPES[m_dtype],
                        TL_DTYPES[w_dtype], TL_DTYPES[o_dtype or w_dtype], KIND=flags["KIND"], IS_ALIGNED=is_aligned,
                        **common, **options,
                    )  # fmt: skip
                    del lrs, lams
                    sums = [] if o_dtype is None else list(self._add_up(partials, places).unbind())
            written = [slot for i in members if (slot := slots[i]) is not None]
            if written:
                torch._foreach_copy_([penalty for _, penalty in written], sums)  # pyright: ignore
                torch.autograd.graph.increment_version([w_eff for w_eff, _ in written])
        torch.autograd.graph.increment_version([*scores, *exp_avgs, *exp_avg_sqs])

    @staticmethod
    def _load_for_captures(
        tensors: tuple[Tensor, ...], penalties: list[Tensor | None], partials: Tensor, rest: tuple[Any, ...],
        flags: dict[str, Any], options: dict[str, int],
    ) -> None:
        """A capture by somebody else goes tensor by tensor and can't load the kernel for that: run it once, on none of
        the weights, for sizes that are multiples of 16 and others."""
        for has_penalty in {penalty is not None for penalty in penalties}:
            what = (*(t.dtype for t in tensors), has_penalty, *flags.values())
            if what not in _loaded:
                _loaded.add(what)
                for num in (0, -1):
                    mask_adamw_kernel[(1,)](
                        *tensors[:6], partials, tensors[6], rest[1], num, *rest, HAS_PENALTY=has_penalty, **flags,
                        **options,
                    )  # fmt: skip

    @staticmethod
    def _add_up(partials: Tensor, places: Tensor) -> Tensor:
        """The sum of each tensor's partial sums: [tensors]."""
        sums = partials.new_empty(len(places))
        config = configs.ADD_UP
        add_up_kernel[(len(sums),)](partials, places, sums, config.block, num_warps=config.num_warps)
        return sums
