"""What gpu_check checks: the reference on the GPU, effective weights, products and steps of the kernels, against fp64.

Every check draws fresh inputs from the seed it is given (the report names it), poisons the outputs with NaN and returns
its worst error as a multiple of the allowed one (testing.error_bound): above 1 it failed.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from subnet_kernels import BackendRefused, testing, use_backend
from subnet_kernels.backends import cuda_gemm
from subnet_kernels.backends.triton import TritonBackend
from subnet_kernels.masks import MaskKind, as_kind
from subnet_kernels.ops.effective_weight import effective_weights_raw

Check = tuple[str, float]  # what was checked, worst error / allowed error
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}  # should time run out, bf16 is done
BLOCK = 4096  # weights per thread block of the CUDA kernel: sizes around it are where its bounds could be wrong
LAYER_SIZES = (
    (1,), (3,), (7, 1), (127,), (31, 33), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (0, 5), (257, 389), (64, 3, 3, 3),
)  # fmt: skip


def reference_checks(device: str, seed: int) -> Iterator[Check]:
    """Every op on the reference backend on this device: dtypes, kinds, coarse scores, strides, odd and empty shapes."""
    op = functools.partial(testing.ours, backend="reference")
    for name, dtype in DTYPES.items():
        linears = {
            "13x17x29": testing.linear_case(13, 17, 29, dtype, seed=seed, device=device),
            "transposed": testing.linear_case(5, 24, 16, dtype, is_transposed=True, seed=seed, device=device),
            "row": testing.linear_case(7, 12, 20, dtype, scores_shape=(12, 1), seed=seed, device=device),
            "block": testing.linear_case(7, 12, 20, dtype, scores_shape=(3, 5), seed=seed, device=device),
            "hard": testing.linear_case(9, 11, 13, dtype, kind="hard", seed=seed, device=device),
            "empty batch": testing.linear_case(0, 11, 13, dtype, seed=seed, device=device),
            "512x128, M 256": testing.linear_case(256, 512, 128, dtype, seed=seed, device=device),
        }
        convs = {
            "conv 3x3": testing.conv_case((2, 8, 9, 9), (6, 8, 3, 3), dtype, padding=1, seed=seed, device=device),
            "conv groups": testing.conv_case((2, 8, 9, 9), (6, 4, 3, 3), dtype, groups=2, seed=seed, device=device),
            "conv filter": testing.conv_case(
                (2, 8, 9, 9), (6, 8, 3, 3), dtype, scores_shape=(6, 1, 1, 1), stride=2, seed=seed, device=device
            ),
        }
        for label, case in {**linears, **convs}.items():
            yield f"reference, {case.op}, {label}, {name}", max(testing.worst_errors(case, op).values())
    case = testing.linear_case(3, 4, 5, torch.float64, seed=seed, device=device)
    inputs = tuple(t.requires_grad_() for t in (case.x, case.weight, case.scores))

    def in_fp64(x: Tensor, weight: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        return op(testing.Case(x, weight, scores, case.beta))

    # raises where a gradient differs from the numerical one
    is_right = torch.autograd.gradcheck(in_fp64, inputs)
    yield "reference, masked_linear, gradcheck, fp64", 0.0 if is_right else float("inf")


def triton_checks(
    device: str, seed: int, is_large: bool = True, dtypes: Collection[str] = tuple(DTYPES)
) -> Iterator[Check]:
    """Linear and convolution on the Triton backend: both plans, every dtype and kind, odd, transposed and empty inputs,
    sums over tokens whole and in parts."""
    sizes = {"1x1x1": (1, 1, 1), "13x17x29": (13, 17, 29), "33x257x130": (33, 257, 130), "empty batch": (0, 11, 13)}
    if is_large:
        sizes |= {"768x3072, M 1024": (1024, 768, 3072), "512x128, M 5000": (5000, 512, 128), "M 100": (100, 768, 768)}
    for name, dtype in ((name, DTYPES[name]) for name in dtypes):
        for plan in ("cached", "fused"):
            op = functools.partial(testing.ours, backend="triton", plan=plan)
            linears = {
                label: testing.linear_case(*size, dtype, seed=seed, device=device) for label, size in sizes.items()
            }
            linears["transposed"] = testing.linear_case(5, 24, 16, dtype, is_transposed=True, seed=seed, device=device)
            linears["hard"] = testing.linear_case(9, 11, 13, dtype, kind="hard", seed=seed, device=device)
            scores_only = testing.linear_case(70, 40, 50, dtype, seed=seed, device=device)
            scores_only.wanted = ("grad_scores",)
            linears["scores only"] = scores_only
            for label, case in linears.items():
                yield f"triton, linear, {plan}, {label}, {name}", max(testing.worst_errors(case, op).values())
        for plan in ("cached", "fused"):
            op = functools.partial(testing.ours, backend="triton", plan=plan)
            for label, shape in {"row": (12, 1), "column": (1, 20), "block": (3, 5), "one score": (1, 1)}.items():
                case = testing.linear_case(7, 12, 20, dtype, scores_shape=shape, seed=seed, device=device)
                yield f"triton, linear, {plan}, {label}, {name}", max(testing.worst_errors(case, op).values())
            for label, case in conv_cases(dtype, seed, device, is_large).items():
                yield f"triton, conv, {plan}, {label}, {name}", max(testing.worst_errors(case, op).values())


def conv_cases(dtype: torch.dtype, seed: int, device: str, is_large: bool) -> dict[str, testing.Case]:
    """Convolutions in both memory formats: padded, strided, dilated, in groups, 1x1, with scores per filter."""
    geometries: dict[str, tuple[tuple[int, int, int, int], tuple[int, int, int, int], dict[str, Any]]] = {
        "3x3": ((2, 8, 9, 9), (6, 8, 3, 3), {"padding": 1}),
        "groups": ((2, 8, 9, 9), (6, 4, 3, 3), {"groups": 2, "stride": 2}),
        "dilated": ((2, 3, 11, 10), (5, 3, 2, 3), {"dilation": (2, 3), "padding": (0, 2)}),
        "1x1": ((2, 9, 5, 6), (7, 9, 1, 1), {}),
        "filters": ((2, 8, 9, 9), (6, 8, 3, 3), {"scores_shape": (6, 1, 1, 1)}),
    }
    if is_large:
        geometries["64 channels"] = ((16, 64, 28, 28), (128, 64, 3, 3), {"padding": 1, "stride": 2})
        geometries["7x7"] = ((8, 3, 64, 64), (64, 3, 7, 7), {"padding": 3, "stride": 2})
    return {
        label + layout: testing.conv_case(
            x, weight, dtype, is_channels_last=bool(layout), seed=seed, device=device, **rest
        )
        for label, (x, weight, rest) in geometries.items() for layout in ("", ", channels_last")
    }  # fmt: skip


def step_checks(
    device: str, seed: int, is_large: bool = True, dtypes: Collection[str] = tuple(DTYPES)
) -> Iterator[Check]:
    """The optimizer's step on the Triton backend: on gradients of scores and of effective weights, and inside a linear
    layer's score gradient, whole and in parts; moments in fp32 and bf16; odd, transposed and empty weights."""
    from subnet_kernels.backends.triton import rules

    backend, kind = TritonBackend(), as_kind("sigmoid")
    beta, next_beta = (torch.tensor(value, device=device) for value in (testing.STEP_BETA, testing.NEXT_BETA))
    lam = torch.tensor(0.37, device=device)
    sizes = {"1x1x1": (1, 1, 1), "33x257x130": (33, 257, 130), "transposed": (70, 48, 80), "empty batch": (0, 11, 13)}
    if is_large:
        sizes |= {"768x3072, M 1024": (1024, 768, 3072), "512x128, M 5000": (5000, 512, 128)}

    def randn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def take(state: testing.Stepped) -> tuple[Any, ...]:
        return state.scores, state.exp_avg, state.exp_avg_sq, state.step, state.weight, state.slot

    cases = [(name, moments, label) for name in dtypes for moments in ("fp32", "bf16") for label in sizes]
    for name, moments, label in cases:
        generator = torch.Generator(device).manual_seed(seed)
        dtype, (m, n, k) = DTYPES[name], sizes[label]
        before = testing.stepped((n, k), 4, dtype, DTYPES[moments], dtype, seed, device)
        if label == "transposed":
            before = before.map(lambda t: t.t().contiguous().t())
        grad_out, x = randn((m, n), dtype), randn((m, k), dtype)
        rows = (k, n) if label == "transposed" else (n, k)
        is_plain = n % 16 == 0 and k % 16 == 0
        is_fused = bool(m) and rules.linear_step(dtype, m, *rows, is_plain, rules.chip(x.device)) is not None
        after = before.map(lambda t: t)
        backend.linear_step_(grad_out, x, lam, *take(after), beta, next_beta, kind, testing.STEP)
        stored = 0.0 if is_fused or dtype == torch.float32 else testing.UNIT_ROUNDOFF[dtype]
        grad = testing.linear_grad_of_step(before, grad_out, x, lam.item(), stored)
        how = "inside its product" if is_fused else "after its product"
        worst = max(testing.worst_step_errors(before, after, *grad).values())
        yield f"triton, linear step {how}, {label}, {name}, moments {moments}", worst
        again = before.map(lambda t: t)
        backend.linear_step_(grad_out, x, lam, *take(again), beta, next_beta, kind, testing.STEP)
        is_same = all(torch.equal(a, b) for a, b in zip(after.written(), again.written(), strict=True))
        yield f"triton, linear step {how}, {label}, {name}, moments {moments}, twice", 0.0 if is_same else float("inf")
        for of_w_eff in (False, True):
            after, grad_dtype = before.map(lambda t: t), dtype if of_w_eff else torch.float32
            given = torch.empty_like(before.weight, dtype=grad_dtype).copy_(randn((n, k), grad_dtype))
            lists = ([tensor] for tensor in (after.scores, given, *take(after)[1:]))
            backend.mask_adamw_(*lists, beta, next_beta, kind, testing.STEP, [lam] if of_w_eff else None)
            grad = testing.grad_of_step(before, given, 0.0, lam.item()) if of_w_eff else (given.double(), 0.0)
            worst = max(testing.worst_step_errors(before, after, *grad).values())
            of = "effective weights" if of_w_eff else "scores"
            yield f"triton, step on gradients of {of}, {label}, {name}, moments {moments}", worst


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, offset: int = 0) -> Tensor:
    """Normal numbers; ``offset`` elements into its memory, so that vector loads would be misaligned."""
    num = torch.Size(shape).numel()
    device = generator.device
    flat = torch.randn(num + offset, generator=generator, device=device).to(dtype)
    return flat[offset:].view(shape)


