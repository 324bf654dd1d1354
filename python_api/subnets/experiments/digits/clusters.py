"""Clusterability: do the weights of a trained network fall into clusters more than the same weights shuffled?

Networks 64-64-64-64-10, plain and with dropout .5. Source: Filan et al. 2021 (arXiv 2103.03386), who found that dropout
makes small networks clusterable.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from subnets.clustering import clusterability, weight_graph
from subnets.experiments.digits.config import DigitsConfig
from subnets.experiments.digits.data import all_images, evaluate, loss
from subnets.experiments.digits.parts import Facts, Part, Summary, Units
from subnets.experiments.mlp import mlp, train_steps
from subnets.report.page import Table

SIZES = (64, 64, 64, 64, 10)
BATCH, LR = 64, 1e-3
DROPOUT = {"plain": 0.0, "dropout": 0.5}


def units(config: DigitsConfig) -> Units:
    """One per network."""
    return {
        f"{kind}_seed{seed}": partial(_one, config, kind, seed) for kind in DROPOUT for seed in range(config.seeds)
    }


def _one(config: DigitsConfig, kind: str, seed: int) -> Facts:
    images, model = all_images(), mlp(SIZES, seed, "clusters", dropout=DROPOUT[kind])
    steps = config.cluster_epochs * (len(images) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), LR)
    batches = images.batches(BATCH, steps, seed, "clusters", "order")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        for _ in train_steps(model, partial(loss, model), batches, optimizer):
            pass
    its = clusterability(weight_graph(model), num_clusters=config.num_clusters, shuffles=config.shuffles)
    return {
        "kind": kind, "seed": seed, "train_accuracy": evaluate(model, images)[1], "n_cut": its.n_cut,
        "shuffled": sum(its.shuffled) / len(its.shuffled), "z": its.z, "p": its.p_value,
    }  # fmt: skip


def summary(config: DigitsConfig, found: Mapping[str, Facts]) -> Summary:
    """The claim: with dropout p is the least possible, 1 / (shuffles + 1); without it p is not."""
    least = 1 / (config.shuffles + 1)
    rows = list(found.values())
    clusterable = {kind: [row["p"] <= least for row in rows if row["kind"] == kind] for kind in DROPOUT}
    cells = [
        [name, f"{its['n_cut']:.3f}", f"{its['shuffled']:.3f}", f"{its['z']:+.1f}", f"{its['p']:.3f}"]
        for name, its in found.items()
    ]
    head = ["network", "n-cut", "shuffled", "z", "p"]
    table = Table("n-cut of each network, and of its weights shuffled", head, cells)
    verdict = "p = 1/{} of {} networks with dropout and {} without it".format(
        config.shuffles + 1, *(f"{sum(its)} of {len(its)}" for its in reversed(clusterable.values()))
    )
    return Summary(all(clusterable["dropout"]) and not any(clusterable["plain"]), verdict, table, rows)


PART = Part(units, summary)
