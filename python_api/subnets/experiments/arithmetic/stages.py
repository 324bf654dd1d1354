"""The stages before transfer: base network and discovery. Each returns what its file holds if the file is there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from subnets.experiments.arithmetic.config import ArithmeticConfig
from subnets.subnet import Subnet
from subnets.training.files import load_tensors, save_tensors, write_json
from subnets.training.gpt2 import GPT2Shape, LeanGPT2, accuracy, lm_loss
from subnets.training.member_training import Member, MemberResult, Recipe, train_stack
from subnets.training.seeds import seed_for, torch_generator

State = dict[str, Tensor]


@dataclass(frozen=True)
class Depth:
    """One base network of one depth: its config (whose seed is this network's) and the folder of its files."""

    config: ArithmeticConfig
    layers: int
    folder: Path

    def model(self, state: State | None = None) -> LeanGPT2:
        """A plain network of this depth on the config's device, holding `state` if given; in eval mode."""
        model = LeanGPT2(self.config.shape(self.layers), torch_generator(self.config.seed, "T1", "init"))
        if state is not None:
            model.load_state_dict(state)
        return model.eval().to(self.config.device or "cpu")


def replicates(config: ArithmeticConfig, layers: int, folder: Path) -> list[Depth]:
    """The base networks of one depth, whose folder is `folder`: in it where there is one, in base0, base1, ... else."""
    return [Depth(config.of_replicate(r), layers, place) for r, place in enumerate(config.places(folder))]


def train(
    title: str,
    shape: GPT2Shape,
    members: Sequence[Member],
    recipe: Recipe,
    checkpoint: Path,
    device: str | None,
    show: bool,
) -> tuple[list[MemberResult], float | None]:
    """`train_stack` with a progress bar over the steps of the longest member; results and seconds.

    Where training went on from a checkpoint, the seconds are those of the steps done now, scaled to all of them; None
    if there was none left to do.
    """
    num_steps = recipe.epochs * max(-(-len(member.train) // recipe.batch) for member in members)
    bar = tqdm(total=num_steps, desc=title, disable=not show, mininterval=0.5, leave=True)
    done_now = last = 0

    def report(values: dict[str, float]) -> None:
        nonlocal done_now, last
        done_now, last = done_now + 1, int(values["step"])
        shown = {name: f"{values[name]:.3f}" for name in ("loss", "accuracy") if name in values}
        bar.set_postfix(shown, refresh=False)
        bar.update(last - bar.n)

    started = time.perf_counter()
    results = train_stack(shape, members, recipe, checkpoint=checkpoint, report=report, device=device or "cpu")
    seconds = time.perf_counter() - started
    bar.close()
    return results, round(seconds * last / done_now, 2) if done_now else None


# ------------------------------------------------------------------------------- base


def base_stage(depth: Depth, show: bool = False) -> State:
    """The T1 network's state dict; see `base_stages`."""
    return base_stages([depth], depth.folder, show)[0]


def base_stages(depths: Sequence[Depth], folder: Path, show: bool = False) -> list[State]:
    """The T1 networks' state dicts, from each one's `base.safetensors` or trained now as members of one stack.

    `base.json` beside it holds accuracy, curve and seconds (the stack's, divided by the number of networks).
    """
    files = [(depth.folder / "base.safetensors", depth.folder / "base.json") for depth in depths]
    if not all(weights.exists() and facts.exists() for weights, facts in files):
        _train_bases(depths, files, folder / "base.checkpoint.safetensors", show)
    return [load_tensors(weights)[0] for weights, _ in files]


def _train_bases(
    depths: Sequence[Depth], files: Sequence[tuple[Path, Path]], checkpoint: Path, show: bool = False
) -> None:
    """Trains all of them and writes the files that are missing."""
    config, layers = depths[0].config, depths[0].layers
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
    title = f"T1 base, {layers} layers" + (f", {len(depths)} networks" if len(depths) > 1 else "")
    members = [_base_member(depth) for depth in depths]
    results, seconds = train(title, shape, members, recipe, checkpoint, config.device, show)
    each = None if seconds is None else round(seconds / len(depths), 2)
    for (weights, facts), result in zip(files, results, strict=True):
        if not (weights.exists() and facts.exists()):
            save_tensors(weights, result.state)
            write_json(facts, _facts(result, each))
    checkpoint.unlink(missing_ok=True)


def _base_member(depth: Depth) -> Member:
    config = depth.config
    return Member(
        {"stage": "base"},
        {name: value.detach().to("cpu", copy=True) for name, value in depth.model().state_dict().items()},
        data.training_set(data.T1, config.base_pairs, config.seed),
        data.held_out_set(data.T1, "validation", config.seed, config.num_held_out),
        data.held_out_set(data.T1, "test", config.seed, config.num_held_out),
        (config.seed, "T1", depth.layers),
    )


def _facts(result: MemberResult, seconds: float | None) -> dict[str, Any]:
    return {
        "test_accuracy": result.test_accuracy,
        "validation_accuracy": result.validation_accuracy,
        "best_epoch": result.best_epoch,
        "seconds": seconds,
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
        name = f" ({depth.folder.name})" if config.base_seeds > 1 else ""
        print(f"discovery of S1, {layers} layers{name}", file=sys.stderr)
    epochs: list[int] = []  # those of this call: fewer than all where it goes on from a checkpoint
    found = discover(
        model,
        s1_batches(config),
        lm_loss,
        discovery_config(config, layers, checkpoint),
        evaluate=partial(accuracy_on, data.held_out_set(data.S1, "validation", config.seed, config.num_held_out)),
        callbacks=[lambda row, masks: epochs.append(row["epoch"])],
        progress=show,
    )
    seconds = (time.perf_counter() - started) * config.discovery_epochs / len(epochs) if epochs else None
    model.cpu()
    found.subnet.provenance.update({"task": data.S1.formula, "base_task": data.T1.formula, "layers": layers})
    found.subnet.save(path, weights=model)
    write_json(facts, {
        "density": found.subnet.density(),
        "density_per_layer": found.subnet.density(per_layer=True),
        "history": found.history,
        "table": subtask_table(model, found.subnet, config),
        "seconds": None if seconds is None else round(seconds, 2),
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
        cuda_graph=config.device == "cuda",
    )


def s1_batches(config: ArithmeticConfig) -> Callable[[int], Iterator[Tensor]]:
    """epoch -> batches of S1 sequences in an order of that epoch, on the config's device."""
    rows = data.training_set(data.S1, config.discovery_pairs, config.seed).to(config.device or "cpu")

    def batches(epoch: int) -> Iterator[Tensor]:
        order = torch.randperm(len(rows), generator=torch_generator(config.seed, "S1", "order", epoch))
        return iter(rows[order.to(rows.device)].split(config.discovery_batch))

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
    """`accuracy` with the sequences first, for functools.partial; they are taken to the model's device."""
    return accuracy(model, sequences.to(next(model.parameters()).device))
