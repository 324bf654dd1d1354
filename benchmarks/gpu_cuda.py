"""What gpu_check checks of the CUDA C++ kernels beside effective weights, against fp64, and how fast the optimizer's
pass over memory is: ours on each backend beside torch's fused AdamW.

Checks are as in gpu_correctness.py: fresh inputs from the seed, outputs filled with NaN, the worst error as a multiple
of the allowed one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from subnet_kernels import testing
from subnet_kernels.backends.base import AdamW, Backend
from subnet_kernels.dispatch import BACKENDS
from subnet_kernels.masks import as_kind
from subnet_kernels.random import plain_random_bits

from .cases import BETA, LAM
from .ceilings import Ceilings
from .rows import Row
from .runner import Settings, in_mode, make_row, set_floor
from .timing import time_interleaved

Check = tuple[str, float]
KIND, HARD = as_kind("sigmoid"), as_kind("hard")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
BLOCK = 4096  # elements per thread block (csrc/cuda/kernels.h): sizes around it are where bounds could be wrong
SHAPES = ((1,), (7, 1), (31, 33), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (0, 5), (257, 389), (64, 3, 3, 3))


def equal_error(pairs: list[tuple[Tensor, Tensor]]) -> float:
    return 0.0 if all(torch.equal(a, b) for a, b in pairs) else float("inf")


def worst_ratio(got: Tensor, true: Tensor, bound: Tensor) -> float:
    if not got.numel():
        return 0.0
    error = (got.double() - true).abs()
    ratio = torch.where(error == 0, torch.zeros_like(error), error / bound).max().item()
    return ratio if ratio == ratio else float("inf")


class Inputs:
    """Random tensors on a device; ``offset`` elements into their memory, where vector accesses would be misaligned."""

    def __init__(self, device: str, seed: int) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
        num = torch.Size(shape).numel() + offset
        return torch.randn(num, generator=self.generator, device=self.device).to(dtype)[offset:].view(shape)

    def number(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.device)


def grad_scores_checks(device: str, seed: int, backend: Backend) -> Iterator[Check]:
    """Score gradients of many tensors in one launch and of one with its weight's gradient, and the penalty's."""
    randn = Inputs(device, seed)
    beta, lam, u = randn.number(BETA), randn.number(0.37), testing.UNIT_ROUNDOFF[torch.float32]
    for g_name, g_dtype in DTYPES.items():
        for w_name, w_dtype in DTYPES.items():
            offsets = [i % 3 for i in range(len(SHAPES))]
            lists = [
                [randn(shape, dtype, offset) for shape, offset in zip(SHAPES, offsets, strict=True)]
                for dtype in (g_dtype, w_dtype, torch.float32)
            ]
            truths = []
            for g, w, s in zip(*lists, strict=True):
                slope, product = KIND.slope(s.double(), BETA), g.double() * w.double()
                bound = 8 * u * (product.abs() + 0.37) * slope * (1 + BETA * s.double().abs())
                truths.append(((product + 0.37) * slope, bound))
            grads, weights, scores = lists
            worst = 0.0
            for g, w, s, truth in zip(grads, weights, scores, truths, strict=True):
                ds, dw = backend.grad_scores(g, lam, w, s, beta, KIND, True, True)
                assert ds is not None and dw is not None
                m, tiny = KIND.value(s.double(), BETA), 2.0**-24 if w_dtype == torch.float16 else 0.0
                slack = 1.01 * testing.UNIT_ROUNDOFF[w_dtype] + 8 * u * (1 + BETA * s.double().abs())
                of_weight = worst_ratio(dw, g.double() * m, g.double().abs() * m * slack + tiny)
                worst = max(worst, worst_ratio(ds, *truth), of_weight)
                _, dw = backend.grad_scores(g, None, w, s, beta, HARD, True, True)
                assert dw is not None
                worst = max(worst, equal_error([(dw, (g * (s > 0)).to(w_dtype))]))
            made = backend.grad_scores_of_many([g.clone() for g in grads], [lam] * len(grads), *lists[1:], beta, KIND)
            worst = max(worst, *(worst_ratio(ds, *truth) for ds, truth in zip(made, truths, strict=True)))
            yield f"{backend.name}, grad_scores, gradients {g_name}, weights {w_name}", worst
    grads, scores = [randn(shape) for shape in SHAPES], [randn(shape) for shape in SHAPES]
    before = [g.double() for g in grads]
    backend.add_penalty_grad_(grads, scores, [3] * len(grads), beta, lam, KIND)
    worst = 0.0
    for grad, old, s in zip(grads, before, scores, strict=True):
        added = 0.37 * 3 * KIND.slope(s.double(), BETA)
        bound = 8 * u * (old.abs() + added * (1 + BETA * s.double().abs()))
        worst = max(worst, worst_ratio(grad, old + added, bound))
    yield f"{backend.name}, add_penalty_grad", worst


def step_checks(device: str, seed: int, backend: Backend) -> Iterator[Check]:
    """The optimizer's step of many tensors in one launch: gradients of scores and of effective weights, moments in fp32
    and bf16, every dtype, misaligned memory, lr and lam as numbers and on the device; twice, to the bit."""
    beta, next_beta = (torch.tensor(value, device=device) for value in (testing.STEP_BETA, testing.NEXT_BETA))
    lam = torch.tensor(0.37, device=device)
    on_device = testing.STEP._replace(
        lr=torch.tensor(float(testing.STEP.lr), device=device), lam=torch.tensor(float(testing.STEP.lam), device=device)
    )
    for name, dtype in DTYPES.items():
        for moments in ("fp32", "bf16"):
            for of_w_eff in (False, True):
                randn = Inputs(device, seed)
                before = [
                    testing.stepped(shape, 1 + i, dtype, DTYPES[moments], dtype if i % 2 else None, seed + i, device)
                    for i, shape in enumerate(SHAPES)
                ]
                before[5] = before[5].map(lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape))
                given = [randn(shape, dtype if of_w_eff else torch.float32) for shape in SHAPES]
                runs = []
                for _ in range(2):
                    after = [state.map(lambda t: t) for state in before]
                    lists = zip(*((s.scores, s.exp_avg, s.exp_avg_sq, s.step, s.weight, s.slot) for s in after))
                    scores, *rest = (list(part) for part in lists)
                    lams = [lam] * len(after) if of_w_eff else None
                    backend.mask_adamw_(
                        scores, given, *rest, beta, next_beta, KIND, on_device if of_w_eff else testing.STEP, lams
                    )
                    runs.append(after)
                worst = 0.0
                for old, new, grad in zip(before, runs[0], given, strict=True):
                    truth = testing.grad_of_step(old, grad, 0.0, lam.item()) if of_w_eff else (grad.double(), 0.0)
                    worst = max(worst, *testing.worst_step_errors(old, new, *truth).values())
                what = f"{backend.name}, step, {name}, moments {moments}, of {'w_eff' if of_w_eff else 'scores'}"
                yield what, worst
                both = [pair for a, b in zip(*runs, strict=True) for pair in zip(a.written(), b.written(), strict=True)]
                yield f"{what}, twice", equal_error(both)


def bit_checks(device: str, seed: int) -> Iterator[Check]:
    """Packed masks and random bits: those of plain PyTorch."""
    import subnet_kernels

    randn = Inputs(device, seed)
    for num in (0, 1, 7, 8, 9, 2047, 2049, 300_011):
        for offset in (0, 1):
            mask = randn((num,), offset=offset) > 0
            bits = torch.nn.functional.pad(mask.cpu().to(torch.uint8), (0, -num % 8)).view(-1, 8)
            packed = (bits << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)
            made = subnet_kernels.pack_mask(mask)
            again = subnet_kernels.unpack_mask(made, (num,))
            yield f"pack_mask, {num} elements off by {offset}", equal_error([(made.cpu(), packed), (again, mask)])
    for shape in ((5,), (67, 129), (300, 4096)):
        seeds = [torch.tensor(value, device=device) for value in (seed - 3, seed + 2**40)]
        made = subnet_kernels.random_bits(*seeds, shape, num_samples=3).cpu().to(torch.int32)
        sizes = (shape[0], shape[1]) if len(shape) > 1 else (1, shape[0])
        true = plain_random_bits(*(value.cpu() for value in seeds), 3, *sizes).to(torch.int32).view(made.shape)
        yield f"random_bits, {shape}", equal_error([(made, true)])


def layer_checks(device: str, seed: int) -> Iterator[Check]:
    """Linear layers and convolutions on the backend, forward and backward."""
    op = functools.partial(testing.ours, backend="cuda")
    for name, dtype in DTYPES.items():
        cases = {
            "13x17x29": testing.linear_case(13, 17, 29, dtype, seed=seed, device=device),
            "transposed": testing.linear_case(5, 24, 16, dtype, is_transposed=True, seed=seed, device=device),
            "hard": testing.linear_case(9, 11, 13, dtype, kind="hard", seed=seed, device=device),
            "empty batch": testing.linear_case(0, 11, 13, dtype, seed=seed, device=device),
            "768x3072, M 1024": testing.linear_case(1024, 768, 3072, dtype, seed=seed, device=device),
            "conv": testing.conv_case((2, 8, 9, 9), (6, 8, 3, 3), dtype, padding=1, seed=seed, device=device),
            "conv, channels_last": testing.conv_case(
                (2, 8, 9, 9), (6, 8, 3, 3), dtype, padding=1, is_channels_last=True, seed=seed, device=device
            ),
        }  # fmt: skip
        for label, case in cases.items():
            yield f"cuda, {case.op}, {label}, {name}", max(testing.worst_errors(case, op).values())


def cuda_checks(device: str, seed: int) -> Iterator[Check]:
    """All of them on the backend ``cuda``."""
    yield from grad_scores_checks(device, seed, BACKENDS["cuda"])
    yield from step_checks(device, seed, BACKENDS["cuda"])
    yield from bit_checks(device, seed)


# --- the optimizer's pass over memory --------------------------------------------------------------------------------

NUMBERS = AdamW(1e-4, 0.9, 0.999, 1e-8, 0.01, LAM)
BYTES = {"fused_adamw": 28, "fp32": 32, "bf16": 24}  # a weight: torch's step alone; ours with bf16 weights, by moments


def adamw_functions(num: int, device: str, backends: tuple[Backend, ...]) -> dict[str, tuple[Callable[[], None], int]]:
    """Name -> (one step over ``num`` bf16 weights, bytes that it must move): ours on each backend, with moments in fp32
    and bf16, and torch's fused AdamW, which adds no penalty and makes no effective weight."""
    randn = Inputs(device, 0)
    weight, grad = randn((num,), torch.bfloat16), randn((num,))
    beta, step = randn.number(BETA), randn.number(1.0)

    def ours(backend: Backend, dtype: torch.dtype) -> Callable[[], None]:
        scores, moments = grad.clone(), [torch.zeros_like(grad, dtype=dtype) for _ in range(2)]
        slot = torch.empty_like(weight), torch.empty_like(beta)
        return lambda: backend.mask_adamw_(
            [scores], [grad], [moments[0]], [moments[1]], [step], [weight], [slot], beta, beta, KIND, NUMBERS
        )

    def fused_adamw() -> None:
        torch._fused_adamw_(
            [scores], [grad], moments[:1], moments[1:], [], [step], lr=1e-4, beta1=0.9, beta2=0.999,
            weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    scores, moments = grad.clone(), [torch.zeros_like(grad), torch.zeros_like(grad)]
    functions = {"fused_adamw": (fused_adamw, BYTES["fused_adamw"] * num)}
    for backend in backends:
        for name in ("fp32", "bf16"):
            functions[f"ours_{backend.name}_{name}"] = ours(backend, DTYPES[name]), BYTES[name] * num
    return functions


def run_adamw(num: int, settings: Settings, ceilings: Ceilings, backends: tuple[Backend, ...]) -> list[Row]:
    """Rows of one step over ``num`` weights; ceiling_fraction is the fraction of the copy bandwidth of this run."""
    functions = adamw_functions(num, settings.device, backends)
    case, rows = f"mask_adamw_{num}", []
    for mode in settings.modes:
        calls = in_mode(mode, {name: call for name, (call, _) in functions.items()}, case, settings)
        timings = time_interleaved(calls, settings.device, settings.timing)
        for name in timings:
            row = make_row("kernels", case, "step", name, mode, timings)
            set_floor(row, ceilings, 0.0, functions[name][1], torch.float32)
            rows.append(row)
    return rows
