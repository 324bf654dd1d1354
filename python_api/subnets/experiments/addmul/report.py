"""The report on additions and multiplications: verdict first, then tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from subnets.experiments.addmul.config import FULL, AddMulConfig
from subnets.protocols import Accuracies
from subnets.report.drawing import save_figure
from subnets.report.page import Table, duration, image, page, paragraph
from subnets.report.protocols import accuracy_figure, confusion_figure, sharing_figure
from subnets.sharing import Overlap, Sharing, shared_weights
from subnets.subnet import Subnet
from subnets.training.files import write_csv, write_text

KEEPS, DESTROYS = 0.99, 0.10  # a mask does its function at least so well, and others at most
SHARED = 0.9  # of the hidden weights, where both functions provably use the same
ACCURACY_COLUMNS = ("problem", "method", "mask", "part", "function", "accuracy")
WEIGHT_COLUMNS = (
    "problem", "method", "subnet", "parameter", "weights", "kept", "density", "of_full", "shared", "shared_by_chance",
)  # fmt: skip
OVERLAP_COLUMNS = ("problem", "method", "first", "second", "parameter", "iou", "iou_by_chance", "io_min")


@dataclass(frozen=True)
class Found:
    """What one method found in one network: subnets by mask, their facts (history, seconds), and what they do."""

    problem: str
    method: str
    subnets: dict[str, Subnet]
    facts: dict[str, Any]
    measures: dict[str, Any]

    @property
    def title(self) -> str:
        """For tables."""
        return f"{self.problem}, {self.method}"

    @property
    def functions(self) -> dict[str, Subnet]:
        """The subnets of one function each, without the control mask."""
        return {name: its for name, its in self.subnets.items() if name != FULL}

    @cached_property
    def sharing(self) -> Sharing:
        """What the functions' subnets have in common."""
        return shared_weights(self.functions, self.subnets.get(FULL))

    @property
    def overlaps(self) -> dict[str, Overlap]:
        """Parameter to the overlap of both functions' subnets."""
        (both,) = self.sharing.pairs.values()
        return both

    @property
    def accuracies(self) -> Accuracies:
        """Of every function with every mask and its inverse."""
        return Accuracies(*(self.measures[part] for part in ("whole", "subnet", "ablated")))

    def size_ratio(self) -> float:
        """Weights of the second function's subnet for each of the first's."""
        first, second = (subnet.num_kept() for subnet in self.functions.values())
        return second / max(first, 1)


def hidden_and_ends(overlaps: dict[str, Overlap]) -> tuple[list[Overlap], list[Overlap]]:
    """Overlaps of the hidden layers; those of the first and last layer."""
    each = list(overlaps.values())
    return each[1:-1], [each[0], each[-1]]


def failures(found: Found) -> list[str]:
    """What differs from the expected pattern, in words; empty if nothing does."""
    wrong = []
    for name in found.functions:
        its = found.measures["subnet"][name]
        if its[name] < KEEPS:
            wrong.append(f"the {name} mask does {name} in {its[name]:.3f} of cases, below {KEEPS}")
        wrong += [
            f"the {name} mask does {other} in {value:.3f} of cases, above {DESTROYS}"
            for other, value in its.items() if other != name and value > DESTROYS and found.problem == "add_mul"
        ]  # fmt: skip
    if found.problem == "add_mul":
        hidden, ends = hidden_and_ends(found.overlaps)
        if not min(its.iou() for its in ends) > 2 * max(its.iou() for its in hidden):
            wrong.append("IoU of the first and last layer is not above twice that of the hidden ones")
        if not found.size_ratio() > 1.5:
            wrong.append(f"multiplication takes only {found.size_ratio():.2f} times the weights of addition")
    if found.problem == "double_addition_copied":
        shared = Overlap.total(hidden_and_ends(found.overlaps)[0]).io_min()
        if shared < SHARED:
            wrong.append(f"of the hidden weights only {shared:.2f} are shared, though both sums need the same")
    return wrong


def verdict(found: Found) -> str:
    """One sentence."""
    if wrong := failures(found):
        return f"{found.title}: NOT AS EXPECTED: {'; '.join(wrong)}."
    hidden, ends = (Overlap.total(its) for its in hidden_and_ends(found.overlaps))
    return (
        f"{found.title}: each mask keeps its function; of the smaller subnet, {hidden.io_min():.2f} of the hidden "
        f"weights and {ends.io_min():.2f} of those at input and output are in the other too; the second takes "
        f"{found.size_ratio():.2f} times the weights of the first."
    )


