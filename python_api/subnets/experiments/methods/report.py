"""The comparison's page: tables first, then figures; and a short text for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from subnets.experiments.methods.config import BASELINES, MethodsConfig
from subnets.experiments.methods.results import Results
from subnets.report.curves import Spread
from subnets.report.drawing import new_figure, save_figure
from subnets.report.page import Table, image, page, paragraph
from subnets.training.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RULES = {
    "continuous_sparsification": "lambda steered to the density in training; the rest by rank of s over all layers",
    "csordas": "penalty steered to the density in training; the rest by rank of the logits over all layers",
    "hard_concrete": "penalty steered to the density in training; the rest by rank of log alpha over all layers",
    "edge_popup": "its own knob: the fraction kept of each layer",
    "supermask": "no knob: rank of v over all layers",
    "piggyback": "no knob: rank of r over all layers",
    "magnitude_pruning": "its own knob: rate and rounds; all layers ranked together. WEIGHTS CHANGE: trained on S1",
    "sparse_finetuning": "its own knob: K. WEIGHTS CHANGE; the method's network keeps T1's weights elsewhere",
    "clusters": "clusters nearest to it, of the MLPs' weights alone; attention stays whole (planted: fresh)",
    "magnitude": "control: the largest weights of T1 over all layers",
    "random": "control: random, with the first method's number of weights in each layer",
}


READING = (
    "Reading it: the whole T1 network answers a + ab and so has little accuracy on S1 to lose; whether it needs a "
    "subnet shows in its T1 accuracy without it. A random subnet's is the control. Always answering 0 scores .265."
)


def method_table(results: Results) -> Table:
    """One row per method."""
    rows = []
    for name in results.config.methods():
        stability = results.stability(name)
        rows.append([
            name,
            *[_cell(results.spread(name, fact)) for fact in ("s1_accuracy", "complement_s1", "complement_t1")],
            "-" if stability is None else f"{stability[0]:.2f} ({stability[1]:.2f})",
            *[_cell(results.spread(name, fact)) for fact in ("own_density", "own_s1_accuracy", "undecided")],
            _cell(results.spread(name, "seconds"), lambda spread: f"{spread.mean:.1f}"),
        ])  # fmt: skip
    head = [
        "method", "S1, subnet", "S1, complement", "T1, complement", "IoU of seeds (random)", "own density",
        "S1 at it", "undecided", "CPU s",
    ]  # fmt: skip
    seeds = results.config.mask_seeds
    return Table(f"Subnets at density {results.config.density:g}, mean ± std over {seeds} seeds", head, rows)


def iou_table(results: Results) -> Table:
    """IoU of every two methods' first subnets."""
    names = results.config.methods()
    rows = [[name, *[f"{results.iou((name, 0), (other, 0)):.2f}" for other in names]] for name in names]
    return Table("IoU of the subnets of seed 0", ["", *names], rows)


def transfer_table(results: Results) -> Table:
    """Accuracy on T2 per condition and n."""
    sizes = sorted(results.config.sizes)
    rows = []
    for name in results.config.conditions:
        curve = results.transfer(name)
        rows.append([name, *[_cell(curve.get(size)) for size in sizes]])
    title = f"Test accuracy on T2 with the subnet planted and frozen, over {results.config.transfer_seeds} seed(s)"
    return Table(title, ["condition", *[f"n={size}" for size in sizes]], rows)


def rule_table(config: MethodsConfig) -> Table:
    """How each method comes to the density."""
    return Table("How each method comes to the density", ["method", "rule"], [[n, RULES[n]] for n in config.methods()])