def _inputs(
    device: str, seed: int, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...], offset: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator(device).manual_seed(seed)
    weights = [_random(shape, dtype, generator, offset) for shape in shapes]
    scores = [_random(shape, torch.float32, generator, offset) for shape in shapes]
    return weights, scores


def effective_weights_error(
    weights: list[Tensor], scores: list[Tensor], beta: float, kind: MaskKind, w_effs: list[Tensor], penalties: Tensor
) -> float:
    """Worst error of w_effs and penalties as a multiple of the allowed one; NaN (an unwritten element) is infinite."""
    worst = 0.0
    for w, s, got, penalty in zip(weights, scores, w_effs, penalties, strict=True):
        m = kind.value(s.double(), beta)
        truth, total = w.double() * m, m.sum()
        plain = (w.float() * kind.value(s, beta)).to(got.dtype)
        plain_total = kind.value(s, beta).sum()
        for value, true, eager, dtype in ((got, truth, plain, got.dtype), (penalty, total, plain_total, torch.float32)):
            if value.numel() == 0:
                continue
            eager_error = (eager.double() - true).abs().max().item()
            bound = testing.error_bound(eager_error, true.abs(), dtype, False)
            error = (value.double() - true).abs()
            ratio = torch.where(error == 0, torch.zeros_like(error), error / bound).max().item()
            worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst


