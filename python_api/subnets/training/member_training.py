"""One training loop over a stack of networks: own data order each, planted entries constant, best epoch each.

The recipe (batch, rate, epochs) is shared; data, seed, starting weights and frozen entries belong to the member.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from subnets.training.files import load_tensors, save_tensors
from subnets.training.gpt2 import GPT2Shape
from subnets.training.seeds import byte_generator, torch_generator
from subnets.training.stacked import DropoutNoise, StackedGPT2

_EVALUATION_CHUNK = 250  # sequences per forward pass: keeps activations of a dozen members near the caches


@dataclass(frozen=True)
class Recipe:
    """How every member of a stack is trained; AdamW with betas (0.9, beta2), eps 1e-8."""

    epochs: int
    batch: int
    lr: float
    weight_decay: float = 0.01
    beta2: float = 0.999
    clip: float | None = None  # largest gradient norm of a member
    warmup_steps: int = 0  # the rate rises linearly over this many steps
    decay: bool = False  # the rate falls linearly to 0 at the end of the last epoch
    evaluate_every: int = 0  # steps; 0 = at the end of each epoch
    stop_at: float | None = None  # validation accuracy of every member at which training stops
    patience: int | None = None  # epochs without gain of any member after which training stops


@dataclass(frozen=True)
class Member:
    """One network of a stack.

    `state` is its starting state dict; `frozen[name]` (bool, the parameter's shape) marks entries that keep their
    starting value to the bit; `streams` name its random streams, so equal streams mean equal data order and dropout.
    """

    label: dict[str, int | float | str]
    state: dict[str, Tensor]
    train: Tensor
    validation: Tensor
    test: Tensor
    streams: tuple[int | str, ...]
    frozen: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class MemberResult:
    """What came out: accuracies of the best evaluation (the first of equals), its epoch, the curve and the weights."""

    label: dict[str, int | float | str]
    test_accuracy: float
    validation_accuracy: float
    best_epoch: int
    curve: list[dict[str, float]]
    state: dict[str, Tensor]


@dataclass
class _Progress:
    """Where training stands: all of it but the tensors goes into the checkpoint as JSON."""

    epoch: int = 0
    step: int = 0
    best: list[float] = field(default_factory=list)
    best_epoch: list[int] = field(default_factory=list)
    last_gain: int = 0
    curves: list[list[dict[str, float]]] = field(default_factory=list)
    done: bool = False


Report = Callable[[dict[str, float]], None]


class StackTrainer:
    """Trains a stack; `checkpoint` (a path) makes it resumable at epochs, with the same numbers as an unbroken run."""

    def __init__(
        self,
        shape: GPT2Shape,
        members: Sequence[Member],
        recipe: Recipe,
        *,
        checkpoint: Path | None = None,
        checkpoint_seconds: float = 30.0,
    ) -> None:
        _check_members(members, recipe)
        self.shape, self.recipe = shape, recipe
        self.order = sorted(range(len(members)), key=lambda i: not members[i].frozen)  # planted and frozen ones first
        self.members = [members[i] for i in self.order]
        self.net = StackedGPT2(shape, [member.state for member in self.members])
        self.best = {name: value.clone() for name, value in self.net.params.items()}
        self.frozen = _stack_frozen(self.members, self.net)
        self.optimizer = self._optimizer()
        self.train_data = torch.stack([member.train for member in self.members])
        self.progress = _Progress(
            best=[-1.0] * len(members), best_epoch=[0] * len(members), curves=[[] for _ in members]
        )
        self.checkpoint, self.checkpoint_seconds = checkpoint, checkpoint_seconds

    def run(self, report: Report | None = None) -> list[MemberResult]:
        """Trains to the end (or goes on from the checkpoint) and returns one result per member, in the given order.

        `report` is called after every step with epoch, step (of the whole training), loss and the last validation
        accuracy (means over members).
        """
        if self.checkpoint is not None and self.checkpoint.exists():
            self._load_checkpoint(self.checkpoint)
        written = time.monotonic()
        while self.progress.epoch < self.recipe.epochs and not self.progress.done:
            self._epoch(report)
            if self.checkpoint is not None and time.monotonic() - written >= self.checkpoint_seconds:
                self._save_checkpoint(self.checkpoint)
                written = time.monotonic()
        return self._results()

    def _optimizer(self) -> torch.optim.AdamW:
        for name, value in self.net.params.items():
            value.grad = self.net.grads[name]
        recipe = self.recipe
        betas = (0.9, recipe.beta2)
        params = list(self.net.params.values())
        return torch.optim.AdamW(params, lr=recipe.lr, betas=betas, weight_decay=recipe.weight_decay, fused=True)

    def _steps_per_epoch(self) -> int:
        return -(-self.train_data.shape[1] // self.recipe.batch)

    def _epoch(self, report: Report | None) -> None:
        state, recipe, steps = self.progress, self.recipe, self._steps_per_epoch()
        epoch = state.epoch + 1
        num_rows = self.train_data.shape[1]
        order = torch.stack(
            [torch.randperm(num_rows, generator=torch_generator(*m.streams, "order", epoch)) for m in self.members]
        )
        generators = [byte_generator(*m.streams, "dropout", epoch) for m in self.members]
        noise = DropoutNoise(generators, self.shape.dropout) if self.shape.dropout > 0 else None
        total = torch.zeros(len(self.members))
        since = 0
        for step, rows in enumerate(order.split(recipe.batch, dim=1), start=1):
            losses = self._step(rows, noise)
            total += losses
            since += 1
            due = step == steps or (recipe.evaluate_every and step % recipe.evaluate_every == 0)
            if due:
                self._evaluate(epoch - 1 + step / steps, epoch, (total / since).tolist())
                total.zero_()
                since = 0
            if report is not None:
                accuracy = sum(c[-1]["validation_accuracy"] for c in state.curves if c) / len(self.members)
                report({"epoch": epoch, "step": state.step, "loss": losses.mean().item(), "accuracy": accuracy})
            if due and recipe.stop_at is not None and min(state.best) >= recipe.stop_at:
                state.done = True
                break
        state.epoch = epoch
        if recipe.patience is not None and epoch - state.last_gain >= recipe.patience:
            state.done = True

    def _step(self, rows: Tensor, noise: DropoutNoise | None) -> Tensor:
        recipe, state = self.recipe, self.progress
        batch = self.train_data.gather(1, rows[:, :, None].expand(-1, -1, self.train_data.shape[2]))
        losses = self.net.loss_and_grads(batch, noise)
        if recipe.clip is not None:
            _clip_members(self.net.grads, recipe.clip)
        total = recipe.epochs * self._steps_per_epoch()
        rate = recipe.lr * min(1.0, (state.step + 1) / max(1, recipe.warmup_steps))
        self.optimizer.param_groups[0]["lr"] = rate * (1.0 - state.step / total) if recipe.decay else rate
        self.optimizer.step()
        state.step += 1
        for name, (mask, value) in self.frozen.items():
            planted = self.net.params[name][: mask.shape[0]]
            torch.where(mask, value, planted, out=planted)
        return losses

    def _evaluate(self, position: float, epoch: int, losses: list[float]) -> None:
        """Validation accuracy of every member; keeps the weights of those that got better."""
        state = self.progress
        accuracies = self._accuracies([member.validation for member in self.members])
        for i, accuracy in enumerate(accuracies):
            state.curves[i].append({"epoch": position, "loss": losses[i], "validation_accuracy": accuracy})
            if accuracy > state.best[i]:
                state.best[i], state.best_epoch[i], state.last_gain = accuracy, epoch, epoch
                for name, value in self.net.params.items():
                    self.best[name][i].copy_(value[i])

    def _accuracies(self, sets: list[Tensor]) -> list[float]:
        sequences = torch.stack(sets)
        right = [(self.net.answers(part) == part[..., -1]).sum(1) for part in sequences.split(_EVALUATION_CHUNK, dim=1)]
        return (torch.stack(right).sum(0) / sequences.shape[1]).tolist()

    def _results(self) -> list[MemberResult]:
        for name, value in self.net.params.items():
            value.copy_(self.best[name])
        state = self.progress
        tests = self._accuracies([member.test for member in self.members])
        results: list[MemberResult | None] = [None] * len(self.members)
        for i, (member, where) in enumerate(zip(self.members, self.order, strict=True)):
            results[where] = MemberResult(
                member.label, tests[i], state.best[i], state.best_epoch[i], state.curves[i], self.net.state(i)
            )
        return [result for result in results if result is not None]

    def _save_checkpoint(self, path: Path) -> None:
        tensors = {}
        for name, value in self.net.params.items():
            adam = self.optimizer.state[value]
            tensors[f"param.{name}"], tensors[f"best.{name}"] = value, self.best[name]
            tensors[f"exp_avg.{name}"], tensors[f"exp_avg_sq.{name}"] = adam["exp_avg"], adam["exp_avg_sq"]
            tensors[f"step.{name}"] = adam["step"]
        save_tensors(path, tensors, {"progress": json.dumps(vars(self.progress))})

    def _load_checkpoint(self, path: Path) -> None:
        tensors, metadata = load_tensors(path)
        self.progress = _Progress(**json.loads(metadata["progress"]))
        for name, value in self.net.params.items():
            value.copy_(tensors[f"param.{name}"])
            self.best[name].copy_(tensors[f"best.{name}"])
            self.optimizer.state[value] = {
                key: tensors[f"{key}.{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
            }


def train_stack(
    shape: GPT2Shape,
    members: Sequence[Member],
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    report: Report | None = None,
) -> list[MemberResult]:
    """Results of training `members` side by side, in their order; see StackTrainer."""
    return StackTrainer(shape, members, recipe, checkpoint=checkpoint).run(report)


def _check_members(members: Sequence[Member], recipe: Recipe) -> None:
    if not members:
        raise ValueError("train_stack: members must hold at least one member, got none")
    if recipe.epochs < 1 or recipe.batch < 1:
        raise ValueError(
            f"train_stack: epochs and batch must be at least 1, got epochs={recipe.epochs}, batch={recipe.batch}"
        )
    lengths = sorted({len(member.train) for member in members})
    if len(lengths) > 1 or lengths[0] == 0:
        raise ValueError(f"train_stack: all members need equally many training rows (> 0), got {lengths}")


def _stack_frozen(members: Sequence[Member], net: StackedGPT2) -> dict[str, tuple[Tensor, Tensor]]:
    """Per parameter a mask and the starting values, [F, ...]: the F members with frozen entries come first."""
    frozen = [member for member in members if member.frozen]
    names = sorted({name for member in frozen for name in member.frozen})
    stacked = {}
    for name in names:
        value = net.params[name][: len(frozen)].clone()
        nothing = torch.zeros(value.shape[1:], dtype=torch.bool)
        stacked[name] = (torch.stack([member.frozen.get(name, nothing) for member in frozen]), value)
    return stacked


def _clip_members(grads: dict[str, Tensor], largest: float) -> None:
    """Scales each member's gradient so that its norm is at most `largest`, as torch's clip_grad_norm_ does."""
    squares = [torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads.values()]
    norm = torch.linalg.vector_norm(torch.stack(squares), dim=0)
    factor = (largest / (norm + 1e-6)).clamp_max_(1.0)
    for grad in grads.values():
        grad.mul_(factor.view(-1, *[1] * (grad.ndim - 1)))
