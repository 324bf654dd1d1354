"""The one runner: check, time all contenders of a case side by side, measure memory; a row per contender."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from subnet_kernels import testing

from . import kernels, memory
from .cases import DTYPES, KernelCase, LayerCase
from .ceilings import Ceilings
from .contenders import Contender, Eager, check_capturable, make_contenders
from .rows import RATIOS, Row
from .timing import Function, Timing, TimingConfig, as_cuda_graph, time_interleaved

PHASES = ("forward", "forward_backward", "step")
MODES = ("eager", "graph")
OURS = ("ours", "ours_in_backward", "ours_bf16_moments", "ours_lean", "ours_op")


@dataclass
class Settings:
    """baselines, ours: names of contenders of layers; models: of whole models. modes: "eager" (launched) and "graph"
    (replays of CUDA graphs). say: progress and refusals; fail: contenders of ours that raised."""

    device: str = "cpu"
    timing: TimingConfig = field(default_factory=TimingConfig)
    baselines: tuple[str, ...] = ("eager", "compile", "linear", "linear_amp", "neurosurgeon")
    ours: tuple[str, ...] = OURS
    models: tuple[str, ...] = ("eager", "compile", "finetune", "finetune_amp", "ours", "ours_compile")
    phases: tuple[str, ...] = PHASES
    modes: tuple[str, ...] = ("eager",)
    with_memory: bool = True
    say: Callable[[str], None] = print
    fail: Callable[[str], None] = print

    def broke(self, case: str) -> Callable[[str, Exception], None]:
        """What to call with a contender's name and what it raised: one of ours has failed, a baseline is left out."""

        def say(name: str, error: Exception) -> None:
            text = f"{name} of {case}: {type(error).__name__}: {first_line(error)}"
            self.fail(text) if name.startswith("ours") else self.say(f"left out {text}")

        return say


