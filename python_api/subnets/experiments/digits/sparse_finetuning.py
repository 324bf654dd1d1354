"""Sparse fine-tunings that add up: a variant of the images learned apart from a task, and both together.

As in cross-lingual transfer, with variants for languages: the network has learned to tell digits, upright. A variant's
difference is fine-tuned on digits seen that way (the output layer frozen), the task's (is the digit odd?) on upright
images alone, with an output layer of its own. Their sum does the task on the variant, which nothing was trained on.
Source: Ansell, Ponti, Korhonen, Vulic, ACL 2022.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subnets.experiments.digits.config import DigitsConfig
from subnets.experiments.digits.data import VARIANTS, Images, splits
from subnets.experiments.digits.parts import Facts, Part, Summary, Units
from subnets.experiments.mlp import mlp, train_steps
from subnets.methods import SparseDifference, lottery_ticket_sparse_finetuning
from subnets.report.page import Table

BATCH, LR = 32, 1e-3
NEW = [name for name in VARIANTS if name != "upright"]


class TwoHeads(nn.Module):
    """A trunk 64-128-64 and two output layers: the ten digits, and the task's two classes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(mlp((64, 128, 64), seed, "trunk"), nn.ReLU())
        self.digits, self.task = mlp((64, 10), seed, "digits")[0], mlp((64, 2), seed, "task")[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x)
        return self.digits(hidden), self.task(hidden)


def digit_loss(model: nn.Module, images: Images) -> Tensor:
    """Which digit is it?"""
    return F.cross_entropy(model(images.x)[0], images.y)


def task_loss(model: nn.Module, images: Images) -> Tensor:
    """Is the digit odd?"""
    return F.cross_entropy(model(images.x)[1], images.y % 2)


@torch.no_grad()
def task_accuracy(model: nn.Module, images: Images) -> float:
    """How often the task is done; always saying the same is right in about half of the cases."""
    return (model(images.x)[1].argmax(1) == images.y % 2).double().mean().item()


def units(config: DigitsConfig) -> Units:
    """One per seed."""
    return {f"seed{seed}": partial(_seed, config, seed) for seed in range(config.seeds)}


def _seed(config: DigitsConfig, seed: int) -> Facts:
    images, _, test = splits(seed)
    model = TwoHeads(seed)
    train = partial(_train, config=config, seed=seed)
    train(model, loss=digit_loss, images=images)
    task = _difference(model, partial(train, loss=task_loss, images=images), config.task_k, "digits", dense=["task"])
    rows = []
    for name in NEW:
        seen = images.variant(name)
        fit = partial(train, loss=digit_loss, images=seen)
        language = _difference(model, fit, config.language_k, "digits", "task")
        rows.append({
            "seed": seed, "variant": name, "task": _score(model, task, test.variant(name)),
            "task_and_variant": _score(model, task + language, test.variant(name)),
            "upright": _score(model, task, test), "shared_positions": _overlap(task, language),
        })  # fmt: skip
    return {"rows": rows}


def _train(
    model: nn.Module, *, config: DigitsConfig, seed: int, loss: Callable[[nn.Module, Images], Tensor], images: Images
) -> None:
    steps = config.tuning_epochs * (len(images) // BATCH)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], LR)
    batches = images.batches(BATCH, steps, seed, "sparse fine-tuning", "order")
    for _ in train_steps(model, partial(loss, model), batches, optimizer):
        pass


def _difference(
    model: nn.Module, fit: Callable[[nn.Module], None], k: float, *frozen: str, dense: list[str] | None = None
) -> SparseDifference:
    """Of a fine-tuning in which the modules `frozen` do not change."""
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    try:
        return lottery_ticket_sparse_finetuning(model, fit, k, dense=dense or []).difference
    finally:
        model.requires_grad_(True)


def _score(model: nn.Module, difference: SparseDifference, images: Images) -> float:
    with difference.applied(model):
        return task_accuracy(model, images)


def _overlap(first: SparseDifference, second: SparseDifference) -> int:
    """How many weights both change."""
    return sum(
        int(torch.isin(change.positions, second.changes[name].positions).sum())
        for name, change in first.changes.items() if name in second.changes
    )  # fmt: skip


def summary(config: DigitsConfig, found: Mapping[str, Facts]) -> Summary:
    """The claim: with the variant's difference the task is done better on each variant, in every seed."""
    rows = [row for facts in found.values() for row in facts["rows"]]
    cells = []
    for name in NEW:
        its = [row for row in rows if row["variant"] == name]
        cells.append([name, *(_spread([row[key] for row in its]) for key in ("task", "task_and_variant"))])
    cells.append(["upright", _spread([facts["rows"][0]["upright"] for facts in found.values()]), ""])
    better = sum(row["task_and_variant"] > row["task"] for row in rows)
    verdict = f"with the variant's difference the task is done better on the variant in {better} of {len(rows)} cases"
    head = ["images", "task's difference", "and the variant's"]
    table = Table("Odd or even, learned upright: mean test accuracy (least to most)", head, cells)
    return Summary(better == len(rows), verdict, table, rows)


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


PART = Part(units, summary)