def write_report(results: Results, folder: Path) -> str:
    """Writes figures and `report.html` into the run folder; returns the short text for the terminal."""
    config = results.config
    figures = {
        "S1 accuracy of each method's subnet, and T1 accuracy of the network without it, against time.": _cost_figure,
        "IoU of the subnets of seed 0: 1 on the diagonal.": _iou_figure,
        "Accuracy on T2 against n; bars: std over transfer seeds.": _transfer_figure,
    }
    tables = [method_table(results), transfer_table(results), iou_table(results), rule_table(config)]
    parts = [paragraph(recipe_line(results)), paragraph(READING), *[table.html() for table in tables]]
    for caption, draw in figures.items():
        path = folder / "figures" / f"{draw.__name__.strip('_')}.png"
        parts.append(image(save_figure(draw(results), path, also=["svg"]), caption))
    write_text(folder / "report.html", page(f"All methods on one network: preset {config.preset}", parts))
    files = [f"{name:9}{folder / name}.csv" for name in ("results", "iou", "transfer")]
    shown = "\n\n".join(table.text() for table in tables[:3])
    return "\n".join([shown, "", READING, recipe_line(results), f"report   {folder / 'report.html'}", *files])


def recipe_line(results: Results) -> str:
    """What every method was given."""
    config = results.config
    steps = config.discovery_epochs * config.discovery_pairs // config.discovery_batch
    return (
        f"Preset {config.preset}: one T1 network of {config.layers[0]} layers (T1 accuracy "
        f"{results.base['test_accuracy']:.3f}). Every trained method takes {steps:,} steps of {config.discovery_batch} "
        "S1 pairs in all (those that train weights share them among their rounds). Rates: continuous sparsification "
        f"{config.discovery_rate(config.layers[0]):g}, Csordas {config.csordas_lr:g}, hard concrete "
        f"{config.hard_concrete_lr:g}, edge-popup {config.edge_popup_lr:g}, supermask {config.supermask_lr:g}, "
        f"Piggyback {config.piggyback_lr:g}, weights {config.finetune_lr:g}. T2: {config.transfer_epochs} epochs, "
        f"inherit={config.inherit!r}; planted are the subnets of seed 0."
    )


def _cell(spread: Spread | None, shown: Callable[[Spread], str] = str) -> str:
    return "-" if spread is None else shown(spread)


def _cost_figure(results: Results) -> Figure:
    figure, (axes,) = new_figure()
    for place, name in enumerate(results.config.methods()):
        found = [results.spread(name, fact) for fact in ("seconds", "s1_accuracy", "complement_t1")]
        seconds, kept, without = (0.0 if its is None else its.mean for its in found)
        color, marker = f"C{place % 10}", "os"[place // 10 % 2]
        axes.plot(max(seconds, 0.01), kept, marker, color=color, label=name)
        axes.plot(max(seconds, 0.01), without, "x" if marker == "o" else "+", color=color)
    axes.set_xscale("log")
    axes.set_xlabel("processor seconds to find it")
    axes.set_ylabel("accuracy on S1 (x, +: on T1 without the subnet)")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside right upper")
    return figure


def _iou_figure(results: Results) -> Figure:
    names = results.config.methods()
    side = 3 + 0.4 * len(names)
    figure, (axes,) = new_figure(size=(side, side))
    values = [[results.iou((name, 0), (other, 0)) for other in names] for name in names]
    axes.imshow(values, cmap="viridis", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            color = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
    return figure


def _transfer_figure(results: Results) -> Figure:
    figure, (axes,) = new_figure()
    for place, name in enumerate(results.config.conditions):
        curve = results.transfer(name)
        style = "--" if name in BASELINES else "-"
        sizes, spreads = [max(size, 1) for size in curve], list(curve.values())
        axes.errorbar(
            sizes, [s.mean for s in spreads], [s.std for s in spreads], color=f"C{place % 10}", linestyle=style,
            marker="os"[place // 10 % 2], markersize=4, capsize=3, label=name,
        )  # fmt: skip
    axes.set_xscale("log")
    ticks = [max(size, 1) for size in results.config.sizes]
    axes.set_xticks(ticks, [str(size) for size in results.config.sizes])
    axes.minorticks_off()
    axes.set_xlabel("disambiguation pairs n (0 drawn at 1)")
    axes.set_ylabel("test accuracy on T2")
    axes.set_ylim(0.2, 1.02)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside right upper")
    return figure
