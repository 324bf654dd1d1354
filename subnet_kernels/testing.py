"""Inputs, truth and the one error bound: what tests and benchmarks hold every backend to.

Truth is the plain expression in fp64. A backend's error per element may be at most ``2*E + 4*u*A`` forward and
``3*E + 8*u*A`` backward: E is the largest error of the plain expression run eagerly in the same dtype on the same
inputs, u the compute dtype's unit roundoff (fp32's for the penalty), A the same op on absolute values in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.base import AdamW
from .masks import MaskKind, Sigmoid, as_kind, expand_scores, weights_per_score
from .ops.checks import is_of_masks

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
GRADIENTS = ("grad_x", "grad_weight", "grad_scores", "grad_bias")


@dataclass
class Case:
    """One call of masked_linear (or masked_conv2d, where ``conv`` has its geometry) with upstream gradients. Scores may
    have a dimension of masks in front."""

    x: Tensor
    weight: Tensor
    scores: Tensor
    beta: float
    bias: Tensor | None = None
    conv: dict[str, Any] | None = None
    kind: str = "sigmoid"
    grad_out: Tensor | None = None
    grad_penalty: float = 0.37
    wanted: tuple[str, ...] = field(default=GRADIENTS)
    shared_input: bool = False

    @property
    def op(self) -> str:
        return "masked_linear" if self.conv is None else "masked_conv2d"

    def tensors(self) -> dict[str, Tensor]:
        named = {"x": self.x, "weight": self.weight, "scores": self.scores, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Case:
        """The same case with ``function(name, tensor)`` for every tensor; strides are kept."""
        new = {name: _keep_strides(tensor, function(name, tensor)) for name, tensor in self.tensors().items()}
        if self.grad_out is not None:
            new["grad_out"] = function("grad_out", self.grad_out)
        return replace(self, **new)


def _keep_strides(like: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(like, dtype=values.dtype, device=values.device).copy_(values)


def linear_case(
    m: int, n: int, k: int, dtype: torch.dtype = torch.float32, *, scores_shape: tuple[int, int] | None = None,
    beta: float = 3.0, bias: bool = True, kind: str = "sigmoid", is_transposed: bool = False, seed: int = 0,
    device: str = "cpu", num_masks: int | None = None, shared_input: bool = False,
) -> Case:
    """Random inputs for masked_linear: x [M, K], weight [N, K], scores spread over both sides of zero. With num_masks:
    scores [G, N, K] and x [G*M, K], or [M, K] if it is shared."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    masks = () if num_masks is None else (num_masks,)
    weight, scores = randn(n, k) / max(k, 1) ** 0.5, randn(*masks, *(scores_shape or (n, k)))
    if is_transposed:
        weight, scores = weight.t().contiguous().t(), scores.mT.contiguous().mT
    rows = m * (num_masks or 1)
    x = randn(m if shared_input else rows, k)
    case = Case(x, weight, scores, beta, randn(n) if bias else None, None, kind, randn(rows, n))
    case.shared_input = shared_input
    return _cast(case, dtype, device)


