"""The vision report: verdict first, then tables and figures, as a page and as a short text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from subnets.experiments.vision.comparison import (
    COMPARABLE,
    SHAPE_BIAS_SOURCE,
    TWO_SOURCES,
    published_table,
    real_table,
    recipe_table,
    shape_bias_table,
)
from subnets.experiments.vision.conditions import MEANING
from subnets.experiments.vision.config import VisionConfig
from subnets.experiments.vision.figures import draw_conditions, draw_discovery, draw_filters, draw_sheet, draw_sizes
from subnets.experiments.vision.images import ImageSet
from subnets.experiments.vision.results import (
    LEAST_RUNS,
    MEASURE_TITLES,
    VisionResults,
    failure_signatures,
    is_shown,
    spread_of,
    stages,
    verdict,
)
from subnets.report.curves import OVER_TRANSFER, data_reduction, format_cell, format_reduction, samples_to_reach
from subnets.report.page import Table, duration, image, page, paragraph
from subnets.training.files import write_text

TARGETS = (0.3, 0.5, 0.7, 0.8, 0.9)


# ------------------------------------------------------------------------------ tables


def condition_table(results: VisionResults, size: int, config: VisionConfig) -> Table:
    """Mean and spread of every measure by condition, trained on `size` images."""
    rows, kinds = [], [results.kind] + ([] if results.kind == OVER_TRANSFER else [OVER_TRANSFER])
    found = {
        (condition, kind): [results.spread(condition, size, measure, kind) for measure in MEASURE_TITLES]
        for condition in results.conditions()
        for kind in kinds
    }
    most = {
        kind: max((s.count for (_, k), cells in found.items() if k == kind for s in cells if s), default=0)
        for kind in kinds
    }
    for (condition, kind), spreads in found.items():
        if kind == results.kind or most[kind] > 1:
            label = condition if kind == results.kind else "  over transfer seeds"
            rows.append([label, *[format_cell(s, most[kind]) for s in spreads]])
    title = f"Trained on {size:,} images, {_setting(config)}: mean ± std over {most[results.kind]} {results.kind}"
    if any("[" in cell for row in rows for cell in row):
        title += "; [k]: of k runs that have the number so far"
    return Table(title, ["condition", *MEASURE_TITLES.values()], rows)


def samples_table(results: VisionResults, measure: str) -> Table:
    """Training images needed for each of TARGETS."""
    rows = []
    for condition in results.conditions():
        curve = results.curve(condition, measure)
        if curve:
            rows.append([condition, *[_samples(curve, target) for target in TARGETS]])
    title = f"Training images needed, {MEASURE_TITLES[measure]} (linear in log n between the sizes)"
    return Table(title, ["condition", *[f"{target:.0%}" for target in TARGETS]], rows)


def reduction_table(results: VisionResults, measure: str) -> Table:
    """How many times fewer training images the subnet needs than each baseline, at an equal measure; a bound
    where one of both is there at no size or at the smallest already, not known where that says nothing."""
    ours = results.curve("subnet", measure)
    rows = []
    for baseline in results.conditions():
        theirs = results.curve(baseline, measure)
        if baseline != "subnet" and ours and theirs:
            rows.append([baseline, *[_reduction(ours, theirs, target) for target in TARGETS]])
    title = f"Data reduction of subnet at equal {MEASURE_TITLES[measure]} ('>': a bound; '-': not known)"
    return Table(title, ["baseline", *[f"at {target:.0%}" for target in TARGETS]], rows)


def _samples(curve: Mapping[int, float], target: float) -> str:
    samples = samples_to_reach(curve, target)
    if samples is None:
        return "not reached"
    return f"{samples:,.0f}" if samples > min(curve) else f"<= {samples:,.0f}"


def _reduction(ours: Mapping[int, float], theirs: Mapping[int, float], target: float) -> str:
    """The ratio as text; "-" also where the baseline is there at its smallest size: its need is unknown."""
    found, needed = data_reduction(ours, theirs, target), samples_to_reach(theirs, target)
    if found is None or (needed is not None and needed <= min(theirs)):
        return "-"
    is_bound = samples_to_reach(ours, target) == min(ours)
    return format_reduction((found[0], found[1] and not is_bound))


def subnet_table(results: VisionResults) -> Table:
    """The measures of the subnet inside its base network, of its complement, size-matched samples and the network."""
    found = list(results.discoveries.values())
    rows = []
    for name in found[0]["table"]:
        values = [one["table"][name] for one in found if name in one["table"]]
        spreads = [spread_of([value.get(measure) for value in values]) for measure in MEASURE_TITLES]
        rows.append([name, *[format_cell(spread, len(values)) for spread in spreads]])
    density = spread_of([one["density"] for one in found])
    title = f"Inside the base network, of which there are {len(found)} (density of the subnet {density})"
    return Table(title, ["weights kept", *MEASURE_TITLES.values()], rows)


def base_table(results: VisionResults) -> Table:
    """Every base network and the density of its subnet."""
    rows = []
    for r, base in sorted(results.bases.items()):
        density = spread_of([results.discoveries[r]["density"]]) if r in results.discoveries else None
        cells = [format_cell(spread_of([base.get(measure)]), 1) for measure in MEASURE_TITLES]
        rows.append([str(r), *cells, format_cell(density, 1)])
    return Table("Base networks", ["base seed", *MEASURE_TITLES.values(), "density of its subnet"], rows)


def density_table(results: VisionResults) -> Table:
    """The fraction of weights that the subnet keeps of each layer, with the layer's stage."""
    each = [discovery["density_per_layer"] for discovery in results.discoveries.values()]
    rows = [
        [name, stage, format_cell(spread_of([one[name] for one in each]), len(each))]
        for stage, names in stages(each[0]).items()
        for name in names
    ]
    return Table("Density by layer", ["weight", "stage", "density"], rows)


