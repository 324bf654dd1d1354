"""The ops alone: per case the functions to time (eager, torch.compile, ours), truth, operations and bytes.

Elementwise passes, and the score gradient with its product, whose ceiling is the vendor's product alone ("mm").
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import subnet_kernels
from subnet_kernels.backends import cuda_gemm
from subnet_kernels.backends.base import AdamW, Backend, Call
from subnet_kernels.dispatch import BACKENDS, choose, choose_for
from subnet_kernels.masks import as_kind
from subnet_kernels.ops.effective_weight import effective_weights_raw
from subnet_kernels.testing import Stepped, adamw_in_fp64, error_bound, grad_of_step

from .cases import BETA, DTYPES, LAM, KernelCase

KIND = as_kind("sigmoid")
Results = list[Tensor]
Triple = tuple[Tensor, Tensor, bool]  # truth and absolute value in fp64, is a gradient


@dataclass
class Problem:
    """functions: name -> call that returns its results. truth: the i-th result in fp64, made when asked for. num_bytes,
    flops: what one call must move, and multiply. note: what runs ours."""

    functions: dict[str, Callable[[], Results]]
    truth: Callable[[int], Triple]
    num_bytes: int
    dtypes: Callable[[int], torch.dtype]
    note: str = ""
    flops: float = 0.0


def gate(problem: Problem, broke: Callable[[str, Exception], None] | None = None) -> dict[str, float]:
    """Calls every function once: its largest error as a multiple of the allowed one (above 1 it is wrong). With
    ``broke``, one that raises is named there and leaves the problem. "mm" computes something else and has none."""
    results = {}
    for name, function in list(problem.functions.items()):
        try:
            results[name] = function()
        except Exception as error:
            if broke is None:
                raise
            broke(name, error)
            del problem.functions[name]
    results.pop("mm", None)
    worst = dict.fromkeys(results, 0.0)
    for i, eager in enumerate(results["eager"]):
        true, size, is_gradient = problem.truth(i)
        eager_error = (eager.double() - true).abs().max().item()
        bound = error_bound(eager_error, size, problem.dtypes(i), is_gradient)
        for name, values in results.items():
            error = (values[i].double() - true).abs()
            ratio = torch.where(error == 0, torch.zeros_like(error), error / bound).max().item()
            worst[name] = max(worst[name], ratio) if ratio == ratio else float("inf")
    return worst


def make_problem(case: KernelCase, device: str) -> Problem:
    """The problem of a case, on fixed random data."""
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[case.dtype]
    if case.op == "score_gradient":
        return _score_gradient(case, device)
    if case.op == "linear_step":
        return _linear_step(case, device)
    weights, scores = [], []
    for shape in case.shapes:
        weights.append(torch.randn(shape, generator=generator).to(device, dtype))
        scores.append(torch.randn(shape, generator=generator).to(device))
    beta = torch.tensor(BETA, device=device)
    call = Call(case.op, device, dtype, dtype, KIND.name, None, len(case.shapes[0]), True)
    backend = choose(call)
    note = f"backend {backend.name}"
    if case.op in ("effective_weight", "effective_weights"):
        return replace(_effective_weights(case, weights, scores, beta, backend), note=note)
    makers = {"grad_scores": _grad_scores, "mask": _mask, "add_penalty_grad": _add_penalty_grad}
    if case.op in makers:
        return replace(makers[case.op](case, weights[0], scores[0], beta, backend), note=note)
    return _packing(case, scores[0])


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def _effective_weights(
    case: KernelCase, weights: Results, scores: Results, beta: Tensor, backend: Backend
) -> Problem:
    dtype, num = weights[0].dtype, len(weights)

    def expression(w: Tensor, s: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        m = torch.sigmoid(beta * s)
        return (w * m).to(w.dtype), m.sum()

    fast = compiled(expression)

    def plain(function: Callable[..., tuple[Tensor, Tensor]]) -> Results:
        pairs = [function(w, s, beta) for w, s in zip(weights, scores, strict=True)]
        return [w_eff for w_eff, _ in pairs] + [torch.stack([penalty for _, penalty in pairs]).sum()]

    def ours() -> Results:
        if case.op == "effective_weight":
            return list(subnet_kernels.effective_weight(weights[0], scores[0], beta))
        w_effs, penalty = subnet_kernels.effective_weights(weights, scores, beta)
        return [*w_effs, penalty]

    buffers = [torch.full_like(w, float("nan")) for w in weights]
    penalty = torch.full_like(beta, float("nan"))

    def ours_buffer() -> Results:  # into persistent memory, as a layer's slot and MaskSet.refresh do
        if case.op == "effective_weight":
            return list(backend.effective_weight(weights[0], scores[0], beta, KIND, dtype, (buffers[0], penalty)))
        w_effs, penalties = effective_weights_raw(weights, scores, beta, KIND, dtype, buffers)
        return [*w_effs, penalties.sum()]

    def truth(i: int) -> Triple:
        if i < num:
            true = weights[i].double() * torch.sigmoid(BETA * scores[i].double())
            return true, true.abs(), False
        total = torch.stack([torch.sigmoid(BETA * s.double()).sum() for s in scores]).sum()
        return total, total, False

    per_weight = 2 * dtype.itemsize + 4
    return Problem(
        {"eager": lambda: plain(expression), "compile": lambda: plain(fast), "ours": ours, "ours_buffer": ours_buffer},
        truth, case.num_weights * per_weight, lambda i: dtype if i < num else torch.float32,
    )  # fmt: skip


def _grad_scores(case: KernelCase, weight: Tensor, scores: Tensor, beta: Tensor, backend: Backend) -> Problem:
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight)
    lam = torch.tensor(LAM, device=weight.device)

    def expression(g: Tensor, w: Tensor, s: Tensor, beta: Tensor, lam: Tensor) -> Tensor:
        m = torch.sigmoid(beta * s)
        return (g.float() * w + lam) * (beta * m * (1 - m))

    fast = compiled(expression)

    def ours() -> Results:
        grad_scores, _ = backend.grad_scores(grad, lam, weight, scores, beta, KIND, True, False)
        assert grad_scores is not None
        return [grad_scores]

    def truth(i: int) -> Triple:
        z = BETA * scores.double()
        slope = BETA * torch.sigmoid(z) * torch.sigmoid(-z)
        product = grad.double() * weight.double()
        return (product + LAM) * slope, (product.abs() + LAM) * slope, True

    inputs = (grad, weight, scores, beta, lam)
    return Problem(
        {"eager": lambda: [expression(*inputs)], "compile": lambda: [fast(*inputs)], "ours": ours},  # type: ignore[list-item]
        truth, case.num_weights * (2 * weight.element_size() + 8), lambda i: torch.float32,
    )  # fmt: skip


def _product_inputs(case: KernelCase, device: str) -> tuple[Tensor, ...]:
    """Random grad_out [M, N], x [M, K], weight and scores [N, K]; beta and lam."""
    generator, dtype = torch.Generator(device).manual_seed(0), DTYPES[case.dtype]
    (n, k), m = case.shapes[0], case.num_tokens
    grad_out, x, weight, scores = (
        torch.randn(shape, generator=generator, device=device) for shape in ((m, n), (m, k), (n, k), (n, k))
    )
    beta, lam = torch.tensor(BETA, device=device), torch.tensor(LAM, device=device)
    return grad_out.to(dtype), x.to(dtype), weight.to(dtype), scores, beta, lam


def _score_gradient(case: KernelCase, device: str) -> Problem:
    """grad_out[M, N]^T @ x[M, K], then the pass over W and s: in one kernel, in two, and the product alone."""
    dtype, (n, k), m = DTYPES[case.dtype], case.shapes[0], case.num_tokens
    inputs = grad_out, x, weight, scores, beta, lam = _product_inputs(case, device)
    backend = choose_for("masked_linear", weight, scores, KIND.name, dtype)

    def expression(g: Tensor, x: Tensor, w: Tensor, s: Tensor, beta: Tensor, lam: Tensor) -> Tensor:
        m = torch.sigmoid(beta * s)
        return (g.t().mm(x).float() * w + lam) * (beta * m * (1 - m))

    fast = compiled(expression)

    def ours(function: Callable[..., tuple[Tensor | None, Tensor | None]]) -> Results:
        grad_scores, _ = function(grad_out, x, lam, weight, scores, beta, KIND, True, False)
        assert grad_scores is not None
        return [grad_scores]

    def truth(i: int) -> Triple:
        z = BETA * scores.double()
        slope = BETA * torch.sigmoid(z) * torch.sigmoid(-z)
        g, value, w = (t.double() for t in (grad_out, x, weight))
        size = (g.abs().t().mm(value.abs()) * w.abs() + LAM) * slope
        return (g.t().mm(value) * w + LAM) * slope, size, True

    functions: dict[str, Callable[[], Results]] = {
        "eager": lambda: [expression(*inputs)], "compile": lambda: [fast(*inputs)],  # type: ignore[list-item]
        "mm": lambda: [grad_out.t().mm(x)],
        "ours": lambda: ours(backend.linear_grad_scores),
        "ours_flat": lambda: ours(functools.partial(Backend.linear_grad_scores, backend)),
    }  # fmt: skip
    triton = BACKENDS["triton"]  # also where dispatch takes the vendor's product: is its limit right?
    if triton.refuse(Call("masked_linear", device, dtype, dtype, KIND.name)) is None:
        functions["ours_fused"] = lambda: ours(functools.partial(triton.linear_grad_scores, is_fused=True))
    if device == "cuda" and cuda_gemm.refusal(grad_out, x, weight, scores) is None:
        for kernel in cuda_gemm.served(x.dtype, weight.dtype, cuda_gemm.gpu(x.device.index), cuda_gemm.kernels()):
            functions[f"ours_{kernel}"] = lambda kernel=kernel: [
                cuda_gemm.score_gradient(grad_out, x, lam, weight, scores, beta, kernel)
            ]
    num_bytes = (m * n + m * k + n * k) * dtype.itemsize + n * k * 8
    return Problem(functions, truth, num_bytes, lambda i: dtype, f"backend {backend.name}", 2.0 * m * n * k)


def _linear_step(case: KernelCase, device: str) -> Problem:
    """grad_out[M, N]^T @ x[M, K], the score gradient, AdamW, and the next effective weight with the sum of its mask:
    inside the product as far as dispatch takes it there (variant F) or wherever it is built, in two passes (B), and the
    product alone. Each steps scores of its own."""
    dtype, (n, k), m = DTYPES[case.dtype], case.shapes[0], case.num_tokens
    grad_out, x, weight, scores, beta, lam = _product_inputs(case, device)
    backend = choose_for("mask_adamw", weight, scores, KIND.name, dtype)
    numbers = AdamW(1e-4, 0.9, 0.999, 1e-8, 0.01, lam)

    def state(moment_dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        moments = [torch.zeros_like(scores, dtype=moment_dtype) for _ in range(2)]
        return scores.clone(), *moments, torch.zeros_like(beta), torch.empty_like(weight), torch.zeros_like(beta)

    def expression(g: Tensor, x: Tensor, w: Tensor, s: Tensor, m1: Tensor, m2: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        mask = torch.sigmoid(beta * s)
        grad = (g.t().mm(x).float() * w + lam) * (beta * mask * (1 - mask))
        s = s * (1 - numbers.lr * numbers.weight_decay)
        m1, m2 = m1 + (1 - numbers.beta1) * (grad - m1), numbers.beta2 * m2 + (1 - numbers.beta2) * grad * grad
        size = (m2 / (1 - numbers.beta2**t)).sqrt() + numbers.eps
        s = s - numbers.lr / (1 - numbers.beta1**t) * m1 / size
        mask = torch.sigmoid(beta * s)
        return s, m1, m2, (w * mask).to(w.dtype), mask.sum()

    fast = compiled(expression)

    def plain(function: Callable[..., tuple[Tensor, ...]], own: tuple[Tensor, ...]) -> Results:
        s, m1, m2, t, w_eff, penalty = own
        t += 1
        for old, new in zip((s, m1, m2, w_eff, penalty), function(grad_out, x, weight, s, m1, m2, t), strict=True):
            old.copy_(new)
        return [s, m1]

    def in_backward(own: tuple[Tensor, ...], **options: bool) -> Results:
        s, m1, m2, t, *slot = own
        t += 1
        backend.linear_step_(
            grad_out, x, None, s, m1, m2, t, weight, (slot[0], slot[1]), beta, beta, KIND, numbers, **options
        )
        return [s, m1]

    def apart(own: tuple[Tensor, ...]) -> Results:
        s, m1, m2, t, *slot = own
        t += 1
        grad, _ = backend.linear_grad_scores(grad_out, x, None, weight, s, beta, KIND, True, False)
        assert grad is not None
        backend.mask_adamw_([s], [grad], [m1], [m2], [t], [weight], [(slot[0], slot[1])], beta, beta, KIND, numbers)
        return [s, m1]

    def truth(i: int) -> Triple:
        before = Stepped(scores, *state()[1:3], torch.ones_like(beta), weight, None)
        grad, _ = grad_of_step(before, grad_out.double().t() @ x.double(), 0.0, 0.0)
        s, m1, _ = adamw_in_fp64(before, grad, BETA, numbers)
        return (s, s.abs(), True) if i == 0 else (m1, m1.abs(), True)

    own = {name: state() for name in ("eager", "compile", "ours", "ours_flat", "ours_fused")}
    own_bf16 = state(torch.bfloat16)
    functions: dict[str, Callable[[], Results]] = {
        "eager": lambda: plain(expression, own["eager"]), "compile": lambda: plain(fast, own["compile"]),
        "mm": lambda: [grad_out.t().mm(x)],
        "ours": lambda: in_backward(own["ours"]), "ours_bf16": lambda: in_backward(own_bf16),
        "ours_flat": lambda: apart(own["ours_flat"]),
    }  # fmt: skip
    if backend.name == "triton":
        functions["ours_fused"] = lambda: in_backward(own["ours_fused"], is_fused=True)
    num_bytes = (m * n + m * k) * dtype.itemsize + n * k * (24 + 2 * dtype.itemsize)
    return Problem(
        functions, truth, num_bytes, lambda i: torch.float32 if i == 0 else dtype, f"backend {backend.name}",
        2.0 * m * n * k,
    )  # fmt: skip


def _mask(case: KernelCase, weight: Tensor, scores: Tensor, beta: Tensor, backend: Backend) -> Problem:
    def expression(s: Tensor, beta: Tensor) -> Tensor:
        return torch.sigmoid(beta * s)

    fast = compiled(expression)

    def truth(i: int) -> Triple:
        true = torch.sigmoid(BETA * scores.double())
        return true, true, False

    return Problem(
        {"eager": lambda: [expression(scores, beta)], "compile": lambda: [fast(scores, beta)],  # type: ignore[list-item]
         "ours": lambda: [subnet_kernels.mask(scores, beta)]},
        truth, case.num_weights * 8, lambda i: torch.float32,
    )  # fmt: skip


def _add_penalty_grad(case: KernelCase, weight: Tensor, scores: Tensor, beta: Tensor, backend: Backend) -> Problem:
    def expression(grad: Tensor, s: Tensor, beta: Tensor) -> Tensor:
        m = torch.sigmoid(beta * s)
        return grad.add_(beta * m * (1 - m), alpha=LAM)

    fast = compiled(expression)
    grads = [torch.zeros_like(scores) for _ in range(3)]  # the check is every function's first call

    def ours() -> Results:
        backend.add_penalty_grad_([grads[2]], [scores], [1], beta, LAM, KIND)
        return [grads[2]]

    def truth(i: int) -> Triple:
        z = BETA * scores.double()
        true = LAM * BETA * torch.sigmoid(z) * torch.sigmoid(-z)
        return true, true, True

    return Problem(
        {"eager": lambda: [expression(grads[0], scores, beta)],
         "compile": lambda: [fast(grads[1], scores, beta)], "ours": ours},  # type: ignore[list-item]
        truth, case.num_weights * 12, lambda i: torch.float32,
    )  # fmt: skip


def _packing(case: KernelCase, scores: Tensor) -> Problem:
    kept = scores > 0
    shifts = torch.arange(8, dtype=torch.uint8, device=scores.device)
    packed = (kept.view(-1, 8).to(torch.uint8) << shifts).sum(dim=1, dtype=torch.uint8)
    num_bytes = case.num_weights + case.num_weights // 8
    if case.op == "pack_mask":
        functions: dict[str, Callable[[], Results]] = {
            "eager": lambda: [(kept.view(-1, 8).to(torch.uint8) << shifts).sum(dim=1, dtype=torch.uint8)],
            "ours": lambda: [subnet_kernels.pack_mask(kept)],
        }
        true = packed.double()
    else:
        functions = {
            "eager": lambda: [((packed[:, None] >> shifts) & 1).bool().view(kept.shape)],
            "ours": lambda: [subnet_kernels.unpack_mask(packed, kept.shape)],
        }
        true = kept.double()
    exact = torch.zeros_like(true)  # nothing but equality is allowed
    return Problem(functions, lambda i: (true, exact, False), num_bytes, lambda i: torch.float32)
