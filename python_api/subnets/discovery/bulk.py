"""Discovery in bulk: every combination of seeds, penalties and initial scores, trained step by step in one run.

Members are stepped together: a step draws one batch per seed, runs passes of as many members as share one
(:mod:`.passes`), then steps all scores. They never mix, so each ends as it does alone, within rounding:

- Batches, objective and evaluate find the random numbers that they find alone: each seed has its own stream, put in
  place whenever something of that seed runs. Members of one seed share one draw of the batch, and passes of one seed
  all start from the same numbers.
- Members of different seeds share a pass if their batches can be stacked and the objective draws no random numbers,
  which is looked at in every such pass: one that did is done again seed by seed.
- An objective that vmap can't take runs for one member after the other, with a warning that says why.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subnet_kernels.masks import expand_scores
from subnet_kernels.optim import MaskAdamW, bind_masks
from subnet_kernels.packing import unpack_mask

from ..masking import MaskSet
from ..training.seeds import seed_for
from .bar import Bar
from .checkpoint import CheckpointFile
from .config import DiscoveryConfig
from .control import density_at_end, density_control
from .data import EpochData, EpochOfSeeds, can_stack
from .discoveries import Discoveries
from .passes import ObjectiveError, Passes, fill_missing_gradients
from .random_state import RandomState, Streams
from .record import Callback, Evaluate, Record, check_score, lam_per_weight


class BulkRun:
    """A discovery of several members on its way."""

    def __init__(
        self, masks: MaskSet, data: EpochData, objective: Callable[..., Tensor], config: DiscoveryConfig,
        evaluate: Evaluate | None, callbacks: Sequence[Callback], random_state: RandomState, method: str,
    ) -> None:
        self.masks, self.data, self.config, self.evaluate = masks, data, config, evaluate
        _check_kinds(masks)
        self.members = config.members()
        self.seeds = tuple(dict.fromkeys(member.seed for member in self.members))
        self.seed_of = [self.seeds.index(member.seed) for member in self.members]  # members of a seed are neighbours
        self.random_state = random_state
        self.control = density_control(config)
        self.scores = MemberScores(masks, [member.score_init for member in self.members])
        self.optimizer = _optimizer(masks, self.scores.stacks, self.members)
        self.passes = Passes(masks, self.scores.stacks, objective, config.members_at_once)
        keeps_scores = config.penalties is not None and len(config.penalties) > 1  # for Discoveries.at_density
        self.records = [Record(masks, member, evaluate, callbacks, keeps_scores, method) for member in self.members]
        self.file = CheckpointFile(
            config, evaluate, masks, self.scores.stacks, self.optimizer, self.records, self.control
        )
        found = self.file.load()
        if found and config.members_at_once is None:
            self.passes.at_once = found["at_once"]  # free memory, on which it may rest, was another then
        self.passes.by_seed = bool(found.get("by_seed"))

    @property
    def epochs_done(self) -> int:
        return len(self.records[0].history)

    @property
    def steps_done(self) -> int:
        return self.records[0].steps_done

    def epoch(self, epoch: int, bar: Bar) -> None:
        """Train all members for an epoch, evaluate each, and write the checkpoint."""
        with self.random_state.kept():
            streams = Streams(self.random_state, [seed_for(seed, "discover", epoch) for seed in self.seeds])
            lams = self._set_lams()
            losses = self._train(epoch, streams, bar)
            self.data.check_count(epoch, len(losses))
            by_member = torch.stack(losses).T
            for number, (record, member) in enumerate(zip(self.records, self.members, strict=True)):
                self.scores.load(number)
                label = {"seed": member.seed, "lam": member.lam, "score_init": member.score_init}
                with streams.at(self.seed_of[number], advance=False):
                    record.finish_epoch(epoch, by_member[number], lams[number], label, self.file.path)
                if self.control is not None:
                    self.control.update(number, density_at_end(self.masks, self.config.beta_end))
            self.file.save({"at_once": self.passes.at_once, "by_seed": self.passes.by_seed})

    def _set_lams(self) -> list[float]:
        """Each member's lam in this epoch."""
        if self.control is None:
            return [member.lam for member in self.members]
        lams = [lam_per_weight(self.masks, self.config, lam) for lam in self.control.lams]
        self.optimizer.param_groups[0]["lam"] = lams
        return list(self.control.lams)

    def _train(self, epoch: int, streams: Streams, bar: Bar) -> list[Tensor]:
        config, masks = self.config, self.masks
        masks.model.eval()  # evaluate and callbacks may have left another mode
        beta = masks.beta = config.beta(epoch, config.epochs)
        losses: list[Tensor] = []
        for index, batches in enumerate(EpochOfSeeds(self.data, epoch, self.seeds, streams)):
            if config.anneal == "step":
                beta = masks.beta = self.data.beta(epoch, index)
            losses.append(self.step(batches, streams))
            bar.step(losses[-1].mean(), beta, self.scores)
        return losses

    def step(self, batches: list[Any], streams: Streams) -> Tensor:
        """One step of all members on each seed's batch; their losses [G]."""
        if self.passes.at_once is None:
            with streams.at(0, advance=False):
                self.passes.measure(batches[0])
        before = list(streams.states)
        losses = None
        while losses is None:  # again in another way: seed by seed, fewer at once, and at last one by one
            try:
                losses = self._passes(batches, streams)
            except _CanNotShare as reason:
                self._share_less(reason)
                streams.states = list(before)
                self.passes.forget()
        fill_missing_gradients(self.scores.stacks.values())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def _share_less(self, reason: _CanNotShare) -> None:
        """Each of these happens a few times at most: by_seed is set once, at_once falls."""
        if reason.warning is None:
            self.passes.by_seed = True
        else:
            warnings.warn(reason.warning, RuntimeWarning, stacklevel=3)
            self.passes.at_once = reason.at_once

    def _passes(self, batches: list[Any], streams: Streams) -> Tensor:
        """All members' losses and gradients."""
        split = self.passes.by_seed or not can_stack(batches)
        losses = []
        for first, last in self._ranges(split):
            seeds = self.seed_of[first:last]
            its = [batches[seed] for seed in seeds]
            if seeds[0] == seeds[-1]:
                is_last = last == len(self.members) or self.seed_of[last] != seeds[0]
                with streams.at(seeds[0], advance=is_last):
                    losses.append(self._pass(first, last, its, "same"))
            else:
                now = self.random_state.get()
                losses.append(self._pass(first, last, its, "error"))
                if not self.random_state.is_at(now):
                    raise _CanNotShare(None)
        return torch.cat(losses)

    def _pass(self, first: int, last: int, batches: list[Any], randomness: str) -> Tensor:
        if last - first == 1 and self.passes.stacked is None:
            return self.passes.alone(first, batches[0])[None]
        try:
            return self.passes.together(first, last, batches, randomness)
        except torch.OutOfMemoryError:
            if last - first == 1:
                raise
            fewer = (last - first) // 2
            raise _CanNotShare(
                f"discover: {last - first} members at once do not fit in memory; at most {fewer} share a "
                f"pass from now on; members_at_once={fewer} has that from the start",
                fewer,
            ) from None
        except Exception as error:
            if self.passes.stacked is not None or isinstance(error, ObjectiveError):
                raise
            if randomness == "error" and "called random operation while in randomness error mode" in str(error):
                raise _CanNotShare(None) from None
            lines = str(error).strip().splitlines() or [""]
            raise _CanNotShare(
                f"discover: torch.func.vmap can't run this objective for {last - first} members at once "
                f"({type(error).__name__}: {lines[0]}); they run one after the other in each step, with the same "
                "results; an objective of tensor operations alone is faster (no .item(), no branch on values)"
            ) from None

    def _ranges(self, split: bool) -> Iterator[tuple[int, int]]:
        """Members of each pass as (first, last + 1)."""
        at_once = self.passes.at_once
        assert at_once is not None
        ends = [i + 1 for i, seed in enumerate(self.seed_of) if [*self.seed_of, -1][i + 1] != seed]
        begin = 0
        for end in ends if split else [len(self.members)]:
            for first in range(begin, end, at_once):
                yield first, min(first + at_once, end)
            begin = end

    def forget_step(self) -> None:
        """Nothing is captured."""

    def result(self) -> Discoveries:
        """All members' subnets; the intersection and the union of each group of seeds evaluated, if there is a way."""
        runs = [record.result() for record in self.records]
        scores = [record.best_scores for record in self.records] if self.records[0].keeps_scores else None
        shared = []
        if self.evaluate is not None:
            with self.random_state.kept():
                self.random_state.seed(seed_for("discover", "shared"))
                shared = [self._evaluate_shared(*group) for group in self._groups()]
        return Discoveries(runs, scores, shared)

    def _groups(self) -> Iterator[tuple[float, float, list[Record]]]:
        """(lam, score_init, records of all seeds)"""
        by = sorted(zip(self.members, self.records, strict=True), key=lambda pair: (pair[0].lam, pair[0].score_init))
        for key, pairs in itertools.groupby(by, key=lambda pair: (pair[0].lam, pair[0].score_init)):
            yield *key, [record for _, record in pairs]

    def _evaluate_shared(self, lam: float, score_init: float, records: list[Record]) -> dict[str, Any]:
        row: dict[str, Any] = {"lam": lam, "score_init": score_init}
        assert self.evaluate is not None
        for name, combine in (("core", torch.all), ("union", torch.any)):
            for weight, layer in self.masks.layers.items():
                shape = tuple(layer.weight.shape)
                kept = torch.stack([unpack_mask(record.best_masks[weight], shape) for record in records])
                self.scores.load_hard(layer, combine(kept, dim=0))
            self.masks.invalidate()
            with torch.no_grad(), self.masks.hard():
                row[name] = check_score(self.evaluate(self.masks.model), f"for the {name} of all seeds")
        return row


