"""The arithmetic report: verdict first, then tables and figures, as a page and as a short text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from subnets.experiments.arithmetic.conditions import MEANING
from subnets.experiments.arithmetic.config import ArithmeticConfig
from subnets.experiments.arithmetic.figures import SAMPLED_READING, draw_all
from subnets.experiments.arithmetic.results import (
    ALWAYS_ZERO,
    DepthResults,
    beats,
    failure_signatures,
    published_curve,
    verdict,
)
from subnets.report.curves import data_reduction, format_reduction, format_samples, samples_to_reach
from subnets.report.page import Table, image, page, paragraph
from subnets.training.files import write_text

TARGETS = (0.8, 0.9, 0.95)
HONEST = (
    "full_model (load the whole T1 network and fine-tune it) is a strong baseline: in the published curves the subnet "
    "does not beat it below n of about 64, and the gap is largest, about .09, near n = 250."
)


def accuracy_table(depth: DepthResults, inherit: str) -> Table:
    """Mean and spread per condition and n, with the published mean at this depth beneath where there is one."""
    sizes = depth.sizes()
    rows = []
    for condition in depth.conditions():
        spreads = [depth.spread(condition, size) for size in sizes]
        rows.append([condition, *[str(s) if s else "-" for s in spreads]])
        published = published_curve(depth.layers, condition)
        if published:
            rows.append(["  published", *[f"{published[n]:.3f}" if n in published else "-" for n in sizes]])
    counts = {len(values) for values in depth.runs.values()}
    title = (
        f"Test accuracy on T2, {depth.layers} layers, inherit={inherit!r}: mean ± std over "
        f"{'/'.join(str(c) for c in sorted(counts))} transfer seeds"
    )
    return Table(title, ["condition", *[f"n={size}" for size in sizes]], rows)


def samples_table(depth: DepthResults) -> Table:
    """n needed for 80, 90 and 95 %, ours and published, interpolated on log n."""
    rows = []
    for condition in depth.conditions():
        published = published_curve(depth.layers, condition)
        for label, curve in ((condition, depth.curve(condition)), ("  published", published)):
            if curve:
                rows.append([label, *[format_samples(samples_to_reach(curve, target)) for target in TARGETS]])
    return Table(
        f"Disambiguation pairs needed, {depth.layers} layers (linear in log n between the sizes that were run)",
        ["condition", *[f"{target:.0%}" for target in TARGETS]],
        rows,
    )


def reduction_table(depth: DepthResults) -> Table:
    """How many times less data the subnet needs than each baseline, at equal accuracy."""
    rows = []
    for condition in depth.conditions():
        if condition == "subnet":
            continue
        pairs = (
            (condition, depth.curve("subnet"), depth.curve(condition)),
            ("  published", published_curve(depth.layers, "subnet"), published_curve(depth.layers, condition)),
        )
        for label, ours, theirs in pairs:
            if ours and theirs:
                cells = [format_reduction(data_reduction(ours, theirs, target)) for target in TARGETS]
                rows.append([label, *cells])
    return Table(
        f"Data reduction of subnet against each baseline, {depth.layers} layers ('>': the baseline never got there)",
        ["baseline", *[f"at {target:.0%}" for target in TARGETS]],
        rows,
    )


def subtask_table(depth: DepthResults) -> Table:
    """S1 and T1 accuracy of the subnet, its complement, size-matched samples and the full network."""
    table = depth.discovery["table"]
    rows = [[name, f"{values['S1']:.3f}", f"{values['T1']:.3f}"] for name, values in table.items()]
    density = depth.discovery["density"]
    return Table(
        f"Inside the T1 network, {depth.layers} layers (density {density:.3f}; always 0 scores {ALWAYS_ZERO})",
        ["weights kept", "S1: ab", "T1: a + ab"],
        rows,
    )


def density_table(depth: DepthResults) -> Table:
    """The fraction of weights kept in each masked matrix."""
    rows = [[name, f"{value:.4f}"] for name, value in depth.discovery["density_per_layer"].items()]
    return Table(f"Density per layer, {depth.layers} layers", ["weight", "density"], rows)


def comparison_line(depth: DepthResults) -> str:
    """At which n the subnet beats each baseline by more than the spread, in one sentence."""
    parts = []
    for baseline in depth.conditions():
        if baseline == "subnet":
            continue
        sizes = [size for size in depth.sizes() if beats(depth, baseline, size)]
        shown = "no n" if not sizes else "n = " + ", ".join(str(size) for size in sizes)
        parts.append(f"{baseline} at {shown}")
    return f"{depth.layers} layers: by more than the larger std, subnet is above " + "; ".join(parts) + "."


def write_report(results: Sequence[DepthResults], config: ArithmeticConfig, folder: Path) -> str:
    """Writes figures and `report.html` into the run folder; returns the short text for the terminal."""
    figures = draw_all(results, config.inherit, folder / "figures")
    parts = []
    for depth in results:
        kind = "verdict bad" if failure_signatures(depth) else "verdict good"
        parts.append(paragraph(verdict(depth), kind))
    parts.append(paragraph(_recipe_line(config)))
    for depth in results:
        parts += [accuracy_table(depth, config.inherit).html(), paragraph(comparison_line(depth)), paragraph(HONEST)]
        parts += [image(path, caption) for caption, path in figures[depth.layers].items()]
        parts += [table(depth).html() for table in (samples_table, reduction_table, subtask_table, density_table)]
        parts += [
            paragraph(f"Not run: {row['condition']}, n={row['n_disambiguation']}, seed {row['seed']}: {row['reason']}")
            for row in depth.skipped
        ]
    meanings = [[name, MEANING[name]] for name in config.conditions]
    parts.append(Table("What each condition plants", ["condition", "meaning"], meanings).html())
    parts.append(paragraph("Published values: decoded from the vector figures of arXiv 2310.10899."))
    write_text(folder / "report.html", page(f"Subtask Induction on arithmetic: preset {config.preset}", parts))
    return terminal_text(results, config, folder)


def terminal_text(results: Sequence[DepthResults], config: ArithmeticConfig, folder: Path) -> str:
    """Verdicts, the accuracy tables and where the files are."""
    lines = [verdict(depth) for depth in results]
    for depth in results:
        lines += ["", accuracy_table(depth, config.inherit).text(), comparison_line(depth)]
    lines += ["", HONEST, "", f"report   {folder / 'report.html'}", f"table    {folder / 'results.csv'}"]
    lines += [f"figure   {folder / 'figures' / f'layers{depth.layers}_accuracy.png'}" for depth in results]
    return "\n".join(lines)


def _recipe_line(config: ArithmeticConfig) -> str:
    return (
        f"Preset {config.preset}. T1: batch {config.base_batch}, rate {config.base_lr:g}. Discovery: "
        f"{config.discovery_epochs} epochs of {config.discovery_pairs:,} pairs, batch {config.discovery_batch}, lambda "
        f"{config.lam:g}, beta to {config.beta_end:g}. Transfer: {config.transfer_epochs} epochs, batch "
        f"{config.transfer_batch}, rate {config.transfer_lr:g}, the same for every condition (published: 100 epochs, "
        f"batch 50, rate 2e-4); best epoch on {config.num_held_out:,} validation pairs, reported on another "
        f"{config.num_held_out:,}. inherit={config.inherit!r}; {SAMPLED_READING}."
    )
