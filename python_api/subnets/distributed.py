"""Masks on several devices, through torch's own DistributedDataParallel and fully_shard (FSDP2): what is to be checked,
and the checkpoint. docs/distributed.md says how to use it.

Masking comes first, then ``DDP(model)`` or ``fully_shard(model)``, then ``masks.adamw()``. The scores are the only
parameters that train, so that theirs are the only gradients that go over the wire.
"""

from __future__ import annotations

import sys
from collections import UserDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from subnet_kernels.in_backward import num_processes
from subnet_kernels.optim import MaskAdamW, masked_of
from subnet_kernels.shards import is_sharded, shard_of, whole

from .subnet_file import weights_hash

if TYPE_CHECKING:
    from .masking import MaskSet

__all__ = ["TrainingState", "check_same"]  # the rest is for the package itself


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, whose parameters have their own names; others come back."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def check_not_wrapped(model: nn.Module) -> None:
    """Masking comes before DDP and FSDP: neither would take up scores that are made later.

    Raises:
        ValueError: naming the module.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel):
            raise ValueError(
                f"mask_model: {name or 'the model'} is wrapped in nn.DataParallel, whose copies of masked layers "
                "would not share their state; use one device, or DistributedDataParallel (docs/distributed.md)"
            )
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"mask_model: {name or 'the model'} is wrapped in DistributedDataParallel, which would never add up "
                "the gradients of scores made now; mask first, then wrap"
            )
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(f"mask_model: {name} is sharded already; mask first, then call fully_shard")


def check_one_process(what: str, instead: str) -> None:
    """Raises RuntimeError if torch.distributed has several processes here."""
    if (count := num_processes()) > 1:
        raise RuntimeError(f"{what}: works in one process, torch.distributed has {count} here; {instead}")


def take_up_shards(masks: MaskSet) -> None:
    """Tell the optimizer, and the layers, of the parameters that fully_shard has put in place of theirs."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    groups: list[Any] = [] if fsdp is None else [m for m in masks.model.modules() if isinstance(m, fsdp.FSDPModule)]
    for group in groups:
        group.reshard()  # after a forward pass without backward pass the root holds whole tensors
    for layer in masks.layers.values() if groups else ():
        layer._bind_scores()


def check_taken_up(masks: MaskSet) -> None:
    """Raises RuntimeError where a model was sharded and its optimizer, made before, holds what was there then."""
    for name, layer in masks.layers.items():
        if is_sharded(layer.scores) and masked_of(layer.scores) is None:
            raise RuntimeError(
                f"MaskSet.step: {name} was sharded by fully_shard after its masks and optimizer were made; call "
                "masks_of(model) after fully_shard, and make the optimizer then"
            )


class WholeTensors(UserDict):
    """Sharded tensors by name, each gathered when it is asked for and not kept."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return whole(super().__getitem__(name))


def check_same(masks: MaskSet) -> None:
    """Prove that every rank holds the same masks: beta, hard or soft, the schedule, and, where they are not sharded,
    scores and base weights, to the bit. Every rank must call it. In one process it does nothing.

    Args:
        masks: of the model, wrapped or not.

    Raises:
        RuntimeError: on every rank, naming what differs from rank 0.

    Example:
        >>> from torch import nn
        >>> from subnets import mask_model
        >>> check_same(mask_model(nn.Sequential(nn.Linear(4, 8)), targets="all-linear"))
    """
    if num_processes() == 1:
        return
    take_up_shards(masks)
    mine = {"beta, hard or soft, schedule": str(masks.state_dict())}
    for name, layer in masks.layers.items():
        for what, tensor in (("scores", layer.scores), ("weight", layer.weight)):
            if not is_sharded(tensor):
                mine[f"{what} of {name}"] = weights_hash({name: tensor})
    everyone: list[Any] = [None] * num_processes()
    torch.distributed.all_gather_object(everyone, mine)
    found = [
        f"{what} (rank {rank})"
        for rank, theirs in enumerate(everyone)
        for what in {**everyone[0], **theirs}
        if theirs.get(what) != everyone[0].get(what)
    ]
    if found:
        raise RuntimeError(
            f"check_same: not as on rank 0: {', '.join(found)}; mask_model and anneal must be called alike on every "
            "rank before DDP copies rank 0's tensors, and gradients must all go through it"
        )


class TrainingState:
    """What torch.distributed.checkpoint saves and loads of a training of masks: scores, the optimizer's state, beta and
    its schedule. Frozen weights are not part of it: they are the base model's.

    ``dcp.save({"masks": TrainingState(model, masks, opt)}, checkpoint_id=folder)``, and ``dcp.load`` of the same dict
    in another run, on every rank. The number of ranks, and DDP, FSDP2 or none, may differ between the two.

    Args:
        model: the masked model, as it is called in training (DDP, FSDP2 or plain).
        masks: its MaskSet.
        optimizer: of its scores; made, like any, after fully_shard.
    """

    def __init__(self, model: nn.Module, masks: MaskSet, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.masks, self.optimizer = model, masks, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Scores and moments by name, sharded where they are; called by save, and by load for where to put things."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        take_up_shards(self.masks)
        if isinstance(self.optimizer, MaskAdamW):
            self.optimizer.make_state()  # else torch would take a step to have it made, and beta one too
        return {
            "scores": {name: scores.detach() for name, scores in self.masks.scores().items()},
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "masks": self.masks.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        take_up_shards(self.masks)
        with torch.no_grad():
            for name, scores in self.masks.scores().items():
                shard_of(scores).copy_(shard_of(state["scores"][name]))
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        self.masks.load_state_dict(state["masks"])  # last, and it makes all effective weights stale