def conv_case(
    x_shape: tuple[int, int, int, int], weight_shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, *,
    scores_shape: tuple[int, int, int, int] | None = None, beta: float = 3.0, bias: bool = True, kind: str = "sigmoid",
    is_channels_last: bool = False, seed: int = 0, device: str = "cpu", num_masks: int | None = None,
    shared_input: bool = False, **conv: Any,
) -> Case:
    """Random inputs for masked_conv2d; ``conv`` is stride, padding, dilation and groups; x_shape is one mask's."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    fan_in = max(weight_shape[1] * weight_shape[2] * weight_shape[3], 1)
    masks = () if num_masks is None else (num_masks,)
    rows = x_shape[0] if shared_input else x_shape[0] * (num_masks or 1)
    x, weight = randn(rows, *x_shape[1:]), randn(*weight_shape) / fan_in**0.5
    scores = randn(*masks, *(scores_shape or weight_shape))
    if is_channels_last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        scores = scores.movedim(-3, -1).contiguous().movedim(-1, -3)
    case = Case(x, weight, scores, beta, randn(weight_shape[0]) if bias else None, conv, kind)
    case.shared_input = shared_input
    case.grad_out = torch.randn(plain(case)[0].shape, generator=generator, dtype=torch.float64)
    return _cast(case, dtype, device)


def _cast(case: Case, dtype: torch.dtype, device: str) -> Case:
    scores_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return case.map(lambda name, t: t.to(device=device, dtype=scores_dtype if name == "scores" else dtype))


# --- truth -----------------------------------------------------------------------------------------------------------


def plain(case: Case) -> tuple[Tensor, Tensor]:
    """(out, penalty) by the plain expression, in the case's own dtypes: the eager baseline, and the truth in fp64."""
    if is_of_masks(case.weight, case.scores):
        num = len(case.scores)
        parts = [case.x] * num if case.shared_input else case.x.chunk(num)
        made = [plain(replace(case, x=x, scores=s)) for x, s in zip(parts, case.scores.unbind(), strict=True)]
        return torch.cat([out for out, _ in made]), torch.stack([penalty for _, penalty in made])
    kind: MaskKind = as_kind(case.kind)
    shape = tuple(case.weight.shape)
    m = expand_scores(kind.value(case.scores, case.beta), shape)
    penalty = kind.penalty(case.scores, case.beta).sum() * weights_per_score(shape, tuple(case.scores.shape))
    w_eff = (case.weight * m).to(case.x.dtype)
    if case.conv is None:
        return F.linear(case.x, w_eff, case.bias), penalty
    return F.conv2d(case.x, w_eff, case.bias, **case.conv), penalty


