"""One optimizer step of a stack, as a function of device memory alone: captured as a CUDA graph where there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from subnets.training.stacked import DropoutNoise

Rows = Any  # what a network learns from: a tensor or a tuple of tensors whose first dimension counts examples


class Stack(Protocol):
    """P networks side by side, each parameter with a leading dimension P."""

    params: dict[str, Tensor]
    grads: dict[str, Tensor]

    @property
    def members(self) -> int:
        """How many networks there are: P."""
        ...

    def like(self, params: dict[str, Tensor]) -> Stack:
        """A stack of other parameters, which are not copied."""
        ...

    def keep(self, members: Tensor) -> None:
        """Keeps these members (int64 indices); the others leave."""
        ...

    def state(self, member: int) -> dict[str, Tensor]:
        """A copy of one member's parameters on the CPU."""
        ...

    def loss_and_grads(self, rows: Rows, noise: DropoutNoise | None, live: Tensor | None, /) -> Tensor:
        """Losses [P] over the rows [P, B, ...] that `live` [P, B] marks; fills `grads`."""
        ...

    def right(self, rows: Rows, /) -> Tensor:
        """Which rows [P, B, ...] are answered right: bool [P, B]."""
        ...


class StackedRows:
    """The rows of every member, padded to the longest; one copy where all members have the same tensors."""

    def __init__(self, sets: Sequence[Rows], device: torch.device) -> None:
        self.lengths = [len(_parts(rows)[0]) for rows in sets]
        self.is_tuple = isinstance(sets[0], tuple)
        columns = list(zip(*map(_parts, sets), strict=True))
        self.is_shared = all(part is column[0] for column in columns for part in column)
        stacked = [c[0] if self.is_shared else torch.nn.utils.rnn.pad_sequence(list(c), True) for c in columns]
        self.parts = [part.to(device) for part in stacked]

    def keep(self, members: Tensor) -> None:
        """Keeps these members (int64 indices)."""
        self.lengths = [self.lengths[i] for i in members.tolist()]
        if not self.is_shared:
            self.parts = [part[members] for part in self.parts]

    def take(self, rows: Tensor, members: Tensor | None = None) -> Rows:
        """The rows [P, B, ...] of these members (None: of all) from their numbers [P, B]."""
        if self.is_shared:
            taken = tuple(part[rows] for part in self.parts)
        else:
            members = (torch.arange(len(rows), device=rows.device) if members is None else members)[:, None]
            taken = tuple(part[members, rows] for part in self.parts)
        return taken if self.is_tuple else taken[0]


def _parts(rows: Rows) -> tuple[Tensor, ...]:
    return rows if isinstance(rows, tuple) else (rows,)