def _run(
    backend: str, weights: list[Tensor], scores: list[Tensor], beta: float, kind: MaskKind, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Into NaN-filled outputs."""
    out = [torch.full_like(w, float("nan"), dtype=dtype) for w in weights]
    with use_backend(backend):
        return effective_weights_raw(weights, scores, torch.tensor(beta, device=weights[0].device), kind, dtype, out)


def _is_equal(a: tuple[list[Tensor], Tensor], b: tuple[list[Tensor], Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip([*a[0], a[1]], [*b[0], b[1]], strict=True))


def effective_weights_checks(backend: str, device: str, seed: int) -> Iterator[Check]:
    """The multi-tensor kernel on ``backend``: dtypes, kinds, betas, odd, misaligned, transposed, empty, many layers."""
    sigmoid, hard = as_kind("sigmoid"), as_kind("hard")

    def worst(
        inputs: tuple[list[Tensor], list[Tensor]], dtype: torch.dtype, beta: float = 3.0, kind: MaskKind = sigmoid
    ) -> float:
        return effective_weights_error(*inputs, beta, kind, *_run(backend, *inputs, beta, kind, dtype))

    for w_name, w_dtype in DTYPES.items():
        for o_name, o_dtype in DTYPES.items():
            inputs = _inputs(device, seed, w_dtype, LAYER_SIZES)
            for kind in (sigmoid, hard):
                yield f"{backend}, {kind.name}, {w_name} to {o_name}", worst(inputs, o_dtype, kind=kind)
    bf16 = torch.bfloat16
    for beta in (0.0, 1.0, 200.0):
        yield f"{backend}, beta {beta:g}", worst(_inputs(device, seed + 1, bf16, LAYER_SIZES), bf16, beta)
    for offset in (1, 2, 3):
        inputs = _inputs(device, seed + 2, bf16, LAYER_SIZES, offset)
        yield f"{backend}, memory off by {offset} elements", worst(inputs, bf16)
    weights, scores = _inputs(device, seed + 3, torch.float32, ((33, 65), (128, 30)))
    yield f"{backend}, transposed", worst(([w.t() for w in weights], [s.t() for s in scores]), torch.float32)
    many = tuple((1 + 37 * i % 1009,) for i in range(200))
    yield f"{backend}, 200 layers", worst(_inputs(device, seed + 4, bf16, many), bf16)
    inputs = _inputs(device, seed + 5, bf16, ((3072, 768), (768, 3072)))
    yield f"{backend}, 3072x768", worst(inputs, bf16)
    runs = [_run(backend, *inputs, 3.0, sigmoid, bf16) for _ in range(5)]
    is_same = all(_is_equal(runs[0], run) for run in runs)
    yield f"{backend}, five runs are bit-identical", 0.0 if is_same else float("inf")


def graph_check(backend: str, device: str, seed: int) -> Iterator[Check]:
    """A captured launch reads scores and beta when it is replayed."""
    from .timing import as_cuda_graph

    kind = as_kind("sigmoid")
    weights, scores = _inputs(device, seed, torch.bfloat16, LAYER_SIZES)
    beta = torch.tensor(1.0, device=device)
    out = [torch.full_like(w, float("nan")) for w in weights]
    penalties: list[Tensor] = []

    def launch() -> None:
        with use_backend(backend):
            penalties[:] = [effective_weights_raw(weights, scores, beta, kind, torch.bfloat16, out)[1]]

    replay = as_cuda_graph(launch)
    for s in scores:
        s.neg_()
    beta.fill_(5.0)
    replay()
    torch.cuda.synchronize()
    worst = effective_weights_error(weights, scores, 5.0, kind, out, penalties[0])
    yield f"{backend}, replayed graph sees new scores and beta", worst


PRODUCT_SIZES = (  # m, n, k: one tile and many, tails of every size, more tiles than processors, sums in parts
    (1, 8, 8), (100, 136, 264), (64, 128, 256), (513, 1000, 2056), (1024, 768, 3072), (5000, 512, 128),
)  # fmt: skip


def cuda_score_gradient_checks(seed: int, is_large: bool = True) -> Iterator[Check]:
    """Every compiled score-gradient product that runs here, whatever dispatch would choose, into NaN-filled memory."""
    on = cuda_gemm.gpu(torch.cuda.current_device())
    if not cuda_gemm.kernels():
        raise RuntimeError("the extension was built without CUTLASS: there are no products to check")
    for dtype, weight_dtype in itertools.product(DTYPES.values(), DTYPES.values()):
        for kernel in cuda_gemm.served(dtype, weight_dtype, on, cuda_gemm.kernels()):
            for m, n, k in PRODUCT_SIZES if is_large else PRODUCT_SIZES[:3]:
                error = _score_gradient_error(kernel, m, n, k, dtype, weight_dtype, seed)
                yield f"cuda, {kernel}, {m}x{n}x{k}", error


def _score_gradient_error(
    kernel: str, m: int, n: int, k: int, dtype: torch.dtype, weight_dtype: torch.dtype, seed: int
) -> float:
    """Worst error as a multiple of the allowed one, of a launch and of a replayed CUDA graph after the scores, beta and
    the penalty's gradient changed; infinite where the two runs on the same inputs differ in a bit."""
    from .timing import as_cuda_graph

    generator = torch.Generator("cuda").manual_seed(seed)
    grad_out, x = _random((m, n), dtype, generator), _random((m, k), dtype, generator)
    weight, scores = _random((n, k), weight_dtype, generator), _random((n, k), torch.float32, generator)
    beta, penalty = torch.tensor(2.0, device="cuda"), torch.tensor(0.5, device="cuda")
    out = torch.full_like(scores, float("nan"))
    op = torch.ops.subnet_native.score_gradient.default

    def launch() -> None:
        op(grad_out, penalty, x, weight, scores, beta, kernel, out)

    def error() -> float:
        z = beta.double() * scores.double()
        slope = beta.double() * torch.sigmoid(z) * torch.sigmoid(-z)
        g, v, w = grad_out.double(), x.double(), weight.double()
        true = (g.t().mm(v) * w + penalty.double()) * slope
        size = (g.abs().t().mm(v.abs()) * w.abs() + penalty.double().abs()) * slope
        # the product stays in fp32: as exact as an fp32 one, its m products summed in any order
        ratio = (out.double() - true).abs() / ((m + 16) * 2.0**-24 * size * (1 + z.abs() / 4) + 1e-28)
        worst = ratio.max().item()
        return worst if worst == worst else float("inf")

    launch()
    first, worst = out.clone(), error()
    out.fill_(float("nan"))
    launch()
    if not torch.equal(first, out):
        return float("inf")
    replay = as_cuda_graph(launch)
    scores.neg_()
    beta.fill_(5.0)
    penalty.fill_(-0.25)
    out.fill_(float("nan"))
    replay()
    torch.cuda.synchronize()
    return max(worst, error())


def cuda_few_rows_checks(seed: int) -> Iterator[Check]:
    """The linear layer whose mask is made inside its product, on the backend that dispatch would give it to."""
    op = functools.partial(testing.ours, backend="cuda", plan="recompute")
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        for m, n, k in ((1, 8, 8), (16, 100, 264), (33, 130, 1000), (64, 4096, 512), (256, 768, 3072), (257, 64, 64)):
            case = testing.linear_case(m, n, k, dtype, seed=seed, device="cuda")
            yield f"cuda, few rows, {m}x{n}x{k}, {name}", max(testing.worst_errors(case, op).values())


def refusal_check(device: str) -> Iterator[Check]:
    """A backend asked for by name refuses what it can't run, in words, and never falls back."""
    weight, scores = torch.ones(4, 4, device=device), torch.ones(4, 1, device=device)
    beta = torch.tensor(1.0, device=device)
    try:
        with use_backend("cuda"):
            effective_weights_raw([weight], [scores], beta, as_kind("sigmoid"), torch.float32)
        yield "cuda refuses coarse scores", float("inf")
    except BackendRefused:
        yield "cuda refuses coarse scores", 0.0


def main() -> int:
    """``TRITON_INTERPRET=1 python -m benchmarks.gpu_correctness`` (on a GPU without the switch): a line per check of
    the Triton backend, error as a multiple of the allowed one; 1 if one is above 1."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    worst = 0.0
    is_large = device == "cuda"
    for name, ratio in itertools.chain(triton_checks(device, 0, is_large), step_checks(device, 0, is_large)):
        print(f"{ratio:6.3f}  {name}", flush=True)
        worst = max(worst, ratio)
    return 0 if worst <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
