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

from .masks import MaskKind, as_kind, expand_scores, weights_per_score

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
GRADIENTS = ("grad_x", "grad_weight", "grad_scores", "grad_bias")


@dataclass
class Case:
    """One call of masked_linear (or masked_conv2d, where ``conv`` has its geometry) with upstream gradients."""

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
    device: str = "cpu",
) -> Case:
    """Random inputs for masked_linear: x [M, K], weight [N, K], scores spread over both sides of zero."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, scores = randn(n, k) / max(k, 1) ** 0.5, randn(*(scores_shape or (n, k)))
    if is_transposed:
        weight, scores = weight.t().contiguous().t(), scores.t().contiguous().t()
    case = Case(randn(m, k), weight, scores, beta, randn(n) if bias else None, None, kind, randn(m, n))
    return _cast(case, dtype, device)


def conv_case(
    x_shape: tuple[int, int, int, int], weight_shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, *,
    scores_shape: tuple[int, int, int, int] | None = None, beta: float = 3.0, bias: bool = True, kind: str = "sigmoid",
    is_channels_last: bool = False, seed: int = 0, device: str = "cpu", **conv: Any,
) -> Case:
    """Random inputs for masked_conv2d; ``conv`` is stride, padding, dilation and groups."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    fan_in = max(weight_shape[1] * weight_shape[2] * weight_shape[3], 1)
    x, weight, scores = randn(*x_shape), randn(*weight_shape) / fan_in**0.5, randn(*(scores_shape or weight_shape))
    if is_channels_last:
        x, weight, scores = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, scores))
    case = Case(x, weight, scores, beta, randn(weight_shape[0]) if bias else None, conv, kind)
    case.grad_out = torch.randn(plain(case)[0].shape, generator=generator, dtype=torch.float64)
    return _cast(case, dtype, device)


def _cast(case: Case, dtype: torch.dtype, device: str) -> Case:
    scores_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return case.map(lambda name, t: t.to(device=device, dtype=scores_dtype if name == "scores" else dtype))


# --- truth -----------------------------------------------------------------------------------------------------------


def plain(case: Case) -> tuple[Tensor, Tensor]:
    """(out, penalty) by the plain expression, in the case's own dtypes: the eager baseline, and the truth in fp64."""
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

    if case.conv is None:
        return masked_linear(case.x, case.weight, case.scores, case.beta, case.bias, kind=case.kind, **kwargs)
    return masked_conv2d(
        case.x, case.weight, case.scores, case.beta, case.bias, **case.conv, kind=case.kind, **kwargs
    )