def run(case: Case, op: Callable[[Case], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """out, penalty and the gradients of ``(out*grad_out).sum() + grad_penalty*penalty`` by ``op``."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.tensors().items()}
    case = replace(case, **leaves)
    out, penalty = op(case)
    assert case.grad_out is not None
    wanted = [name for name in leaves if f"grad_{name}" in case.wanted]
    upstream = [(out, case.grad_out), (penalty, torch.full_like(penalty, case.grad_penalty))]
    outputs, grad_outputs = zip(*[(o, g) for o, g in upstream if o.requires_grad], strict=True)
    gradients = torch.autograd.grad(outputs, [leaves[name] for name in wanted], grad_outputs, allow_unused=True)
    results = {"out": out.detach(), "penalty": penalty.detach()}
    for name, gradient in zip(wanted, gradients, strict=True):
        results[f"grad_{name}"] = torch.zeros_like(leaves[name]) if gradient is None else gradient
    return results


def truth(case: Case) -> dict[str, Tensor]:
    """The results in fp64."""
    return run(case.map(lambda name, t: t.double()), plain)


def absolute(case: Case) -> dict[str, Tensor]:
    """A: the same op on absolute values in fp64 (scores keep their sign: they are the mask's argument)."""
    positive = case.map(lambda name, t: t.double() if name == "scores" else t.double().abs())
    positive.grad_penalty = abs(case.grad_penalty)
    return run(positive, plain)


# --- the bound -------------------------------------------------------------------------------------------------------


def error_bound(eager_error: float, absolute_result: Tensor, dtype: torch.dtype, is_gradient: bool) -> Tensor:
    """The largest error allowed per element: 2*E + 4*u*A forward, 3*E + 8*u*A for gradients."""
    u = UNIT_ROUNDOFF[dtype]
    if is_gradient:
        return 3 * eager_error + 8 * u * absolute_result
    return 2 * eager_error + 4 * u * absolute_result


def worst_errors(case: Case, op: Callable[[Case], tuple[Tensor, Tensor]]) -> dict[str, float]:
    """For every result of ``op``: its largest error as a multiple of the allowed one; above 1 it is wrong. A NaN, a
    wrong shape or a wrong dtype counts as infinite."""
    true, eager, size, ours = truth(case), run(case, plain), absolute(case), run(case, op)
    worst = {}
    for name, value in ours.items():
        if value.shape != true[name].shape or value.dtype != eager[name].dtype:
            worst[name] = float("inf")
            continue
        if value.numel() == 0:
            worst[name] = 0.0
            continue
        dtype = eager["penalty"].dtype if name == "penalty" else case.x.dtype
        eager_error = (eager[name].double() - true[name]).abs().max().item()
        bound = error_bound(eager_error, size[name], dtype, name.startswith("grad_"))
        error = (value.double() - true[name]).abs()
        ratio = torch.where(error == 0, torch.zeros_like(error), error / bound)
        worst[name] = float("inf") if bool(ratio.isnan().any()) else ratio.max().item()
    return worst


def ours(case: Case, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The case by our public op; ``kwargs``: backend, plan."""
    from .ops.masked_conv import masked_conv2d
    from .ops.masked_linear import masked_linear

    kwargs["shared_input"] = case.shared_input
    if case.conv is None:
        return masked_linear(case.x, case.weight, case.scores, case.beta, case.bias, kind=case.kind, **kwargs)
    return masked_conv2d(
        case.x, case.weight, case.scores, case.beta, case.bias, **case.conv, kind=case.kind, **kwargs
    )


# --- one step of the optimizer ---------------------------------------------------------------------------------------

STEP = AdamW(lr=0.03, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.7, lam=0.11)  # so that each of them is seen
STEP_BETA, NEXT_BETA = 3.0, 7.0


@dataclass
class Stepped:
    """What mask_adamw_ and linear_step_ read and write of one tensor: scores, moments, the number of the step, weight
    and, where there is one, the slot's effective weight and penalty."""

    scores: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    weight: Tensor
    slot: tuple[Tensor, Tensor] | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Stepped:
        """A copy with ``function`` of every tensor of weight's shape, NaN in the slot."""
        scores, exp_avg, exp_avg_sq, weight = (
            function(tensor.clone()) for tensor in (self.scores, self.exp_avg, self.exp_avg_sq, self.weight)
        )
        slot = None if self.slot is None else empty_slot(weight, self.slot[0].dtype)
        return Stepped(scores, exp_avg, exp_avg_sq, self.step.clone(), weight, slot)

    def written(self) -> list[Tensor]:
        return [self.scores, self.exp_avg, self.exp_avg_sq, *(self.slot or ())]


def empty_slot(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.full_like(weight, float("nan"), dtype=dtype), torch.full((), float("nan"), device=weight.device)


def stepped(
    shape: tuple[int, ...], step: int = 3, weight_dtype: torch.dtype = torch.float32,
    moment_dtype: torch.dtype = torch.float32, dtype: torch.dtype | None = None, seed: int = 0, device: str = "cpu",
) -> Stepped:
    """Random inputs of a step; ``dtype``: of the effective weight, None without."""
    generator = torch.Generator().manual_seed(seed)
    scores, exp_avg, root, weight = (torch.randn(shape, generator=generator).to(device) for _ in range(4))
    weight = weight.to(weight_dtype)
    return Stepped(
        scores, exp_avg.to(moment_dtype), (root.square() + 0.1).to(moment_dtype),
        torch.tensor(float(step), device=device), weight, None if dtype is None else empty_slot(weight, dtype),
    )  # fmt: skip


def grad_of_step(
    before: Stepped, grad_w_eff: Tensor, grad_w_eff_error: Tensor | float, grad_penalty: float
) -> tuple[Tensor, Tensor]:
    """The scores' gradient, without lam's part, in fp64, and the error that fp32 arithmetic may leave in it, given that
    of the effective weight's."""
    weight, slope = before.weight.double(), Sigmoid().slope(before.scores.double(), STEP_BETA)
    product = grad_w_eff.double() * weight
    roundings = 4 * UNIT_ROUNDOFF[torch.float32] * (product.abs() + grad_penalty + float(STEP.lam))
    return (product + grad_penalty) * slope, (grad_w_eff_error * weight.abs() + roundings) * slope


def linear_grad_of_step(
    before: Stepped, grad_out: Tensor, x: Tensor, grad_penalty: float, product_roundoff: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The same for a linear layer; product_roundoff: of the dtype in which a vendor's product is stored."""
    product, size = grad_out.double().t() @ x.double(), grad_out.double().abs().t() @ x.double().abs()
    error = (len(x) + 8) * UNIT_ROUNDOFF[torch.float32] * size + product_roundoff * product.abs()
    return grad_of_step(before, product, error, grad_penalty)


def adamw_in_fp64(
    before: Stepped, grad: Tensor, beta: float, numbers: AdamW
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, moments) after one step, by the formula."""
    lr, beta1, beta2, eps, weight_decay, lam = (float(number) for number in numbers)
    s, m1, m2 = (tensor.double() for tensor in (before.scores, before.exp_avg, before.exp_avg_sq))
    t = before.step.item()
    g = grad + lam * Sigmoid().slope(s, beta)
    s = s - lr * weight_decay * s
    m1, m2 = beta1 * m1 + (1 - beta1) * g, beta2 * m2 + (1 - beta2) * g * g
    return s - lr / (1 - beta1**t) * m1 / ((m2 / (1 - beta2**t)).sqrt() + eps), m1, m2


def worst_step_errors(
    before: Stepped, after: Stepped, grad: Tensor, grad_error: Tensor | float, numbers: AdamW = STEP
) -> dict[str, float]:
    """For everything that a step by ``numbers`` writes: its largest error as a multiple of the allowed one. Truth is
    AdamW in fp64 on the scores' gradient ``grad``, whose own error may be ``grad_error``; allowed is its first-order
    propagation and a few roundings per operation, and for bf16 moments one unit in the last place, as rounding goes
    both ways. The effective weight and the penalty are held to the scores that were written."""
    u = UNIT_ROUNDOFF[torch.float32]
    lr, beta1, beta2, eps, _, lam = (float(number) for number in numbers)
    t = before.step.item()
    scores, exp_avg, exp_avg_sq = adamw_in_fp64(before, grad, STEP_BETA, numbers)
    size = grad.abs() + lam * Sigmoid().slope(before.scores.double(), STEP_BETA)
    error = grad_error + 16 * u * size
    first_error = (1 - beta1) * error + 4 * u * (before.exp_avg.double().abs() + (1 - beta1) * size)
    second_error = (1 - beta2) * 2 * size * error + 6 * u * exp_avg_sq
    denominator = (exp_avg_sq / (1 - beta2**t)).sqrt() + eps
    update = lr / (1 - beta1**t) * exp_avg.abs() / denominator
    score_error = (
        lr / (1 - beta1**t) * first_error / denominator + update * (second_error / (2 * exp_avg_sq) + 6 * u)
        + 4 * u * (before.scores.double().abs() + update)
    )  # fmt: skip
    unit = 0.0 if before.exp_avg.dtype == torch.float32 else 2 * UNIT_ROUNDOFF[before.exp_avg.dtype]
    checks = {
        "scores": (after.scores, scores, score_error),
        "exp_avg": (after.exp_avg, exp_avg, first_error + unit * exp_avg.abs()),
        "exp_avg_sq": (after.exp_avg_sq, exp_avg_sq, second_error + unit * exp_avg_sq),
        "weight": (after.weight, before.weight.double(), torch.zeros_like(scores)),
    }
    if after.slot is not None:
        m = Sigmoid().value(after.scores.double(), NEXT_BETA)
        w_eff = after.weight.double() * m
        tiny = 2.0**-24 if after.slot[0].dtype == torch.float16 else 0.0
        bound = (4 * UNIT_ROUNDOFF[after.slot[0].dtype] + 32 * u) * w_eff.abs() + tiny
        checks["w_eff"] = (after.slot[0], w_eff, bound)
        checks["penalty"] = (after.slot[1], m.sum(), 16 * u * m.sum())
    worst = {}
    for name, (got, true, bound) in checks.items():
        error = (got.double() - true).abs()
        ratio = torch.where(error == 0, torch.zeros_like(error), error / bound)
        worst[name] = float("inf") if bool(ratio.isnan().any()) else ratio.amax().item() if ratio.numel() else 0.0
    return worst