def time_table(results: VisionResults) -> Table:
    """What each stage took, and the images per second of training."""

    def speed(rows: Sequence[Mapping[str, Any]]) -> str:
        spread = spread_of([row.get("images_per_second") for row in rows])
        return f"{spread.mean:,.0f}" if spread else "-"

    stage_rows = {
        "base": list(results.bases.values()),
        "discovery": list(results.discoveries.values()),
        "transfer": list(results.rows),
    }
    rows = [
        [stage, str(len(done)), duration(results.seconds.get(stage, 0.0)), speed(done)]
        for stage, done in stage_rows.items()
    ]
    for condition in results.conditions():
        own = [row for row in results.rows if row["condition"] == condition]
        rows.append([f"  {condition}", str(len(own)), "", speed(own)])
    return Table("Time", ["stage", "networks done", "time", "images per second"], rows)


# --------------------------------------------------------------------------- sentences


def comparison_lines(results: VisionResults) -> list[str]:
    """Per measure, at which sizes the subnet is above each condition by more than the spread."""
    lines = []
    for measure in ("shape_bias", "natural", "mean_pooled"):
        parts = []
        for baseline in results.conditions():
            judged = {n: results.beats("subnet", baseline, n, measure) for n in results.sizes()}
            known = {n: above for n, above in judged.items() if above is not None}
            if baseline == "subnet" or not known:
                continue
            above = [f"{n:,}" for n, is_above in known.items() if is_above]
            parts.append(f"{baseline} at {'n = ' + ', '.join(above) if above else 'no n'}")
        if parts:
            title = MEASURE_TITLES[measure].capitalize()
            lines.append(f"{title}: by more than the larger std, subnet is above {'; '.join(parts)}.")
    return lines or [f"No two conditions have {LEAST_RUNS} runs each yet, so none are compared."]


def _setting(config: VisionConfig) -> str:
    return f"inherit={config.inherit!r}, norms={config.norms!r}"


def time_line(results: VisionResults) -> str:
    """All stages' times in one line."""
    parts = [f"{stage} {duration(seconds)}" for stage, seconds in results.seconds.items()]
    return f"Time: {duration(sum(results.seconds.values()))} ({', '.join(parts)})."


# -------------------------------------------------------------------------------- page


