"""Lottery tickets: does a pruned network learn sooner from its own start than from a fresh one?

A network 64-300-100-10 is pruned level by level (20 % of each layer, 10 % of the output layer) and put back to its
start. At some levels the same mask also meets fresh weights. Both train equally long; the step of the least validation
loss is where training would have stopped. Source: Frankle, Carbin, ICLR 2019 (arXiv 1803.03635), with digits for MNIST.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from subnets.experiments.digits.config import DigitsConfig
from subnets.experiments.digits.data import Images, evaluate, loss, splits, standardized
from subnets.experiments.digits.parts import Facts, Part, Summary, Units
from subnets.experiments.mlp import mlp, train_steps
from subnets.methods import PruningConfig, iterative_magnitude_pruning
from subnets.report.page import Table
from subnets.training.seeds import seed_for

SIZES = (64, 300, 100, 10)


def glorot(seed: int, name: str) -> nn.Sequential:
    """The network with Glorot normal weights, as the authors', and biases of zero."""
    model = mlp(SIZES, seed, name)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed_for(seed, name, "glorot"))
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                layer.bias.zero_()
    return model


def train(model: nn.Module, config: DigitsConfig, seed: int, parts: tuple[Images, Images, Images]) -> Facts:
    """Trains for all steps; the step of the least validation loss (the first of equal ones), and the test accuracy and
    validation loss there."""
    images, validation, test = parts
    batches = images.batches(config.ticket_batch, config.ticket_steps, seed, "tickets", "order")
    optimizer = torch.optim.Adam(model.parameters(), config.ticket_lr)
    best: Facts = {"loss": float("inf")}
    for step in train_steps(model, partial(loss, model), batches, optimizer):
        if step % config.ticket_every == 0:
            found, _ = evaluate(model, validation)
            if found < best["loss"]:
                best = {"loss": found, "step": step, "test_accuracy": evaluate(model, test)[1]}
    return best


def units(config: DigitsConfig) -> Units:
    """One per seed."""
    return {f"seed{seed}": partial(_seed, config, seed) for seed in range(config.seeds)}


def _seed(config: DigitsConfig, seed: int) -> Facts:
    parts, model = standardized(splits(seed)), glorot(seed, "ticket")
    pruning = PruningConfig.preset("lottery_ticket", config.ticket_levels[-1])
    tickets = iterative_magnitude_pruning(model, lambda model: train(model, config, seed, parts), pruning)
    levels = {str(row["level"]): {"density": row["density"], "ticket": row["trained"]} for row in tickets.history}
    for level in config.ticket_levels:
        control = tickets.plant(model, level, glorot(seed, f"control {level}"))
        levels[str(level)]["reinit"] = train(control, config, seed, parts)
    return {"levels": levels}


def summary(config: DigitsConfig, found: Mapping[str, Facts]) -> Summary:
    """The claim: the ticket stops sooner than its control, in all cases but one of nine."""
    cells, rows, sooner, cases = [], [], 0, 0
    for name, facts in found.items():
        line = [name, f"{facts['levels']['0']['ticket']['step']}"]
        for level, its in facts["levels"].items():
            rows += [
                {"seed": name, "level": level, "density": its["density"], "start": start, **its[start]}
                for start in ("ticket", "reinit") if start in its
            ]  # fmt: skip
            if "reinit" in its:
                line.append(f"{its['ticket']['step']} / {its['reinit']['step']}")
                cases, sooner = cases + 1, sooner + (its["ticket"]["step"] < its["reinit"]["step"])
        cells.append(line)
    densities = next(iter(found.values()))["levels"]
    head = ["", "whole", *(f"level {n} ({densities[str(n)]['density']:.2%})" for n in config.ticket_levels)]
    table = Table("Steps to the least validation loss: ticket / the same mask on fresh weights", head, cells)
    verdict = f"the ticket stops sooner than its re-initialised control in {sooner} of {cases} cases"
    return Summary(9 * sooner >= 8 * cases, verdict, table, rows)


PART = Part(units, summary)