def overlap_table(found: Found) -> Table:
    """Per layer: kept by each mask, IoU, IoMin and what random subnets would give."""
    rows = [
        [name, *(f"{count:,}" for count in (o.first, o.second)), f"{o.first / n:.3f}", f"{o.second / n:.3f}",
         *(f"{value:.3f}" for value in (o.iou(), o.iou_by_chance(), o.io_min(), o.shared(), o.shared_by_chance()))]
        for (name, o), n in zip(
            [*found.overlaps.items(), ("all", Overlap.total(found.overlaps.values()))],
            [*found.sharing.sizes.values(), sum(found.sharing.sizes.values())], strict=True,
        )
    ]  # fmt: skip
    a, b = found.functions
    head = ["layer", a, b, f"density {a}", b, "IoU", "by chance", "IoMin", f"shared of {a}", "by chance"]
    return Table(f"{found.title}: weights kept, and kept by both", head, rows)


def time_table(found: Sequence[Found]) -> Table:
    """Per mask: steps, density, share undecided, processor time."""
    rows = [
        [f"{its.title}, {mask}", f"{facts['history'][-1]['step']:,}", f"{facts['history'][-1]['density']:.4f}",
         f"{facts['history'][-1]['undecided']:.4f}", duration(facts["seconds"])]
        for its in found for mask, facts in its.facts.items()
    ]  # fmt: skip
    return Table("Training of masks", ["mask", "steps", "density", "undecided (.01 to .99)", "processor time"], rows)


def write_report(config: AddMulConfig, found: Sequence[Found], folder: Path) -> str:
    """Writes the CSV files, figures and report.html; returns the text for the terminal."""
    labelled = [({"problem": its.problem, "method": its.method}, its) for its in found]
    write_csv(folder / "accuracies.csv", ACCURACY_COLUMNS, [
        {**label, **row} for label, its in labelled for row in its.accuracies.rows()
    ])  # fmt: skip
    write_csv(folder / "weights.csv", WEIGHT_COLUMNS, [
        {**label, **row} for label, its in labelled for row in its.sharing.rows()
    ])  # fmt: skip
    write_csv(folder / "overlaps.csv", OVERLAP_COLUMNS, [
        {**label, **row} for label, its in labelled for row in its.sharing.pair_rows()
    ])  # fmt: skip
    parts, lines = [paragraph(recipe(config))], []
    for its in found:
        kind = "verdict bad" if failures(its) else "verdict good"
        tables = [_titled(its.accuracies.table(), its), overlap_table(its)]
        parts += [paragraph(verdict(its), kind), *(table.html() for table in tables), *_figures(its, folder)]
        lines += [verdict(its), "", *(f"{table.text()}\n" for table in tables)]
    if found:
        parts.append(time_table(found).html())
        lines.append(time_table(found).text())
    write_text(folder / "report.html", page(f"Additions and multiplications: preset {config.preset}", parts))
    return "\n".join([*lines, "", f"report   {folder / 'report.html'}"])


def _titled(table: Table, found: Found) -> Table:
    return Table(f"{found.title}: accuracy over all 10,000 pairs", table.head, table.rows)


def _figures(found: Found, folder: Path) -> list[str]:
    drawn = {"accuracies": accuracy_figure(found.accuracies), "shared": sharing_figure(found.sharing)}
    captions = {"accuracies": "Accuracy of each function with each mask", "shared": "Part of each subnet in the other"}
    if found.measures["confusion"]:
        drawn["confusion"] = confusion_figure(found.measures["confusion"])
        captions["confusion"] = "What is done where a function is asked for"
    place = folder / "figures"
    return [
        image(save_figure(figure, place / f"{found.problem}_{found.method}_{name}.png"), f"{captions[name]}.")
        for name, figure in drawn.items()
    ]


def recipe(config: AddMulConfig) -> str:
    """What was trained, in words."""
    return (
        f"Preset {config.preset}, seed {config.seed}: hidden layers {'-'.join(map(str, config.hidden))}, base network "
        f"{config.base_steps:,} steps of {config.batch} (Adam {config.base_lr:g}); masks over all weights, not biases. "
        f"csordas: {config.mask_steps:,} steps per mask (published: 20,000 for both). continuous_sparsification: "
        f"{config.cs_epochs} epochs of {config.cs_steps} steps, lambda {config.cs_lam:g}. Accuracies are over all "
        "10,000 pairs; a result is right where both of its digits are."
    )