class StackStep:
    """Gather of the batches, losses and gradients, clipping, AdamW, planted entries put back: one call, one step.

    Everything that changes from step to step lies in tensors on the device: the count of steps (which leads to the
    rows, the rate and the dropout), each member's order of rows and the sums of losses. So nothing is read on the host,
    and on a CUDA device a step is captured as a graph: the first call after a change of the stack runs as it is, the
    second is captured, all others replay. Batches are padded to one size there; rows of padding count nowhere.

    Args:
        net: the stack.
        data: its training rows.
        batch: rows per step and member.
        rates: learning rate of every step, fp32 [steps].
        decay, beta2: AdamW's weight decay and second beta.
        clip: largest gradient norm of a member, or None.
        seeds: int64 [P] of each member's dropout.
        dropout: probability.
        frozen: parameter -> (mask, values), both [F, ...]: entries of the first F members that keep these values.
    """

    def __init__(
        self, net: Stack, data: StackedRows, batch: int, rates: Tensor, *, decay: float, beta2: float,
        clip: float | None, seeds: Tensor, dropout: float, frozen: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:  # fmt: skip
        self.net, self.data, self.batch, self.rates, self.clip = net, data, batch, rates, clip
        self.decay, self.betas, self.dropout = decay, (0.9, beta2), dropout
        self.planted = {name: _bits_of(mask, values) for name, (mask, values) in frozen.items()}
        self.device = rates.device
        longest = -(-max(data.lengths) // batch) * batch
        self.order = torch.zeros(net.members, longest, dtype=torch.int64, device=self.device)
        self.begin = torch.zeros(net.members, 1, dtype=torch.int64, device=self.device)
        self.count = torch.zeros((), dtype=torch.int64, device=self.device)
        self.within = torch.arange(batch, device=self.device)
        self.seeds = seeds
        self.losses = torch.zeros(net.members, device=self.device)
        self.totals = torch.zeros(net.members, device=self.device)
        self.lr = torch.zeros((), device=self.device)
        self.optimizer = self._optimizer()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.is_warm = False

    def _optimizer(self) -> torch.optim.AdamW:
        params = self.net.params
        for name, value in params.items():
            value.grad = self.net.grads[name]
        return torch.optim.AdamW(
            list(params.values()), lr=self.lr, betas=self.betas, weight_decay=self.decay, fused=True,
            capturable=self.device.type == "cuda",
        )  # fmt: skip

    def set_order(self, member: int, rows: Tensor, begin: int) -> None:
        """From step `begin` on this member takes its rows in this order."""
        padded = torch.full((self.order.shape[1],), -1, dtype=torch.int64)
        padded[: len(rows)] = rows
        self.order[member].copy_(padded)
        self.begin[member] = begin

    def keep(self, members: Tensor) -> None:
        """Keeps these members (int64 indices, rising) and their numbers; the others leave."""
        moments = {name: self.optimizer.state.get(value, {}) for name, value in self.net.params.items()}
        self.net.keep(members)
        self.data.keep(members)
        self.order, self.begin, self.seeds = self.order[members], self.begin[members], self.seeds[members]
        self.losses, self.totals = self.losses[members], self.totals[members]
        self.optimizer = self._optimizer()
        for name, value in self.net.params.items():
            kept = {key: state[members] if state.dim() else state for key, state in moments[name].items()}
            self.optimizer.state[value] = kept
        for name, (free, bits) in self.planted.items():
            first = members[members < len(free)]
            self.planted[name] = free[first], bits[first]
        self.graph, self.is_warm = None, False

    def __call__(self, rows: int) -> None:
        """One step with at most `rows` rows of any member; see `losses` and `totals`."""
        if self.device.type != "cuda":
            self.eager(rows)
        elif self.graph is not None:
            self.graph.replay()
        elif not self.is_warm:
            self.eager(self.batch)  # a step like any other, which loads kernels and makes the optimizer's state
            self.is_warm = True
        else:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.device), torch.cuda.graph(self.graph):
                self.eager(self.batch)
            self.graph.replay()

    @torch.no_grad()
    def eager(self, rows: int) -> None:
        """The step itself; it never waits for the device."""
        places = (self.count - self.begin) * self.batch + self.within[:rows]
        numbers = self.order.gather(1, places)
        noise = DropoutNoise(self.seeds, self.count, self.dropout) if self.dropout > 0 else None
        batch = self.data.take(numbers.clamp_min(0))
        self.losses.copy_(self.net.loss_and_grads(batch, noise, numbers >= 0))
        self.totals.add_(self.losses)
        if self.clip is not None:
            _clip_members(self.net.grads, self.clip)
        self.lr.copy_(self.rates.gather(0, self.count.view(1))[0])
        self.optimizer.step()
        for name, (free, bits) in self.planted.items():
            self.net.params[name][: len(free)].view(free.dtype).bitwise_and_(free).bitwise_or_(bits)
        self.count.add_(1)

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must keep of the members that are in."""
        kept = {"count": self.count, "totals": self.totals, "losses": self.losses}
        for name, value in self.net.params.items():
            kept[f"param.{name}"] = value
            kept |= {f"{key}.{name}": state for key, state in self.optimizer.state[value].items()}
        return kept

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `tensors` gave for the same members."""
        for name, value in self.net.params.items():
            value.copy_(tensors[f"param.{name}"])
            self.optimizer.state[value] = {
                key: tensors[f"{key}.{name}"].to(value.device, copy=True) for key in ("step", "exp_avg", "exp_avg_sq")
            }
        for name in ("count", "totals", "losses"):
            getattr(self, name).copy_(tensors[name])


def _bits_of(mask: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Planted entries as integers: (all ones where an entry is free and zeros where it is planted, the values' bits
    where it is planted). ``(bits & free) | planted`` puts them back, in a fifth of torch.where's time on a CPU."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    planted = mask.to(whole).neg_()  # -1: all ones
    return ~planted, values.view(whole) & planted


def _clip_members(grads: dict[str, Tensor], largest: float) -> None:
    """Scales each member's gradient so that its norm is at most `largest`, as torch's clip_grad_norm_ does."""
    squares = [torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads.values()]
    norm = torch.linalg.vector_norm(torch.stack(squares), dim=0)
    factor = (largest / (norm + 1e-6)).clamp_max_(1.0)
    for grad in grads.values():
        grad.mul_(factor.view(-1, *[1] * (grad.ndim - 1)))