def write_report(
    results: VisionResults, config: VisionConfig, folder: Path, images: Mapping[str, ImageSet],
    filters: tuple[Tensor, Tensor] | None,
) -> str:  # fmt: skip
    """Writes figures and `report.html` into the run folder; returns the text for the terminal.

    Args:
        results: what there is of the run.
        config: its settings.
        folder: the run folder.
        images: kind -> images for the sample sheet (its first rows).
        filters: the first layer's weight in a base network [O, 3, k, k] and its mask, or None.
    """
    figures = _draw(results, config, folder / "figures", images, filters)
    parts = [paragraph(verdict(results), f"verdict {'good' if is_shown(results) else 'bad'}")]
    parts += [paragraph(line, "verdict bad") for line in _signature_lines(results)]
    parts += [image(figures[name], caption) for name, caption in _captions(results, config).items() if name in figures]
    if results.rows:
        parts += [condition_table(results, size, config).html() for size in reversed(results.sizes())]
        parts += [paragraph(line) for line in comparison_lines(results)]
    if len(results.sizes()) > 1:
        parts += [
            table(results, measure).html()
            for measure in ("natural", "mean_pooled")
            for table in (samples_table, reduction_table)
        ]
    if results.discoveries:
        parts += [subnet_table(results).html()]
    if results.real:
        parts += [real_table(results.real).html()]
    parts += [published_table(results).html(), paragraph(TWO_SOURCES), shape_bias_table(results).html()]
    parts += [paragraph(SHAPE_BIAS_SOURCE), paragraph(COMPARABLE[config.source]), recipe_table(config).html()]
    meanings = [[name, MEANING[name]] for name in config.conditions]
    parts.append(Table("What each condition plants", ["condition", "meaning"], meanings).html())
    if results.bases:
        parts.append(base_table(results).html())
    if results.discoveries:
        parts.append(density_table(results).html())
    parts += [time_table(results).html(), paragraph(time_line(results))]
    write_text(folder / "report.html", page(f"Subtask Induction on images: preset {config.preset}", parts))
    return terminal_text(results, config, folder, figures)


def _draw(
    results: VisionResults, config: VisionConfig, folder: Path, images: Mapping[str, ImageSet],
    filters: tuple[Tensor, Tensor] | None,
) -> dict[str, Path]:  # fmt: skip
    """Every figure that there are results for: name -> PNG."""
    figures, sizes, title = {}, results.sizes(), _setting(config)
    if sizes:
        figures["conditions"] = draw_conditions(results, sizes[-1], title, folder / "conditions.png")
    if len(sizes) > 1:
        figures["sizes"] = draw_sizes(results, title, folder / "sizes.png")
    shown = {kind: one for kind, one in images.items() if len(one)}
    if shown:
        figures["images"] = draw_sheet(shown, folder / "images.png")
    if filters:
        figures["filters"] = draw_filters(*filters, folder / "filters.png")
    if results.discoveries:
        figures["discovery"] = draw_discovery(results, folder / "discovery.png")
    return figures


def _captions(results: VisionResults, config: VisionConfig) -> dict[str, str]:
    """Name of a figure -> its caption, in the page's order."""
    setting = f"{_setting(config)}; mean ± population std over {results.kind}"
    return {
        "conditions": f"Shape bias and class-averaged accuracy by condition; dots are single runs. {setting}. "
        "Dashed: chance; on the shape bias people and published networks, who were shown Geirhos et al.'s images.",
        "sizes": f"Against the number of training images. {setting}.",
        "images": "Images of each kind, with the class of their shape above the class of their texture.",
        "filters": "First-layer filters of the first base network, and what its subnet keeps; grey is zero.",
        "discovery": "Discovery on mean-pooled images, and the density of each layer's subnet, layers grouped by the "
        "network's stages; dots are base networks.",
    }


def terminal_text(results: VisionResults, config: VisionConfig, folder: Path, figures: Mapping[str, Path]) -> str:
    """Verdict, the largest size's table, the subnet's own, the time and where the files are."""
    lines = [verdict(results), *_signature_lines(results)]
    if results.rows:
        lines += ["", condition_table(results, results.sizes()[-1], config).text(), *comparison_lines(results)]
    if results.discoveries:
        lines += ["", subnet_table(results).text()]
    if results.real:
        lines += ["", real_table(results.real).text()]
    lines += ["", time_table(results).text(), time_line(results), ""]
    lines += [f"report   {folder / 'report.html'}", f"table    {folder / 'results.csv'}"]
    lines += [f"figure   {path}" for path in figures.values()]
    return "\n".join(lines)


def _signature_lines(results: VisionResults) -> list[str]:
    return [f"FAILURE SIGNATURE: {text}." for text in failure_signatures(results)]