@contextlib.contextmanager
def tuned_convolutions(is_tuned: bool = True) -> Iterator[None]:
    """cuDNN tries its algorithms, as training at fixed sizes does; not where gates convolve in fp64."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, is_tuned
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def gate_layers(
    case: testing.Case, contenders: list[Contender], broke: Callable[[str, Exception], None] | None = None
) -> dict[str, float]:
    """Per masked contender the largest error of out, penalty and gradients, as a multiple of the allowed one. With
    ``broke``, a contender that raises is named there and leaves ``contenders``."""
    with tuned_convolutions(False):
        true, size, eager = testing.truth(case), testing.absolute(case), testing.run(case, testing.plain)
    worst: dict[str, float] = {}
    for contender in list(contenders):
        try:
            contender.forward_backward()  # compiles, too
            out, penalty = contender.forward() if contender.is_masked else (None, None)
        except Exception as error:
            if broke is None:
                raise
            broke(contender.name, error)
            contenders.remove(contender)
            continue
        if out is None:
            continue
        results = {"out": out, "grad_x": contender.x.grad, "grad_scores": contender.trained.grad}
        if penalty is not None:
            results["penalty"] = penalty
        ratios = []
        for name, value in results.items():
            assert value is not None
            dtype = torch.float32 if name == "penalty" else case.x.dtype
            eager_error = (eager[name].double() - true[name]).abs().max().item()
            bound = testing.error_bound(eager_error, size[name], dtype, name.startswith("grad_"))
            error = (value.detach().double() - true[name]).abs()
            ratio = torch.where(error == 0, torch.zeros_like(error), error / bound).max().item()
            ratios.append(ratio if ratio == ratio else float("inf"))
        worst[contender.name] = max(ratios)
    return worst


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def gate_replay(contender: Contender, replay: Function, grad_x: Tensor, eager: Contender) -> float:
    """Whether replays see the scores of their moment: scores are negated, a replay may bring what is kept up to date,
    and the next one's gradient of x must be eager's with the scores found before it: ||difference|| / ||eager's|| in
    multiples of 16 unit roundoffs (a stale effective weight makes it about 1)."""
    with torch.no_grad():
        contender.trained.neg_()
    replay()
    with torch.no_grad():
        eager.trained.copy_(contender.trained)
    eager.forward_backward()
    replay()
    expected = eager.x.grad
    assert expected is not None
    difference = (grad_x.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)
    ratio = difference.item() / (16 * testing.UNIT_ROUNDOFF[grad_x.dtype])
    return ratio if ratio == ratio else float("inf")


def in_mode(
    mode: str, functions: dict[str, Function], what: str, settings: Settings,
    leaves_of: Callable[[str], Iterable[Tensor]] = lambda name: (),
    check: Callable[[str], None] = lambda name: None,
) -> dict[str, Function]:
    """The functions themselves, or replays of their CUDA graphs; what can't be captured (``check`` raises Skipped where
    that is known beforehand) is said and left out."""
    if mode == "eager":
        return dict(functions)
    graphs = {}
    for name, function in functions.items():
        try:
            function()  # makes optimizers
            check(name)
            graphs[name] = as_cuda_graph(function, leaves_of(name))
        except RuntimeError as error:
            settings.say(f"left out {name} of {what} as a CUDA graph: {first_line(error)}")
    return graphs


def make_row(suite: str, case: str, phase: str, name: str, mode: str, timings: dict[str, Timing]) -> Row:
    """A row with its times and its ratios to the baselines timed beside it."""
    timing = timings[name]
    row = Row(
        suite, case, phase, name, mode, len(timing.samples),
        timing.percentile_us(50), timing.percentile_us(20), timing.percentile_us(80),
    )  # fmt: skip
    for baseline in RATIOS:
        if baseline in timings and baseline != name:
            setattr(row, f"x_{baseline}", timing.ratio(timings[baseline]))
    if "linear" in timings and name != "linear":
        row.over_linear_us = timing.over_us(timings["linear"])
    return row


def set_floor(
    row: Row, ceilings: Ceilings, flops: float, num_bytes: int, dtype: torch.dtype, working_set: int | None = None
) -> None:
    """The least time this machine could take, and whether the case lives in the L2 cache."""
    floor = ceilings.floor_s(flops, num_bytes, dtype)
    row.gflop, row.least_mb = flops / 1e9, num_bytes / 2**20
    row.floor_us, row.ceiling_fraction = floor * 1e6, floor * 1e6 / row.median_us if row.median_us else None
    if ceilings.device == "cuda":
        fits = (working_set or num_bytes) <= torch.cuda.get_device_properties(0).L2_cache_size
        row.state = "l2-hot" if fits else "beyond-l2"


def free_memory(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def run_layer(
    case: LayerCase, settings: Settings, ceilings: Ceilings, suite: str = "layers"
) -> list[Row]:
    """Rows of one masked layer against the baselines, in every phase and mode."""
    inputs = case.build(settings.device)
    if "ours_fresh" in settings.ours:  # layers called without their penalty: check the same gradients without it
        inputs.grad_penalty = 0.0
    contenders = make_contenders(inputs, [*settings.baselines, *settings.ours], settings.say)
    worst = gate_layers(inputs, contenders, settings.broke(case.name))
    memories = {}
    if settings.with_memory:
        memories = {c.name: (memory.kept_bytes(c), memory.peak_bytes(c)) for c in contenders}
    rows: list[Row] = []
    with tuned_convolutions():
        for phase in settings.phases:
            for mode in settings.modes:
                rows += _layer_phase(suite, case, phase, mode, contenders, settings, ceilings, worst)
                free_memory(settings.device)
    weight_bytes = case.num_weights * DTYPES[case.dtype].itemsize
    for row in rows:
        if row.contender in memories:
            kept, peak = memories[row.contender]
            row.kept_mb, row.kept_weights, row.peak_mb = kept / 2**20, kept / weight_bytes, peak / 2**20
    return rows


def _layer_phase(
    suite: str, case: LayerCase, phase: str, mode: str, contenders: Sequence[Contender], settings: Settings,
    ceilings: Ceilings, worst: dict[str, float],
) -> list[Row]:
    by_name = {c.name: c for c in contenders}

    def check(name: str) -> None:
        if phase == "step":
            check_capturable(by_name[name].optimizer)

    functions = in_mode(
        mode, {c.name: getattr(c, phase) for c in contenders if phase in c.phases}, f"{case.name} {phase}", settings,
        lambda name: by_name[name].leaves(), check,
    )  # fmt: skip
    if not functions:
        return []
    written = {name: by_name[name].x.grad for name in functions}  # by replays: nobody may drop it before the check
    timings = time_interleaved(functions, settings.device, settings.timing)
    num_products = 1 if phase == "forward" else 3
    rows = []
    reference = Eager(by_name[next(iter(functions))].case) if mode == "graph" and phase != "forward" else None
    for name in timings:
        row = make_row(suite, case.name, phase, name, mode, timings)
        row.gate, row.note = worst.get(name), by_name[name].note()
        grad_x = written[name]
        sees_scores = by_name[name].is_masked and by_name[name].remakes_mask
        if reference is not None and sees_scores and grad_x is not None:
            replayed = gate_replay(by_name[name], functions[name], grad_x, reference)
            row.gate = max(row.gate or 0.0, replayed)
        set_floor(
            row, ceilings, num_products * case.product_flops(), case.fewest_bytes(phase), DTYPES[case.dtype],
            case.working_set(phase),
        )  # fmt: skip
        rows.append(row)
    return rows


def run_memory(case: LayerCase, settings: Settings, ceilings: Ceilings) -> list[Row]:
    """Rows with bytes only: kept between forward and backward, the peak of both, and of a step."""
    inputs = case.build(settings.device)
    contenders = make_contenders(inputs, [*settings.baselines, *settings.ours], settings.say)
    worst = gate_layers(inputs, contenders, settings.broke(case.name))
    weight_bytes = case.num_weights * DTYPES[case.dtype].itemsize
    rows = []
    for c in contenders:
        kept, peak = memory.kept_bytes(c), memory.peak_bytes(c)
        row = Row("memory", case.name, "forward_backward", c.name, "eager", 0, None, None, None, gate=worst.get(c.name))
        row.kept_mb, row.kept_weights, row.peak_mb = kept / 2**20, kept / weight_bytes, peak / 2**20
        row.step_bytes = memory.step_bytes(c) / case.num_weights
        rows.append(row)
    return rows


@torch.no_grad()
def run_kernel(case: KernelCase, settings: Settings, ceilings: Ceilings) -> list[Row]:
    """Rows of one op alone."""
    problem = kernels.make_problem(case, settings.device)
    ours = ("ours", "ours_buffer", "ours_fused", "ours_flat", "ours_bf16")
    wanted = ("eager", "mm", *ours, *settings.baselines)  # gates need eager
    problem.functions = {n: f for n, f in problem.functions.items() if n in wanted or n.startswith("ours_sm")}
    worst = kernels.gate(problem, settings.broke(case.name))
    functions = dict(problem.functions)
    peaks = {}
    if settings.with_memory:
        peaks = {name: memory.peak_of(f, settings.device) / 2**20 for name, f in functions.items()}
    rows = []
    for mode in settings.modes:
        chosen = dict(functions)
        if mode == "graph" and case.op == "effective_weights":  # its outputs, new at every call, are in its table
            chosen.pop("ours", None)
            settings.say(f"left out ours of {case.name} as a CUDA graph: it allocates; ours_buffer does not")
        timings = time_interleaved(in_mode(mode, chosen, case.name, settings), settings.device, settings.timing)
        for name in timings:
            row = make_row("kernels", case.name, "forward", name, mode, timings)
            row.gate, row.note = worst.get(name), problem.note if name.startswith("ours") else ""
            row.peak_mb = peaks.get(name)
            set_floor(row, ceilings, problem.flops, problem.num_bytes, DTYPES[case.dtype])
            rows.append(row)
    return rows


def run_overhead(case: LayerCase, settings: Settings, ceilings: Ceilings) -> list[Row]:
    """Rows of a tiny layer: what a call costs over nn.Linear's, with gradients on and no penalty asked for."""
    overhead = replace(
        settings, baselines=("eager", "linear"), ours=("ours_fresh", "ours_cleared"),
        phases=("forward", "forward_backward"), with_memory=settings.device == "cuda",
    )  # fmt: skip
    return run_layer(case, overhead, ceilings, "overhead")