class _CanNotShare(Exception):
    """A pass of several members that has to be done in another way: with a warning, at most ``at_once`` members a pass;
    without one, the members of one seed alone."""

    def __init__(self, warning: str | None, at_once: int = 1) -> None:
        super().__init__(warning)
        self.warning, self.at_once = warning, at_once


class MemberScores:
    """The scores of all members: one parameter [G, *scores' shape] per layer.

    Attributes:
        stacks: the weight's name -> scores [G, *scores' shape].
    """

    def __init__(self, masks: MaskSet, score_inits: Sequence[float]) -> None:
        self.masks = masks
        self.stacks: dict[str, nn.Parameter] = {}
        for name, layer in masks.layers.items():
            own = layer.scores  # strides as they are: dense, in the weight's memory order
            stack = torch.empty_strided(
                (len(score_inits), *own.shape), (own.numel(), *own.stride()), dtype=own.dtype, device=own.device
            )
            for scores, init in zip(stack, score_inits, strict=True):
                scores.fill_(init)
            self.stacks[name] = nn.Parameter(stack)
            bind_masks(self.stacks[name], layer.weight, layer.beta, layer.kind)

    def load(self, number: int) -> None:
        """Put a member's scores into the masks."""
        with torch.no_grad():
            for name, layer in self.masks.layers.items():
                layer.scores.copy_(self.stacks[name][number])
        self.masks.invalidate()

    @staticmethod
    def load_hard(layer: Any, kept: Tensor) -> None:
        """Give the layer scores whose hard mask this is."""
        with torch.no_grad():
            groups = [w // s for w, s in zip(layer.weight.shape, layer.scores.shape, strict=True)]
            first = kept[tuple(slice(None, None, step) for step in groups)]  # one weight of every score's
            layer.scores.copy_(torch.where(first, 1.0, -1.0))
            assert torch.equal(expand_scores(layer.scores > 0, tuple(layer.weight.shape)).cpu(), kept)

    def density(self) -> float:
        """Mean over members of the fraction of masked weights with s > 0."""
        return self._mean(lambda layer, scores: scores > 0)

    def undecided(self) -> float:
        """Mean over members of the fraction of masks between .01 and .99."""
        return self._mean(lambda layer, scores: (layer.kind.value(scores, layer.beta) - 0.5).abs() < 0.49)

    @torch.no_grad()
    def _mean(self, which: Callable[[Any, Tensor], Tensor]) -> float:
        kept = total = 0
        for name, layer in self.masks.layers.items():
            scores = self.stacks[name]
            kept += int(which(layer, scores).sum()) * layer.weights_per_score
            total += len(scores) * layer.weight.numel()
        return kept / max(total, 1)


def _check_kinds(masks: MaskSet) -> None:
    others = {name: layer.kind.name for name, layer in masks.layers.items() if layer.kind.name != "sigmoid"}
    if others:
        raise ValueError(
            f"discover: seeds, penalties and score_inits train members of kind 'sigmoid' side by side, targets have "
            f"{others}; call discover once for each member"
        )


def _optimizer(masks: MaskSet, scores: dict[str, nn.Parameter], members: Sequence[DiscoveryConfig]) -> MaskAdamW:
    """The optimizer of a discovery alone, with each member's own lam."""
    lams = [lam_per_weight(masks, member, member.lam) for member in members]
    return MaskAdamW(scores.values(), members[0].lr, weight_decay=members[0].weight_decay, lam=lams)
