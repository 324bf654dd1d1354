"""The one runner: check, time all contenders of a case side by side, measure memory; a row per contender."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from subnet_kernels import testing

from . import kernels, memory
from .cases import DTYPES, KernelCase, LayerCase
from .ceilings import Ceilings
from .contenders import Contender, make_contenders
from .rows import RATIOS, Row
from .timing import Function, Timing, TimingConfig, as_cuda_graph, time_interleaved

PHASES = ("forward", "forward_backward", "step")


@dataclass
class Settings:
    """baselines: names beside ours. mode: "eager", or "graph" (CUDA graphs; no step). say: progress and refusals."""

    device: str = "cpu"
    timing: TimingConfig = field(default_factory=TimingConfig)
    baselines: tuple[str, ...] = ("eager", "compile", "linear", "neurosurgeon")
    phases: tuple[str, ...] = PHASES
    mode: str = "eager"
    with_memory: bool = True
    say: Callable[[str], None] = print


def gate_layers(case: testing.Case, contenders: list[Contender]) -> dict[str, float]:
    """Per masked contender the largest error of out, penalty and gradients, as a multiple of the allowed one."""
    true, size, eager = testing.truth(case), testing.absolute(case), testing.run(case, testing.plain)
    worst: dict[str, float] = {}
    for contender in contenders:
        contender.forward_backward()  # compiles, too
        if not contender.is_masked:
            continue
        out, penalty = contender.forward()
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


def _in_mode(functions: dict[str, Function], what: str, settings: Settings) -> dict[str, Function]:
    """The functions themselves, or replays of their CUDA graphs; what can't be captured is said and left out."""
    if settings.mode == "eager":
        return functions
    graphs = {}
    for name, function in functions.items():
        try:
            graphs[name] = as_cuda_graph(function)
        except RuntimeError as error:
            settings.say(f"left out {name} of {what} as a CUDA graph: {str(error).splitlines()[0]}")
    return graphs


def _ratios(row: Row, name: str, timings: dict[str, Timing]) -> None:
    for baseline in RATIOS:
        if baseline in timings and baseline != name:
            setattr(row, f"x_{baseline}", timings[name].ratio(timings[baseline]))


def _row(suite: str, case: str, phase: str, name: str, mode: str, timings: dict[str, Timing]) -> Row:
    timing = timings[name]
    row = Row(
        suite, case, phase, name, mode, len(timing.samples),
        timing.percentile_us(50), timing.percentile_us(20), timing.percentile_us(80),
    )  # fmt: skip
    _ratios(row, name, timings)
    if "linear" in timings and name != "linear":
        row.over_linear_us = timing.over_us(timings["linear"])
    return row


def run_layer(
    case: LayerCase, settings: Settings, ceilings: Ceilings, ours: tuple[str, ...] = ("ours", "ours_op"),
    suite: str = "layers",
) -> list[Row]:
    """Rows of one masked layer against the baselines, in every phase."""
    inputs = case.build(settings.device)
    if "ours_fresh" in ours:  # layers called without their penalty: check the same gradients without it
        inputs.grad_penalty = 0.0
    contenders = make_contenders(inputs, [*settings.baselines, *ours], settings.say)
    worst = gate_layers(inputs, contenders)
    memories = {}
    if settings.with_memory:
        memories = {c.name: (memory.kept_bytes(c), memory.peak_bytes(c)) for c in contenders}
    weight_bytes = case.num_weights * DTYPES[case.dtype].itemsize
    rows = []
    for phase in settings.phases:
        functions = _in_mode({c.name: getattr(c, phase) for c in contenders}, f"{case.name} {phase}", settings)
        timings = time_interleaved(functions, settings.device, settings.timing)
        num_products = 1 if phase == "forward" else 3
        floor = ceilings.floor_s(num_products * case.product_flops(), case.fewest_bytes(phase), DTYPES[case.dtype])
        for contender in (c for c in contenders if c.name in timings):
            row = _row(suite, case.name, phase, contender.name, settings.mode, timings)
            row.gate = worst.get(contender.name)
            row.floor_us, row.ceiling_fraction = floor * 1e6, floor * 1e6 / timings[row.contender].percentile_us(50)
            if contender.name in memories:
                kept, peak = memories[contender.name]
                row.kept_mb, row.kept_weights, row.peak_mb = kept / 2**20, kept / weight_bytes, peak / 2**20
            rows.append(row)
    return rows


def run_memory(case: LayerCase, settings: Settings, ceilings: Ceilings) -> list[Row]:
    """Rows with bytes only: kept between forward and backward, and the peak of both."""
    inputs = case.build(settings.device)
    contenders = make_contenders(inputs, [*settings.baselines, "ours", "ours_op"], settings.say)
    worst = gate_layers(inputs, contenders)
    weight_bytes = case.num_weights * DTYPES[case.dtype].itemsize
    rows = []
    for c in contenders:
        kept, peak = memory.kept_bytes(c), memory.peak_bytes(c)
        row = Row("memory", case.name, "forward_backward", c.name, "eager", 0, None, None, None, gate=worst.get(c.name))
        row.kept_mb, row.kept_weights, row.peak_mb = kept / 2**20, kept / weight_bytes, peak / 2**20
        rows.append(row)
    return rows


@torch.no_grad()
def run_kernel(case: KernelCase, settings: Settings, ceilings: Ceilings) -> list[Row]:
    """Rows of one elementwise op alone."""
    problem = kernels.make_problem(case, settings.device)
    wanted = ("eager", "ours", "ours_buffer", *settings.baselines)  # the gate needs eager
    problem.functions = chosen = {name: f for name, f in problem.functions.items() if name in wanted}
    worst = kernels.gate(problem)
    timings = time_interleaved(_in_mode(dict(chosen), case.name, settings), settings.device, settings.timing)
    floor = problem.num_bytes / ceilings.bytes_per_s(problem.num_bytes)
    rows = []
    for name in timings:
        row = _row("kernels", case.name, "forward", name, settings.mode, timings)
        row.gate, row.note = worst[name], problem.note if name.startswith("ours") else ""
        row.floor_us, row.ceiling_fraction = floor * 1e6, floor * 1e6 / timings[row.contender].percentile_us(50)
        rows.append(row)
    return rows


def run_overhead(case: LayerCase, settings: Settings, ceilings: Ceilings) -> list[Row]:
    """Rows of a tiny layer: what a call costs over nn.Linear's, with gradients on and no penalty asked for."""
    overhead = Settings(
        settings.device, settings.timing, ("eager", "linear"), ("forward", "forward_backward"), settings.mode, False,
        settings.say,
    )  # fmt: skip
    return run_layer(case, overhead, ceilings, ("ours_fresh", "ours_cleared"), "overhead")
