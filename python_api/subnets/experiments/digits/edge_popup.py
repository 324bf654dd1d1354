"""Edge-popup: how good is the best subnetwork of an untrained network, by the fraction k of its weights that it keeps?

Scores are trained over random weights 64-300-100-10, which never change. With few weights there is little to choose
from, with all there is no choice: accuracy is an inverted U over k. Source: Ramanujan et al., CVPR 2020.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from subnets.discovery import DiscoveryConfig, EdgePopup, discover
from subnets.experiments.digits.config import DigitsConfig
from subnets.experiments.digits.data import Images, evaluate, loss, splits
from subnets.experiments.digits.parts import Facts, Part, Summary, Units
from subnets.experiments.digits.tickets import SIZES
from subnets.experiments.mlp import mlp
from subnets.report.drawing import new_figure
from subnets.report.page import Table
from subnets.training.seeds import seed_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def random_network(seed: int) -> nn.Sequential:
    """Kaiming normal weights and biases of zero."""
    model = mlp(SIZES, seed, "edge-popup")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed_for(seed, "edge-popup", "kaiming"))
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                layer.bias.zero_()
    return model


def units(config: DigitsConfig) -> Units:
    """One per k and seed."""
    return {
        f"k{kept:g}_seed{seed}": partial(_one, config, kept, seed)
        for kept in config.kept for seed in range(config.seeds)
    }  # fmt: skip


def _one(config: DigitsConfig, kept: float, seed: int) -> Facts:
    images, _, test = splits(seed)
    model = random_network(seed)

    def batches(epoch: int) -> Iterator[Images]:  # random numbers as discover seeds them
        return (images[rows] for rows in torch.randperm(len(images)).split(config.popup_batch))

    length = DiscoveryConfig(epochs=config.popup_epochs, seed=seed)
    found = discover(model, batches, loss, length, method=EdgePopup(kept=kept), progress=False)
    untrained = evaluate(model, test)[1]
    with found.subnet.applied(model):
        accuracy = evaluate(model, test)[1]
    return {"kept": kept, "seed": seed, "accuracy": accuracy, "untrained": untrained, "density": found.subnet.density()}


def summary(config: DigitsConfig, found: Mapping[str, Facts]) -> Summary:
    """The claim: the best k lies inside, and all weights together are at chance."""
    by_kept = {k: [facts["accuracy"] for facts in found.values() if facts["kept"] == k] for k in sorted(config.kept)}
    means = {k: statistics.fmean(values) for k, values in by_kept.items()}
    whole = [facts["untrained"] for facts in found.values()]
    cells = [[f"{k:g}", f"{means[k]:.3f}", f"{min(values):.3f}", f"{max(values):.3f}"] for k, values in by_kept.items()]
    cells.append(["1 (no mask)", f"{statistics.fmean(whole):.3f}", f"{min(whole):.3f}", f"{max(whole):.3f}"])
    table = Table("Test accuracy of a subnetwork of random weights", ["kept", "mean", "least", "most"], cells)
    first, *_, last = means
    best = max(means, key=lambda k: means[k])
    rises, falls = means[first] < means[best], statistics.fmean(whole) < means[last] < means[best]
    verdict = (
        f"accuracy is {means[first]:.3f} at k = {first:g}, best ({means[best]:.3f}) at k = {best:g}, "
        f"{means[last]:.3f} at k = {last:g}, and {statistics.fmean(whole):.3f} with all weights"
    )
    rows = list(found.values())
    return Summary(rises and falls, verdict, table, rows, _figure(by_kept, whole))


def _figure(by_kept: Mapping[float, list[float]], whole: list[float]) -> Figure:
    figure, (axes,) = new_figure()
    every = {**by_kept, 1.0: whole}
    axes.plot(list(every), [statistics.fmean(values) for values in every.values()], marker="o", color="C0")
    for k, values in every.items():
        axes.plot([k] * len(values), values, linestyle="", marker=".", color="C0", alpha=0.5)
    axes.set(xlabel="fraction of the random weights that is kept", ylabel="test accuracy", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    return figure


PART = Part(units, summary)
