"""The arithmetic report: verdict first, then tables and figures, as a page and as a short text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from subnets.experiments.arithmetic.comparison import difference_table, reasons
from subnets.experiments.arithmetic.conditions import MEANING
from subnets.experiments.arithmetic.config import ArithmeticConfig
from subnets.experiments.arithmetic.figures import SAMPLED_READING, draw_all, draw_published
from subnets.experiments.arithmetic.plan import cost
from subnets.experiments.arithmetic.results import (
    ALWAYS_ZERO,
    DepthResults,
    beats,
    density_per_layer,
    failure_signatures,
    published_curve,
    verdict,
)
from subnets.experiments.arithmetic.timing import Times, estimate, seconds_left, seconds_per_unit
from subnets.report.curves import (
    OVER_REPLICATES,
    OVER_TRANSFER,
    Spread,
    data_reduction,
    format_cell,
    format_reduction,
    format_samples,
    samples_to_reach,
)
from subnets.report.page import Table, duration, image, page, paragraph
from subnets.training.files import write_text

TARGETS = (0.8, 0.9, 0.95)
HONEST = (
    "full_model (load the whole T1 network and fine-tune it) is a strong baseline: in the published curves the subnet "
    "does not beat it below n of about 64, and the gap is largest, about .09, near n = 250."
)


def accuracy_table(depth: DepthResults, inherit: str) -> Table:
    """Mean and spread per condition and n; beneath, where there are any, over transfer seeds alone and as published."""
    sizes = depth.sizes()
    rows = []
    counts = set()
    for condition in depth.conditions():
        kinds = [(condition, depth.kind)]
        if depth.kind != OVER_TRANSFER:
            kinds.append(("  over transfer seeds", OVER_TRANSFER))
        for label, kind in kinds:
            spreads = [depth.spread(condition, size, kind) for size in sizes]
            if kind == depth.kind:
                counts |= {s.count for s in spreads if s}
            elif not any(s and s.count > 1 for s in spreads):
                continue
            most = max((s.count for s in spreads if s), default=0)
            rows.append([label, *[format_cell(s, most) for s in spreads]])
        published = published_curve(depth.layers, condition)
        if published:
            rows.append(["  published", *[f"{published[n]:.3f}" if n in published else "-" for n in sizes]])
    over = "transfer seeds" if depth.kind == OVER_TRANSFER else OVER_REPLICATES
    title = (
        f"Test accuracy on T2, {depth.layers} layers, inherit={inherit!r}: mean ± std over "
        f"{'/'.join(str(c) for c in sorted(counts))} {over}"
    )
    if any("[" in cell for row in rows for cell in row):
        title += "; [k]: of k so far"
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
    found = list(depth.discoveries.values())
    rows = []
    for name in found[0]["table"]:
        values = [one["table"][name] for one in found if name in one["table"]]  # dense ones: no complement sample
        rows.append([name, *[str(Spread.of([value[task] for value in values])) for task in ("S1", "T1")]])
    density = Spread.of([one["density"] for one in found])
    return Table(
        f"Inside the T1 network, {depth.layers} layers (density {density}; always 0 scores {ALWAYS_ZERO})",
        ["weights kept", "S1: ab", "T1: a + ab"],
        rows,
    )


def density_table(depth: DepthResults) -> Table:
    """The fraction of weights kept in each masked matrix."""
    rows = [[name, f"{value:.4f}"] for name, value in density_per_layer(depth).items()]
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


def unfinished_line(depth: DepthResults) -> str | None:
    """What is missing of one depth, in words; None if nothing is."""
    if depth.is_finished():
        return None
    missing = depth.missing()
    parts = [
        f"{len(there)} of {depth.base_seeds} {name} there"
        for name, there in (("base networks", depth.bases), ("subnets", depth.discoveries))
    ]
    total = sum(depth.planned.values())
    parts.append(f"{total - sum(missing.values()):,} of {total:,} transfer runs there")
    whole = [size for size, count in missing.items() if count == depth.planned[size]]
    gaps = [f"{missing[size]} of {depth.planned[size]} at n = {size}" for size in missing if size not in whole]
    if whole:
        gaps.append("all at n = " + ", ".join(map(str, whole)))
    if gaps:
        parts.append("missing: " + "; ".join(gaps))
    return f"NOT FINISHED, {depth.layers} layers: {'; '.join(parts)}."


def time_table(times: Times, config: ArithmeticConfig) -> Table:
    """Per depth what is done and what it took, and what all of it takes: extrapolated where it is not finished."""
    costs = {layers: cost(config, layers) for layers in times}
    whole = estimate(times, costs)
    rows = []
    for layers, stages in times.items():
        base, discovery, transfer = stages["base"], stages["discovery"], stages["transfer"]
        rate = seconds_per_unit(times, "transfer", layers, costs) if transfer.timed else None
        spent = sum(stage.seconds for stage in stages.values())
        total = whole[layers]
        is_done = all(stage.done >= stage.planned for stage in stages.values())
        rows.append([
            f"{layers} layers",
            *[f"{stage.done} of {stage.planned}, {duration(stage.seconds)}" for stage in (base, discovery)],
            f"{transfer.done:,} of {transfer.planned:,}, {duration(transfer.seconds)}",
            "-" if rate is None else f"{1 / rate:,.0f}",
            duration(spent),
            "done" if is_done else "-" if total is None else duration(total),
        ])  # fmt: skip
    head = ["", "base networks", "discoveries", "transfer steps x members", "per second", "spent", "extrapolated to"]
    return Table("Time", head, rows)


def time_line(times: Times, config: ArithmeticConfig) -> str:
    """How long the whole config takes on this machine; says what is extrapolated."""
    costs = {layers: cost(config, layers) for layers in times}
    left, is_all = seconds_left(times, costs)
    spent = sum(stage.seconds for stages in times.values() for stage in stages.values())
    if not left and is_all:
        return f"Time: {duration(spent)} for everything."
    whole = f"{'' if is_all else 'more than '}{duration(spent + left)} for the whole config"
    return (
        f"Time: {duration(spent)} so far; extrapolated {whole}: transfer steps x members at the rate of each depth's "
        "finished batches, base networks and discoveries at the time of the finished ones; a depth without any is "
        "scaled from the nearest by multiply-adds per token. A stage that was finished nowhere is not counted."
    )


def write_report(results: Sequence[DepthResults], config: ArithmeticConfig, times: Times, folder: Path) -> str:
    """Writes figures and `report.html` into the run folder; returns the short text for the terminal."""
    figures = draw_all(results, config.inherit, folder / "figures")
    beside = draw_published(results, config.inherit, folder / "figures")
    parts = []
    for depth in results:
        kind = "verdict bad" if failure_signatures(depth) else "verdict good"
        parts.append(paragraph(verdict(depth), kind))
    unfinished = [line for depth in results if (line := unfinished_line(depth))]
    parts += [paragraph(line, "verdict bad") for line in unfinished]
    parts.append(paragraph(_recipe_line(config)))
    if beside:
        parts.append(image(beside[1], beside[0]))
    parts.append(difference_table(results).html())
    parts += [paragraph(f"Why it differs: {reason}") for reason in reasons(config)]
    for depth in results:
        parts += _depth_parts(depth, config, figures[depth.layers])
    parts += [time_table(times, config).html(), paragraph(time_line(times, config))]
    meanings = [[name, MEANING[name]] for name in config.conditions]
    parts.append(Table("What each condition plants", ["condition", "meaning"], meanings).html())
    parts.append(paragraph("Published values: decoded from the vector figures of arXiv 2310.10899."))
    write_text(folder / "report.html", page(f"Subtask Induction on arithmetic: preset {config.preset}", parts))
    return terminal_text(results, config, times, folder)


def _depth_parts(depth: DepthResults, config: ArithmeticConfig, figures: Mapping[str, Path]) -> list[str]:
    """Tables and figures of one depth, as far as it has come."""
    parts = []
    if depth.runs:
        parts += [accuracy_table(depth, config.inherit).html(), paragraph(comparison_line(depth)), paragraph(HONEST)]
    parts += [image(path, caption) for caption, path in figures.items()]
    if depth.runs:
        parts += [samples_table(depth).html(), reduction_table(depth).html()]
    if depth.discoveries:
        parts += [subtask_table(depth).html(), density_table(depth).html()]
    for row in depth.skipped:
        which = f"{row['condition']}, n={row['n_disambiguation']}, seed {row['seed']}"
        parts.append(paragraph(f"Not run: {which}: {row['reason']}"))
    return parts


def terminal_text(results: Sequence[DepthResults], config: ArithmeticConfig, times: Times, folder: Path) -> str:
    """Verdicts, what is missing, the accuracy tables, the time and where the files are."""
    lines = [verdict(depth) for depth in results]
    lines += [line for depth in results if (line := unfinished_line(depth))]
    shown = [depth for depth in results if depth.runs]
    for depth in shown:
        lines += ["", accuracy_table(depth, config.inherit).text(), comparison_line(depth)]
    if shown:
        lines += ["", difference_table(results).text(), "", HONEST]
    lines += ["", time_table(times, config).text(), time_line(times, config), ""]
    lines += [f"report   {folder / 'report.html'}", f"table    {folder / 'results.csv'}"]
    figures = [f"layers{depth.layers}_accuracy" for depth in shown] + (["published"] if len(shown) > 1 else [])
    lines += [f"figure   {folder / 'figures' / f'{name}.png'}" for name in figures]
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
