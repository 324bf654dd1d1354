"""The three stages (base, discovery, transfer). Each returns what its file holds if the file is already there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from subnets.discovery import DiscoveryConfig, discover
from subnets.evaluation import evaluate_subnet
from subnets.experiments.arithmetic import data
from subnets.experiments.arithmetic.conditions import FROZEN, planted_masks, starting_state
from subnets.experiments.arithmetic.config import ArithmeticConfig
from subnets.subnet import Subnet
from subnets.training.files import load_tensors, save_tensors, write_json
from subnets.training.gpt2 import LeanGPT2, accuracy, lm_loss
from subnets.training.member_training import Member, MemberResult, Recipe, train_stack
from subnets.training.seeds import seed_for, torch_generator

State = dict[str, Tensor]


@dataclass(frozen=True)
class Depth:
    """One depth of one run: its config and the folder of its files."""

    config: ArithmeticConfig
    layers: int
    folder: Path

    def model(self, state: State | None = None) -> LeanGPT2:
        """A plain network of this depth, holding `state` if given; in eval mode."""
        model = LeanGPT2(self.config.shape(self.layers), torch_generator(self.config.seed, "T1", "init"))
        if state is not None:
            model.load_state_dict(state)
        return model.eval()


class _Bar:
    """A progress bar over steps that shows the loss and the last validation accuracy (discovery has its own)."""

    def __init__(self, title: str, total: int, show: bool) -> None:
        self.bar = tqdm(total=total, desc=title, disable=not show, mininterval=0.5, leave=True)

    def __call__(self, values: dict[str, float]) -> None:
        shown = {name: f"{values[name]:.3f}" for name in ("loss", "accuracy") if name in values}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(int(values["step"]) - self.bar.n)

    def close(self) -> None:
        """Leaves the bar where it is."""
        self.bar.close()


# ------------------------------------------------------------------------------- base


def base_stage(depth: Depth, show: bool = False) -> State:
    """The T1 network's state dict, from `base.safetensors` or trained now (`base.json` holds accuracy and curve)."""
    weights, facts = depth.folder / "base.safetensors", depth.folder / "base.json"
    if weights.exists() and facts.exists():
        return load_tensors(weights)[0]
    config, layers = depth.config, depth.layers
    started = time.perf_counter()
    member = Member(
        {"stage": "base"},
        {name: value.detach().clone() for name, value in depth.model().state_dict().items()},
        data.training_set(data.T1, config.base_pairs, config.seed),
        data.held_out_set(data.T1, "validation", config.seed, config.num_held_out),
        data.held_out_set(data.T1, "test", config.seed, config.num_held_out),
        (config.seed, "T1", layers),
    )
    recipe = Recipe(
        epochs=config.base_epochs,
        batch=config.base_batch,
        lr=config.base_lr,
        weight_decay=config.base_weight_decay,
        beta2=config.base_beta2,
        clip=1.0,
        warmup_steps=config.base_warmup,
        decay=config.base_decay,
        evaluate_every=config.base_evaluate_every,
        stop_at=config.base_stop_at,
        patience=config.base_patience,
    )
    shape = config.shape(layers, dropout=config.base_dropout)
    bar = _Bar(f"T1 base, {layers} layers", recipe.epochs * -(-config.base_pairs // config.base_batch), show)
    checkpoint = depth.folder / "base.checkpoint.safetensors"
    result = train_stack(shape, [member], recipe, checkpoint=checkpoint, report=bar)[0]
    bar.close()
    save_tensors(weights, result.state)
    write_json(facts, _facts(result, time.perf_counter() - started))
    checkpoint.unlink(missing_ok=True)
    return result.state


def _facts(result: MemberResult, seconds: float) -> dict[str, Any]:
    return {
        "test_accuracy": result.test_accuracy,
        "validation_accuracy": result.validation_accuracy,
        "best_epoch": result.best_epoch,
        "seconds": round(seconds, 2),
        "curve": result.curve,
    }


# -------------------------------------------------------------------------- discovery


def discovery_stage(depth: Depth, source: State, show: bool = False) -> Subnet:
    """The subnet of S1 in the T1 network, from `subnet.safetensors` or discovered now (`discovery.json`: facts)."""
    path, facts = depth.folder / "subnet.safetensors", depth.folder / "discovery.json"
    if path.exists() and facts.exists():
        return Subnet.load(path)
    config, layers = depth.config, depth.layers
    started = time.perf_counter()
    model = depth.model(source)
    checkpoint = depth.folder / "discovery.checkpoint.safetensors"
    if show:
        print(f"discovery of S1, {layers} layers", file=sys.stderr)
    found = discover(
        model,
        s1_batches(config),
        lm_loss,
        discovery_config(config, layers, checkpoint),
        evaluate=partial(accuracy_on, data.held_out_set(data.S1, "validation", config.seed, config.num_held_out)),
        progress=show,
    )
    found.subnet.provenance.update({"task": data.S1.formula, "base_task": data.T1.formula, "layers": layers})
    found.subnet.save(path, weights=model)
    write_json(facts, {
        "density": found.subnet.density(),
        "density_per_layer": found.subnet.density(per_layer=True),
        "history": found.history,
        "table": subtask_table(model, found.subnet, config),
        "seconds": round(time.perf_counter() - started, 2),
    })  # fmt: skip
    checkpoint.unlink(missing_ok=True)
    return found.subnet


def discovery_config(config: ArithmeticConfig, layers: int, checkpoint: Path | None = None) -> DiscoveryConfig:
    """The settings of `discover` at one depth."""
    return DiscoveryConfig(
        epochs=config.discovery_epochs,
        steps_per_epoch=-(-config.discovery_pairs // config.discovery_batch),
        lr=config.discovery_rate(layers),
        weight_decay=0.01,
        lam=config.lam,
        score_init=config.score_init,
        beta_end=config.beta_end,
        seed=seed_for(config.seed, "S1", layers) % 2**31,
        checkpoint=checkpoint,
    )


def s1_batches(config: ArithmeticConfig) -> Callable[[int], Iterator[Tensor]]:
    """epoch -> batches of S1 sequences in an order of that epoch."""
    rows = data.training_set(data.S1, config.discovery_pairs, config.seed)

    def batches(epoch: int) -> Iterator[Tensor]:
        order = torch.randperm(len(rows), generator=torch_generator(config.seed, "S1", "order", epoch))
        return (rows[part] for part in order.split(config.discovery_batch))

    return batches


def subtask_table(model: LeanGPT2, subnet: Subnet, config: ArithmeticConfig) -> dict[str, dict[str, float]]:
    """Accuracy on S1 and on T1 of the subnet, its complement, size-matched random subnets (means) and the full network.

    Parameters outside the masks (embeddings, norms, biases) stay as they are in every row.
    """
    sets = {task.name: data.held_out_set(task, "test", config.seed, config.num_held_out) for task in (data.S1, data.T1)}
    tests = {name: partial(accuracy_on, sequences) for name, sequences in sets.items()}
    table = evaluate_subnet(model, subnet, tests, controls=config.subnet_controls, seed=config.seed)
    rows: dict[str, dict[str, float]] = {}
    for row in table.rows:
        rows.setdefault(row["condition"], {})[row["test"]] = row["mean"]
    return rows


def accuracy_on(sequences: Tensor, model: nn.Module) -> float:
    """`accuracy` with the sequences first, for functools.partial."""
    return accuracy(model, sequences)


# --------------------------------------------------------------------------- transfer


@dataclass(frozen=True)
class Run:
    """One transfer run: a condition, n disambiguation pairs and a transfer seed."""

    condition: str
    num_disambiguation: int
    seed: int


def transfer_stacks(config: ArithmeticConfig) -> list[list[Run]]:
    """All runs in stacks that train side by side; a pure function of the config, so that a restart stacks alike."""
    stacks = []
    for size in sorted(config.sizes):
        runs = [Run(condition, size, seed) for seed in range(config.transfer_seeds) for condition in config.conditions]
        num_stacks = -(-len(runs) // config.stack)
        stacks += [runs[len(runs) * i // num_stacks : len(runs) * (i + 1) // num_stacks] for i in range(num_stacks)]
    return stacks


def stack_path(depth: Depth, index: int, runs: list[Run]) -> Path:
    """The file of one stack's results."""
    return depth.folder / f"transfer_{index:03d}_n{runs[0].num_disambiguation}.json"


def transfer_stage(depth: Depth, source: State, subnet: Subnet, show: bool = False) -> None:
    """Trains every stack whose file is missing."""
    stacks = transfer_stacks(depth.config)
    for index, runs in enumerate(stacks):
        path = stack_path(depth, index, runs)
        if path.exists():
            continue
        started = time.perf_counter()
        members, skipped = build_members(depth, source, subnet, runs)
        results: list[MemberResult] = []
        if members:
            config = depth.config
            recipe = Recipe(config.transfer_epochs, config.transfer_batch, config.transfer_lr, weight_decay=0.01)
            steps = recipe.epochs * -(-len(members[0].train) // recipe.batch)
            title = f"T2, {depth.layers} layers, n={runs[0].num_disambiguation}, {len(members)} runs"
            bar = _Bar(f"{title} [{index + 1}/{len(stacks)}]", steps, show)
            checkpoint = path.with_suffix(".checkpoint.safetensors")
            results = train_stack(config.shape(depth.layers), members, recipe, checkpoint=checkpoint, report=bar)
            bar.close()
        write_json(path, {
            "results": [_row(depth, result) for result in results],
            "curves": [{**result.label, "curve": result.curve} for result in results],
            "skipped": skipped,
            "seconds": round(time.perf_counter() - started, 2),
        })  # fmt: skip
        path.with_suffix(".checkpoint.safetensors").unlink(missing_ok=True)


def build_members(
    depth: Depth, source: State, subnet: Subnet, runs: list[Run]
) -> tuple[list[Member], list[dict[str, Any]]]:
    """The members of a stack, and the runs that can't be done with the reason (complement of a dense subnet)."""
    members, skipped = [], []
    for run in runs:
        label = {"condition": run.condition, "n_disambiguation": run.num_disambiguation, "seed": run.seed}
        try:
            members.append(_member(depth, source, subnet, run, label))
        except ValueError as error:
            if "complement" not in run.condition:
                raise
            skipped.append({**label, "reason": str(error)})
    return members, skipped


def _member(depth: Depth, source: State, subnet: Subnet, run: Run, label: dict[str, int | float | str]) -> Member:
    """All conditions of one transfer seed share data, its order, dropout and fresh weights: they differ in planting."""
    config = depth.config
    stream = (config.seed, "T2", run.seed)
    stream_seed = seed_for(*stream)
    sampler = torch_generator(*stream, "sample", depth.layers)
    planted = planted_masks(run.condition, subnet, sampler)
    init = torch_generator(*stream, "init", depth.layers)
    shape = config.shape(depth.layers)
    return Member(
        label,
        starting_state(run.condition, planted, source, shape, config.inherit, init),
        data.transfer_set(run.num_disambiguation, stream_seed, config.num_ambiguous),
        data.held_out_set(data.T2, "validation", stream_seed, config.num_held_out),
        data.held_out_set(data.T2, "test", stream_seed, config.num_held_out),
        stream,
        planted if run.condition in FROZEN else {},
    )


def _row(depth: Depth, result: MemberResult) -> dict[str, Any]:
    return {
        "condition": result.label["condition"],
        "layers": depth.layers,
        "n_disambiguation": result.label["n_disambiguation"],
        "seed": result.label["seed"],
        "test_accuracy": round(result.test_accuracy, 6),
        "validation_accuracy": round(result.validation_accuracy, 6),
        "best_epoch": result.best_epoch,
        "inherit": depth.config.inherit,
    }
