"""What the GPU kernels aim at, as data, and the short table that says what was reached."""

from __future__ import annotations

from dataclasses import dataclass

from .rows import Row, aligned

WIDTH = 150  # characters a line of the short table
ROW_LIMIT = 22
COLUMNS = ("eager", "compile", "compile_max", "linear", "finetune", "finetune_amp", "mm")


@dataclass(frozen=True)
class Aim:
    """``column`` of ours' row must be at least ``least``; bf16, CUDA graphs, one run on an H200. rival_mode: the
    baseline in another mode than ours, as its users run it (the ratio of the medians then)."""

    case: str
    phase: str
    column: str
    least: float
    contender: str = "ours"
    mode: str = "graph"
    rival_mode: str = ""

    def value(self, rows: list[Row]) -> float | None:
        """What a run reached; None if it has no such row."""
        found = {(row.case, row.phase, row.contender, row.mode): row.median_us for row in rows}
        if self.rival_mode:
            ours = found.get((self.case, self.phase, self.contender, self.mode))
            rival = found.get((self.case, self.phase, self.column.removeprefix("x_"), self.rival_mode))
            return rival / ours if ours and rival else None
        for row in rows:
            if (row.case, row.phase, row.contender, row.mode) == (self.case, self.phase, self.contender, self.mode):
                if (value := getattr(row, self.column)) is not None:
                    return value
        return None


AIMS = (
    Aim("linear_768x3072_m1024_bf16", "step", "x_eager", 2.5),
    Aim("linear_768x3072_m1024_bf16", "step", "x_compile", 1.2),
    Aim("linear_768x3072_m10240_bf16", "step", "x_eager", 1.3),
    Aim("linear_768x3072_m10240_bf16", "step", "x_compile", 1.05),
    Aim("linear_4096x11008_m4096_bf16", "step", "x_eager", 1.5),
    Aim("linear_4096x11008_m4096_bf16", "step", "x_compile", 1.1),
    Aim("gpt2_4x64", "step", "x_finetune_amp", 1 / 1.05),
    Aim("gpt2_4x64", "step", "x_finetune", 1 / 1.05),
    Aim("gpt2_4x64", "step", "x_compile", 1.5, rival_mode="eager"),
    Aim("gpt2_4x64", "step", "x_compile", 1.5),
    Aim("gpt2_8x1024", "step", "x_finetune_amp", 1 / 1.05),
    Aim("gpt2_8x1024", "step", "x_finetune", 1 / 1.05),
    Aim("resnet18_b256", "step", "x_finetune_amp", 1 / 1.05),
    Aim("resnet18_b256", "step", "x_finetune", 1 / 1.05),
    Aim("resnet18_b256", "step", "x_compile", 1.5),
    Aim("score_gradient_4096x11008_m4096_bf16", "forward", "x_mm", 0.85),
    Aim(f"mask_adamw_{4096 * 11008}", "step", "ceiling_fraction", 0.85, "ours_cuda_fp32"),
    Aim("score_gradient_4096x11008_m4096_bf16", "forward", "x_mm", 0.9, "ours_sm90_bf16_wide"),
    Aim("gumbel8_768x3072_m10240_bf16", "forward", "x_eager", 8),
    Aim("gumbel8_768x3072_m10240_bf16", "forward", "x_linear", 0.85),
    Aim("gumbel8_768x3072_m10240_bf16", "step", "x_eager", 5),
    Aim("gumbel8_768x3072_m10240_bf16", "step", "x_compile", 2),
    Aim("gumbel8_768x3072_m10240_bf16", "step", "x_linear", 0.8),
)


def verdicts(rows: list[Row], aims: tuple[Aim, ...] = AIMS) -> list[str]:
    """A line per aim: met, MISSED, or not measured."""
    lines = [("aim", "case", "phase", "ratio", "least", "reached")]
    for aim in aims:
        value = aim.value(rows)
        word = "not measured" if value is None else "met" if value >= aim.least else "MISSED"
        reached = "" if value is None else f"{value:.3f}"
        column = aim.column + (f" ({aim.rival_mode})" if aim.rival_mode else "")
        lines.append((word, aim.case, f"{aim.phase} ({aim.mode})", column, f"{aim.least:.3f}", reached))
    return aligned(lines, 4).splitlines()


def short_table(rows: list[Row], aims: tuple[Aim, ...] = AIMS) -> list[str]:
    """The rows of ours that the aims name, in both modes, within the limits of a short answer."""
    named = {(aim.case, aim.phase) for aim in aims}
    lines = [("case", "phase", "contender", "us", *(f"x_{name}" for name in COLUMNS), "gate", "ceiling", "peak MB",
              "state")]  # fmt: skip
    chosen = [row for row in rows if (row.case, row.phase) in named and row.contender.startswith("ours")]
    for row in sorted(chosen, key=lambda row: row.mode != "graph")[:ROW_LIMIT]:
        numbers = [getattr(row, f"x_{name}") for name in COLUMNS]
        numbers += [row.gate, row.ceiling_fraction]
        lines.append((
            row.case, f"{row.phase} ({row.mode})", row.contender, f"{row.median_us:.1f}",
            *("" if n is None else f"{n:.2f}" for n in numbers), f"{row.peak_mb or 0:.0f}", row.state,
        ))  # fmt: skip
    table = aligned(lines).splitlines() if len(lines) > 1 else ["no row of ours that an aim names"]
    return [line[:WIDTH] for line in table]
