"""Networks of any architecture trained side by side: torch.func's stacked parameters and vmap, for `StackTrainer`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from subnets.training.stack_step import Rows
from subnets.training.stacked_parameters import StackedParameters

PerRow = Callable[[Callable[..., Any], Rows], Tensor]  # (network, rows [B, ...]) -> [B]


class StackedModule(StackedParameters):
    """P copies of a module with parameters of their own, `params[name]` [P, ...]; buffers are shared and stay::

        def loss(network, rows):
            images, labels = rows
            return F.cross_entropy(network(images), labels, reduction="none")
        def right(network, rows):
            images, labels = rows
            return network(images).argmax(-1) == labels
        train_stack(lambda states, device: StackedModule(net, states, loss, right, device=device), members, recipe)

    A member's loss is the mean of `loss` over its rows. The module runs in the mode (train or eval) that it is in.
    Every architecture that `torch.func.vmap` takes is served; `StackedGPT2` is the faster one for GPT-2s.

    Args:
        module: the architecture, with the shared buffers. It is not changed, nor are its parameters used.
        states: one state dict for each member; entries that are no parameters are not used.
        loss: of each row, fp32 or fp64 [B]: rows must not see one another.
        right: which rows are answered right, bool [B].
        device: where the members live; None: where the first state is.

    Raises:
        ValueError: no states, or a module that draws random numbers or keeps running statistics in the mode that it is
            in: neither would be a member's own. Call ``module.eval()``, or set the dropout to 0.
    """

    def __init__(
        self, module: nn.Module, states: Sequence[dict[str, Tensor]], loss: PerRow, right: PerRow, *,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        if not states:
            raise ValueError("StackedModule: states must hold at least one state dict, got none")
        _refuse_what_members_would_share(module)
        names = [name for name, _ in module.named_parameters()]
        self.params = {name: torch.stack([state[name].detach() for state in states]).to(device) for name in names}
        self.grads = {name: torch.zeros_like(value) for name, value in self.params.items()}
        place = next(iter(self.params.values())).device
        self.module, self.loss, self.per_row_right = copy.deepcopy(module).to("meta"), loss, right
        self.buffers = {name: value.detach().to(place) for name, value in module.named_buffers()}

    def state(self, member: int) -> dict[str, Tensor]:
        """A copy of one member's parameters and of the shared buffers on the CPU, fit for `load_state_dict`."""
        saved = set(self.module.state_dict())
        own = {name: value[member] for name, value in self.params.items()}
        shared = {name: value for name, value in self.buffers.items() if name in saved}
        return {name: value.to("cpu", copy=True) for name, value in (own | shared).items()}

    def loss_and_grads(self, rows: Rows, noise: None = None, live: Tensor | None = None) -> Tensor:
        """Losses [P] of rows [P, B, ...]; fills `grads`. `live` (bool [P, B]) says which rows count; None: all."""
        number, batch = (rows[0] if isinstance(rows, tuple) else rows).shape[:2]
        value = next(iter(self.params.values()))
        live = torch.ones(number, batch, dtype=torch.bool, device=value.device) if live is None else live
        shares = live.to(value.dtype) / live.sum(1, keepdim=True)

        def total(params: dict[str, Tensor], rows: Rows, shares: Tensor) -> Tensor:
            return (self.loss(self._network(params), rows) * shares).sum()

        with torch.enable_grad():
            grads, losses = vmap(grad_and_value(total))(self.params, rows, shares)
        for name, grad in grads.items():
            self.grads[name].copy_(grad)
        return losses

    @torch.no_grad()
    def right(self, rows: Rows) -> Tensor:
        """Which rows [P, B, ...] are answered right: bool [P, B]."""
        return vmap(lambda params, rows: self.per_row_right(self._network(params), rows))(self.params, rows)

    def _network(self, params: dict[str, Tensor]) -> Callable[..., Any]:
        return lambda *args, **kwargs: functional_call(self.module, (params, self.buffers), args, kwargs)


def _refuse_what_members_would_share(module: nn.Module) -> None:
    for name, part in module.named_modules():
        what = ""
        if isinstance(part, _DropoutNd) and part.training and part.p > 0:
            what = f"has dropout {part.p} in training mode, whose draws would not be a member's own"
        elif isinstance(part, nn.MultiheadAttention) and part.training and part.dropout > 0:
            what = f"has dropout {part.dropout} in training mode, whose draws would not be a member's own"
        elif isinstance(part, _NormBase) and part.training and part.track_running_stats:
            what = "keeps running statistics in training mode, which would not be a member's own"
        elif isinstance(part, nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None):
            what = "normalises over the batch, in which rows see one another"
        if what:
            raise ValueError(
                f"StackedModule: {name or type(module).__name__} ({type(part).__name__}) {what}; call .eval() on it "
                "or set the dropout to 0"
            )
