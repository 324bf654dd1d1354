"""One training loop over a stack of networks: own data order each, planted entries constant, best epoch each.

The recipe (batch, rate, most epochs) is shared; data, seed, starting weights, frozen entries and the end belong to the
member: one that is done leaves the stack, the others go on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subnets.training.files import load_tensors, save_tensors
from subnets.training.gpt2 import GPT2Shape
from subnets.training.seeds import seed_for, torch_generator
from subnets.training.stack_step import Rows, Stack, StackedRows, StackStep
from subnets.training.stacked import StackedGPT2

_SETS = ("train", "validation", "test")
_EVALUATION_CHUNK = 250  # rows per forward pass: keeps activations of a dozen members near the caches


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
    decay: bool = False  # the rate falls linearly to 0 at the end of the last epoch; members then have equal epochs
    evaluate_every: int = 0  # steps; 0 = at the end of each epoch
    stop_at: float | None = None  # validation accuracy at which a member is done
    patience: int | None = None  # epochs without gain after which a member is done


@dataclass(frozen=True)
class Member:
    """One network of a stack.

    `state` is its starting state dict; `frozen[name]` (bool, the parameter's shape) marks entries that keep their
    starting value to the bit; `streams` name its random streams, so equal streams mean equal data order and dropout.
    `train`, `validation`, `test` may have any number of rows; a tuple of tensors counts rows in the first dimension.
    """

    label: dict[str, int | float | str]
    state: dict[str, Tensor]
    train: Rows
    validation: Rows
    test: Rows
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
class _Standing:
    """Where one member stands."""

    best: float = -1.0
    best_epoch: int = 0
    since: int = 0  # steps since its last evaluation
    curve: list[dict[str, float]] = field(default_factory=list)
    test_accuracy: float | None = None  # given when it has left


@dataclass
class _Progress:
    """Where training stands: all of it but the tensors goes into the checkpoint as JSON.

    Members begin together and take every step together until they leave: `step` counts for each of them.
    """

    active: list[int]  # members in the order of the stack
    standing: list[_Standing]
    step: int = 0
    member_steps: int = 0


Report = Callable[[dict[str, float]], None]
Network = GPT2Shape | Callable[[list[dict[str, Tensor]], torch.device], Stack]


class StackTrainer:
    """Trains a stack; `checkpoint` (a path) makes it resumable at any kill, with the same numbers as an unbroken run
    (on a CUDA device within rounding: there the embedding's gradient is summed by atomic additions).

    Args:
        network: the shape of the GPT-2s, or a function of (state dicts, device) that makes a stack (`StackedModule`).
        members: what is trained; each may have its own number of rows.
        recipe: how.
        checkpoint: file that is written every `checkpoint_seconds`, after an evaluation.
        device: where to train; a CUDA device replays the whole step as a CUDA graph.

    Raises:
        ValueError: no members, none of a member's rows, epochs or batch below 1, a decaying rate for members whose
            epochs have different numbers of steps; at `run`, a checkpoint of other members or another recipe.
    """

    def __init__(
        self,
        network: Network,
        members: Sequence[Member],
        recipe: Recipe,
        *,
        checkpoint: Path | None = None,
        checkpoint_seconds: float = 30.0,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_members(members, recipe)
        self.recipe, self.members, self.device = recipe, list(members), torch.device(device)
        self.checkpoint, self.checkpoint_seconds = checkpoint, checkpoint_seconds
        active = sorted(range(len(members)), key=lambda i: not members[i].frozen)  # planted and frozen ones first
        self.progress = _Progress(active, [_Standing() for _ in members])
        stacked = [self.members[i] for i in active]
        states = [member.state for member in stacked]
        if isinstance(network, GPT2Shape):
            self.net, dropout = StackedGPT2(network, states, device=self.device), network.dropout
        else:
            self.net, dropout = network(states, self.device), 0.0
        self.best = {name: value.clone() for name, value in self.net.params.items()}
        self.left: dict[int, dict[str, Tensor]] = {}  # best weights of members that are done
        self.validation, self.test = (
            StackedRows([getattr(member, name) for member in stacked], self.device) for name in ("validation", "test")
        )
        self.step = StackStep(
            self.net, StackedRows([member.train for member in stacked], self.device), recipe.batch, self._rates(),
            decay=recipe.weight_decay, beta2=recipe.beta2, clip=recipe.clip,
            seeds=torch.tensor([seed_for(*m.streams, "dropout") for m in stacked], device=self.device),
            dropout=dropout, frozen=_stack_frozen(stacked, self.net),
        )  # fmt: skip

    def run(self, report: Report | None = None) -> list[MemberResult]:
        """Trains to the end (or goes on from the checkpoint) and returns one result per member, in the given order.

        `report` is called after every step with step, epoch (that of the member that is furthest), active (members in
        the stack), member_steps (steps done, summed over members), loss and the last validation accuracy (means over
        the active members; on a CUDA device the loss is the last one that was read at an evaluation).
        """
        state = self.progress
        if self.checkpoint is not None and self.checkpoint.exists():
            state = self._load_checkpoint(self.checkpoint)
        for place, i in enumerate(state.active):
            self._set_order(place, i)
        written, loss = time.monotonic(), float("nan")
        while state.active:
            self.step(max(self._rows_now(i) for i in state.active))
            active = list(state.active)
            state.step += 1
            state.member_steps += len(active)
            due = self._after_step()
            if report is not None:
                if due or self.device.type == "cpu":
                    loss = self.step.losses.mean().item() if state.active else loss
                curves = [state.standing[i].curve for i in active]
                report({
                    "epoch": max(-(-state.step // self._steps(i)) for i in active), "step": state.step,
                    "active": len(state.active), "member_steps": state.member_steps, "loss": loss,
                    "accuracy": sum(c[-1]["validation_accuracy"] for c in curves if c) / len(active),
                })  # fmt: skip
            if due and self.checkpoint is not None and time.monotonic() - written >= self.checkpoint_seconds:
                self._save_checkpoint(self.checkpoint)
                written = time.monotonic()
        return [
            MemberResult(member.label, at.test_accuracy or 0.0, at.best, at.best_epoch, at.curve, self.left[i])
            for i, (member, at) in enumerate(zip(self.members, state.standing, strict=True))
        ]

    def _num_rows(self, i: int) -> int:
        return _num_rows(self.members[i].train)

    def _steps(self, i: int) -> int:
        """Steps of one epoch of member i."""
        return -(-self._num_rows(i) // self.recipe.batch)

    def _rows_now(self, i: int) -> int:
        """Rows of member i in the step to come."""
        done = self.progress.step % self._steps(i) * self.recipe.batch
        return min(self.recipe.batch, self._num_rows(i) - done)

    def _rates(self) -> Tensor:
        recipe = self.recipe
        total = recipe.epochs * max(map(self._steps, range(len(self.members))))
        steps = torch.arange(total, dtype=torch.float64)
        rates = recipe.lr * ((steps + 1) / max(1, recipe.warmup_steps)).clamp_max(1.0)
        if recipe.decay:
            rates *= 1.0 - steps / total
        return rates.float().to(self.device)

    def _set_order(self, place: int, i: int) -> None:
        """Gives member i the row order of the epoch that it is in."""
        steps, streams = self._steps(i), self.members[i].streams
        epochs = self.progress.step // steps  # done
        order = torch.randperm(self._num_rows(i), generator=torch_generator(*streams, "order", epochs + 1))
        self.step.set_order(place, order, epochs * steps)

    def _after_step(self) -> bool:
        """Evaluates the members that are due, lets those that are done leave, begins epochs; was any due?"""
        state, recipe = self.progress, self.recipe
        due, gone = [], []
        for place, i in enumerate(state.active):
            state.standing[i].since += 1
            within = state.step % self._steps(i)
            if within == 0 or (recipe.evaluate_every and within % recipe.evaluate_every == 0):
                due.append(place)
        if due:
            self._evaluate(due)
        for place, i in enumerate(state.active):
            ended = state.step % self._steps(i) == 0
            if place in due and self._is_done(i, ended):
                gone.append(place)
            elif ended:
                self._set_order(place, i)
        if gone:
            self._leave(gone)
        return bool(due)

    def _is_done(self, i: int, ended: bool) -> bool:
        """Is member i done after an evaluation (at the end of an epoch)?"""
        at, recipe, epoch = self.progress.standing[i], self.recipe, self.progress.step // self._steps(i)
        if recipe.stop_at is not None and at.best >= recipe.stop_at:
            return True
        return ended and (
            epoch == recipe.epochs or (recipe.patience is not None and epoch - at.best_epoch >= recipe.patience)
        )

    def _evaluate(self, places: list[int]) -> None:
        """Validation accuracy of these members; keeps the weights of those that got better."""
        state = self.progress
        accuracies = self._accuracies(self.net.params, self.validation, places)
        losses = self.step.totals.tolist()
        better = []
        for place, accuracy in zip(places, accuracies, strict=True):
            i = state.active[place]
            at, steps = state.standing[i], self._steps(i)
            loss = losses[place] / at.since
            at.curve.append({"epoch": state.step / steps, "loss": loss, "validation_accuracy": accuracy})
            at.since = 0
            if accuracy > at.best:
                at.best, at.best_epoch = accuracy, -(-state.step // steps)
                better.append(place)
        self.step.totals[places] = 0.0
        if better:
            rows = torch.tensor(better, device=self.device)
            for name, value in self.net.params.items():
                self.best[name].index_copy_(0, rows, value.index_select(0, rows))

    def _accuracies(self, params: dict[str, Tensor], sets: StackedRows, places: list[int]) -> list[float]:
        """Share of right answers of the members at these places with these parameters."""
        net, index = self.net.like(params), torch.tensor(places, device=self.device)
        lengths = torch.tensor([sets.lengths[place] for place in places], device=self.device)
        if len(places) < self.net.members:
            net = net.like({name: value[index] for name, value in params.items()})
        right = torch.zeros(len(places), dtype=torch.int64, device=self.device)
        for numbers in torch.arange(max(sets.lengths[p] for p in places), device=self.device).split(_EVALUATION_CHUNK):
            rows = sets.take(numbers.expand(len(places), -1), index)
            right += (net.right(rows) & (numbers < lengths[:, None])).sum(1)
        return (right / lengths).tolist()

    def _leave(self, places: list[int]) -> None:
        """The members at these places get their test accuracy and leave, with all that belongs to them."""
        state = self.progress
        net = self.net.like(self.best)
        for place, accuracy in zip(places, self._accuracies(self.best, self.test, places), strict=True):
            self.left[state.active[place]] = net.state(place)
            state.standing[state.active[place]].test_accuracy = accuracy
        self._keep([place for place in range(len(state.active)) if place not in places])

    def _keep(self, places: list[int]) -> None:
        self.progress.active = [self.progress.active[place] for place in places]
        if not places:
            return
        members = torch.tensor(places)
        self.step.keep(members)
        self.validation.keep(members)
        self.test.keep(members)
        self.best = {name: value[members] for name, value in self.best.items()}

    def _save_checkpoint(self, path: Path) -> None:
        tensors = {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"left.{i}.{name}": value for i, state in self.left.items() for name, value in state.items()}
        if self.progress.active:
            tensors |= self.step.tensors()
        state = {**vars(self.progress), "standing": [vars(at) for at in self.progress.standing]}
        save_tensors(path, tensors, {"progress": json.dumps(state), "of": json.dumps(self._identity())})

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint belongs to: the recipe and, for each member, its name, streams and sizes."""
        members = [
            [member.label, list(member.streams), *(_num_rows(getattr(member, name)) for name in _SETS)]
            for member in self.members
        ]
        shapes = {name: list(value.shape[1:]) for name, value in self.net.params.items()}
        return json.loads(json.dumps({"recipe": asdict(self.recipe), "members": members, "parameters": shapes}))

    def _load_checkpoint(self, path: Path) -> _Progress:
        tensors, metadata = load_tensors(path)
        theirs, ours = json.loads(metadata.get("of", "{}")), self._identity()
        if other := [name for name in ours if theirs.get(name) != ours[name]]:
            raise ValueError(
                f"train_stack: the checkpoint {path} belongs to another training, these differ: {', '.join(other)}; "
                "use another path, or delete it to start over"
            )
        state: dict[str, Any] = json.loads(metadata["progress"])
        active = state["active"]
        self._keep([self.progress.active.index(i) for i in active])
        self.progress = _Progress(**{**state, "standing": [_Standing(**at) for at in state["standing"]]})
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "left":
                i, _, rest = rest.partition(".")
                self.left.setdefault(int(i), {})[rest] = value
            elif kind == "best" and active:
                self.best[rest].copy_(value)
        if active:
            self.step.load(tensors)
        return self.progress


def train_stack(
    network: Network,
    members: Sequence[Member],
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    report: Report | None = None,
    device: torch.device | str = "cpu",
) -> list[MemberResult]:
    """Results of training `members` side by side, in their order.

    Args:
        network, members, recipe, checkpoint, device: as for `StackTrainer`, whose errors it raises.
        report: called with numbers on the way (for a progress bar), or None.
    """
    return StackTrainer(network, members, recipe, checkpoint=checkpoint, device=device).run(report)


def _num_rows(rows: Rows) -> int:
    return len(rows[0] if isinstance(rows, tuple) else rows)


def _check_members(members: Sequence[Member], recipe: Recipe) -> None:
    if not members:
        raise ValueError("train_stack: members must hold at least one member, got none")
    if recipe.epochs < 1 or recipe.batch < 1:
        raise ValueError(
            f"train_stack: epochs and batch must be at least 1, got epochs={recipe.epochs}, batch={recipe.batch}"
        )
    for name in _SETS:
        lengths = [_num_rows(getattr(member, name)) for member in members]
        if 0 in lengths:
            raise ValueError(f"train_stack: every member needs {name} rows, got none for member {lengths.index(0)}")
    steps = sorted({-(-_num_rows(member.train) // recipe.batch) for member in members})
    if recipe.decay and len(steps) > 1:
        raise ValueError(
            f"train_stack: a decaying rate needs members whose epochs have equally many steps, got {steps}; "
            "train them in one stack for each number"
        )


def _stack_frozen(members: Sequence[Member], net: Stack) -> dict[str, tuple[Tensor, Tensor]]:
    """Per parameter a mask and the starting values, [F, ...]: the F members with frozen entries come first."""
    frozen = [member for member in members if member.frozen]
    names = sorted({name for member in frozen for name in member.frozen})
    stacked = {}
    for name in names:
        value = net.params[name][: len(frozen)].clone()
        nothing = torch.zeros(value.shape[1:], dtype=torch.bool)
        masks = torch.stack([member.frozen.get(name, nothing) for member in frozen])
        stacked[name] = (masks.to(value.device), value)
    return stacked
