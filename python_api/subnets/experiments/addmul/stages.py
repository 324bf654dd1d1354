"""The stages: base network, masks, what the masks do. Each returns what its file holds if the file is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subnets.discovery import Csordas, Discovery, DiscoveryConfig, Lepori, Method, discover
from subnets.experiments.addmul import data
from subnets.experiments.addmul.config import FULL, AddMulConfig
from subnets.experiments.addmul.data import Batch, Problem, make_problem
from subnets.experiments.mlp import mlp, train_steps
from subnets.protocols import confusion_row, function_accuracies
from subnets.subnet import Subnet
from subnets.training.files import load_tensors, read_json, save_tensors, write_json
from subnets.training.seeds import seed_for, torch_generator


@dataclass(frozen=True)
class Task:
    """One problem of a run: its data and the folder of its files."""

    config: AddMulConfig
    name: str
    folder: Path
    problem: Problem

    @classmethod
    def of(cls, config: AddMulConfig, name: str, folder: Path) -> Task:
        """The problem of that name in the run folder `folder`."""
        return cls(config, name, folder / name, make_problem(name))

    def network(self) -> nn.Sequential:
        """A fresh network; its seed is that of the problem, "_copied" or not."""
        sizes = (self.problem.num_inputs, *self.config.hidden, self.problem.num_outputs)
        return mlp(sizes, self.config.seed, _trained_as(self.name), "init")

    def masked_functions(self) -> dict[str, tuple[str, ...]]:
        """Mask's name to the functions that it is trained on."""
        every = self.problem.functions
        return {**{name: (name,) for name in every}, **({FULL: every} if self.config.full_mask else {})}

    def path(self, method: str, mask: str, suffix: str) -> Path:
        """A file of a mask."""
        return self.folder / method / f"{mask}.{suffix}"


def _trained_as(name: str) -> str:
    return name.removesuffix("_copied")


# ------------------------------------------------------------------------------- base


def base_stage(task: Task) -> nn.Sequential:
    """The trained network, in eval mode; base.json beside its weights says how it does each function."""
    weights, facts = task.folder / "base.safetensors", task.folder / "base.json"
    model = task.network()
    if not (weights.exists() and facts.exists()):
        started = time.process_time()
        if _trained_as(task.name) == task.name:
            _train(model, task)
        else:
            source = Task.of(task.config, _trained_as(task.name), task.folder.parent)
            model.load_state_dict(base_stage(source).state_dict())
            data.copy_first_to_second(model)
        save_tensors(weights, model.state_dict())
        found = {name: data.accuracy(model.eval(), task.problem.everything(name)) for name in task.problem.functions}
        write_json(facts, {"accuracy": found, "seconds": round(time.process_time() - started, 1)})
    model.load_state_dict(load_tensors(weights)[0])
    return model.eval()


def _train(model: nn.Sequential, task: Task) -> None:
    config, problem = task.config, task.problem
    generator = torch_generator(config.seed, task.name, "base")
    batches = (problem.batch(problem.functions, config.batch, generator) for _ in range(config.base_steps))
    optimizer = torch.optim.Adam(model.parameters(), config.base_lr)
    for _ in train_steps(model, lambda batch: data.loss(model, batch), batches, optimizer):
        pass


# ------------------------------------------------------------------------------ masks


def mask_stage(task: Task, method: str, mask: str, show: bool = False) -> Subnet:
    """The subnet of a function (or of all, for the control mask) by one method; goes on from its checkpoint."""
    file, facts = (task.path(method, mask, suffix) for suffix in ("safetensors", "json"))
    checkpoint = task.path(method, mask, "checkpoint.safetensors")
    if not (file.exists() and facts.exists()):
        model, started = base_stage(task), time.process_time()
        found = _discover(model, task, method, mask, checkpoint, show)
        seconds = time.process_time() - started
        found.subnet.save(file)
        write_json(facts, {"history": found.history, "seconds": round(seconds, 1)})
        checkpoint.unlink(missing_ok=True)
    return Subnet.load(file)


def _discover(model: nn.Module, task: Task, method: str, mask: str, checkpoint: Path, show: bool) -> Discovery:
    config, functions = task.config, task.masked_functions()[mask]
    how, epochs, steps = settings(config, task.name, method)

    def batches(epoch: int) -> Iterator[Batch]:  # random numbers as discover seeds them
        return (task.problem.batch(functions, config.batch) for _ in range(steps))

    seed = seed_for(config.seed, task.name, method, mask) % 2**31
    length = DiscoveryConfig(epochs=epochs, steps_per_epoch=steps, seed=seed, checkpoint=checkpoint)
    return discover(model, batches, data.loss, length, method=how, progress=show)


def settings(config: AddMulConfig, problem: str, method: str) -> tuple[Method, int, int]:
    """The method with its numbers, its epochs, and the steps of each."""
    if method == "csordas":
        how = Csordas(mask_loss_weight=config.penalty(problem), batch_size=config.batch)
        return how, config.mask_steps // config.mask_epoch, config.mask_epoch
    return Lepori(lam=config.cs_lam, score_init=config.cs_score_init), config.cs_epochs, config.cs_steps


# --------------------------------------------------------------------------- measures


def measure_stage(task: Task, method: str, subnets: dict[str, Subnet]) -> dict[str, Any]:
    """Accuracies of every function with every mask and its inverse, and what is done where a function is asked for."""
    path = task.folder / method / "measures.json"
    if not path.exists():
        model, problem = base_stage(task), task.problem
        examples = {name: problem.everything(name) for name in problem.functions}
        tests = {name: _test(batch) for name, batch in examples.items()}
        found = function_accuracies(model, subnets, tests)
        write_json(path, {
            "whole": found.whole, "subnet": found.subnet, "ablated": found.ablated,
            "confusion": _confusion(model, subnets, examples) if task.name == "add_mul" else {},
        })  # fmt: skip
    return read_json(path)


def _test(batch: Batch) -> Callable[[nn.Module], float]:
    return lambda model: data.accuracy(model, batch)


def _confusion(
    model: nn.Module, subnets: dict[str, Subnet], examples: dict[str, Batch]
) -> dict[str, dict[str, float]]:
    answers = {name: batch.answers for name, batch in examples.items()}
    rows = {}
    for mask, subnet in subnets.items():
        with subnet.applied(model), torch.no_grad():
            for name, batch in examples.items():
                rows[f"{mask} mask, asked for {name}"] = confusion_row(data.answer(model, batch), answers)
    return rows
