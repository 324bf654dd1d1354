"""Forward and backward passes of several members of a discovery in bulk, each through its own masks.

One pass serves a range of members: each masked layer's effective weights [g, *W] are made first, then
``torch.func.vmap`` runs the objective over them, every layer serving the effective weight it is given. What needs no
mask (an unmasked pass, an embedding of a batch that all share) runs once. The sum of the losses is differentiated, so
members never mix. A pass of one member is the objective as it is, without vmap.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from subnet_kernels.ops.effective_weight import effective_weight

from ..masking import MaskSet
from ..nn import MaskedLayer
from .data import unique_batches, versions

Scores = dict[str, nn.Parameter]  # the weight's name -> [G, *scores' shape]

# Bytes kept for the backward pass of one member, up to which a CPU runs members together: 8 of them then take .8 of the
# time of one after the other (.23 MB each, one core), and 1.1 to 1.3 of it from .9 MB on: one member's data stay in the
# caches. docs/discovery.md.
SMALL = 2**19
SHARE_OF_MEMORY = 0.25  # of free memory, for what passes keep for backward: gradients take about as much again


class Passes:
    """Losses and gradients of members' scores.

    Attributes:
        at_once: how many members one pass serves; None until :meth:`measure`.
        stacked: what ``objective.stacked(model)`` gave, if it has that: a function (weights, batch) -> (losses [g],
            gradients) that serves all members at once by itself, preferred over vmap. weights: each masked weight's
            name -> effective weights [g, *W]; batch: every tensor [g, ...] (stride 0 where members share it);
            gradients: the name -> d loss_g / d weight_g, [g, *W].
        by_seed: whether the objective was found to draw random numbers: members of different seeds then never share a
            pass, so that each draws what it draws alone.
    """

    def __init__(self, masks: MaskSet, scores: Scores, objective: Callable[..., Tensor], at_once: int | None) -> None:
        self.masks, self.scores, self.objective = masks, scores, objective
        self.at_once, self.by_seed = at_once, False
        self.num_members = len(next(iter(scores.values())))
        offer: Callable[[nn.Module], Any] | None = getattr(objective, "stacked", None)
        self.stacked = None if offer is None else offer(masks.model)
        if self.stacked is not None and at_once is None:
            self.at_once = self.num_members

    def alone(self, member: int, batch: Any) -> Tensor:
        """The loss of one member; its gradients are in its part of the scores' ``.grad``. Without vmap."""
        parts = self._parts(member)
        with contextlib.ExitStack() as stack:
            for name, layer in self.masks.layers.items():
                stack.enter_context(layer.serve(parts[name], *_effective(layer, parts[name])))
            with _unwritten(batch) as batch:
                loss = self.objective(self.masks.model, batch)
        check_loss(loss)
        loss.backward()
        self._keep_gradients(member, parts)
        return loss.detach()

    def together(self, first: int, last: int, batches: list[Any], randomness: str) -> Tensor:
        """The losses [g] of members first ... last - 1, as :meth:`alone`; ``batches`` are theirs, the same object for
        those that share one. Raises what vmap raises."""
        layers = self.masks.layers
        parts = self._parts(slice(first, last))
        made = {name: _effective(layer, parts[name]) for name, layer in layers.items()}
        weights = {name: w_eff for name, (w_eff, _) in made.items()}
        if self.stacked is not None:
            with _unwritten(_leading(batches)) as batch:
                losses, grads = self.stacked({n: w.detach() for n, w in weights.items()}, batch)
            torch.autograd.backward([weights[name] for name in grads], list(grads.values()))
        else:
            losses = self._vmapped(parts, made, batches, randomness)
            _check_has_gradient(losses)
            losses.sum().backward()
        self._keep_gradients(slice(first, last), parts)
        return losses.detach()

    def _vmapped(
        self, parts: dict[str, Tensor], made: dict[str, tuple[Tensor, Tensor]], batches: list[Any], randomness: str
    ) -> Tensor:
        leaves, spec, dims = _stacked_batch(batches)

        def loss_of(scores: dict[str, Tensor], made: dict[str, tuple[Tensor, Tensor]], *leaves: Any) -> Tensor:
            with contextlib.ExitStack() as stack:
                for name, layer in self.masks.layers.items():
                    stack.enter_context(layer.serve(scores[name], *made[name]))
                loss = self.objective(self.masks.model, tree_unflatten(leaves, spec))
            _check_is_scalar(loss)  # of one member: vmap hides the others
            return loss

        run = torch.func.vmap(loss_of, in_dims=(0, 0, *dims), randomness=randomness)
        with _attention_for_vmap(self.masks), _AutocastForVmap(), _unwritten(leaves) as leaves:
            return run(parts, made, *leaves)

    def _parts(self, which: int | slice) -> dict[str, Tensor]:
        """These members' scores as leaves of their own, so that a pass makes gradients of no others."""
        return {name: scores.detach()[which].requires_grad_() for name, scores in self.scores.items()}

    def _keep_gradients(self, which: int | slice, parts: dict[str, Tensor]) -> None:
        for name, scores in self.scores.items():
            grad = parts[name].grad
            if grad is None:
                continue  # this pass did not run the layer
            if grad.shape == scores.shape and grad.stride() == scores.stride():
                scores.grad = grad
                continue
            if scores.grad is None:
                scores.grad = torch.zeros_like(scores)
            scores.grad[which] = grad

    def measure(self, batch: Any) -> None:
        """Choose ``at_once`` by a pass of one member, of which nothing stays."""
        if self.num_members == 1:
            self.at_once = 1
        if self.at_once is not None:
            return
        with _count_saved(self.masks.model) as saved:
            self.alone(0, batch)
        self.forget()
        bytes_each = max(sum(saved.values()), 1)
        device = next(iter(self.masks.layers.values())).scores.device
        fits = SHARE_OF_MEMORY * _free_memory(device) / bytes_each
        if device.type == "cpu" and bytes_each > SMALL:
            fits = 1
        self.at_once = int(min(max(fits, 1), self.num_members))

    def forget(self) -> None:
        """Drop all gradients."""
        for scores in self.scores.values():
            scores.grad = None


def fill_missing_gradients(scores: Iterable[Tensor]) -> None:
    """Zeros where a step gave no gradient, so that the optimizer steps all scores in every step: else whether a layer's
    moments and decay go on where no batch runs it would hang on lam, and on the other members."""
    for its in scores:
        if its.grad is None:
            its.grad = torch.zeros_like(its)


class ObjectiveError(Exception):
    """The objective has to be mended: to run it in another way would not help."""


class ObjectiveTypeError(ObjectiveError, TypeError):
    pass


class ObjectiveValueError(ObjectiveError, ValueError):
    pass


def check_loss(loss: Any) -> None:
    """Raise in words unless this is a 0-d tensor with a gradient."""
    _check_is_scalar(loss)
    _check_has_gradient(loss)


def _check_is_scalar(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ObjectiveTypeError(
            f"discover: objective must return a 0-d tensor, got {got}; reduce it, e.g. with .mean()"
        )


def _check_has_gradient(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise ObjectiveValueError(
            "discover: the objective's loss does not depend on the scores; compute it with the model it is given, "
            "without no_grad, detach or argmax"
        )


@contextlib.contextmanager
def _unwritten(batch: Any) -> Iterator[Any]:
    """The batch in containers of its own, which an objective may take apart; its tensors must stay as they are: the
    other members are served the same ones."""
    before = versions(batch)
    try:
        yield tree_map(lambda leaf: leaf, batch)
    finally:
        if before != versions(batch):
            raise ObjectiveValueError(
                "discover: the objective writes into its batch, which members of a discovery in bulk share; let it "
                "work on a copy (x = x.clone(), or x + noise in place of x += noise)"
            )


def _effective(layer: MaskedLayer, scores: Tensor) -> tuple[Tensor, Tensor]:
    """(effective weights [g, *W], penalties [g]) of scores [g, *S] over the layer's weight; ([*W], 0-d) of [*S]."""
    return effective_weight(layer.weight, scores, layer.beta, kind=layer.kind)


def _stacked_batch(batches: list[Any]) -> tuple[list[Any], Any, list[int | None]]:
    """(leaves, their structure, the dimension along which each has one entry per member: None for what all share)."""
    unique, numbers = unique_batches(batches)
    leaves, spec = tree_flatten(unique[0])
    if len(unique) == 1:
        return leaves, spec, [None] * len(leaves)
    columns = zip(*(tree_flatten(batch)[0] for batch in unique), strict=True)
    stacked: list[Any] = []
    for column in columns:
        if not isinstance(column[0], Tensor) or all(leaf is column[0] for leaf in column):
            stacked.append((column[0], None))
            continue
        rows = torch.stack(column)
        is_each_once = numbers == list(range(len(unique)))
        stacked.append((rows if is_each_once else rows[torch.tensor(numbers, device=rows.device)], 0))
    return [leaf for leaf, _ in stacked], spec, [dim for _, dim in stacked]


def _leading(batches: list[Any]) -> Any:
    """The members' batches as one, every tensor [g, ...]; a view (stride 0) of what all share."""
    leaves, spec, dims = _stacked_batch(batches)
    lead = len(batches)
    both = zip(leaves, dims, strict=True)
    return tree_unflatten(
        [x.expand(lead, *x.shape) if dim is None and isinstance(x, Tensor) else x for x, dim in both], spec
    )


@contextlib.contextmanager
def _attention_for_vmap(masks: MaskSet) -> Iterator[None]:
    """torch's attention kernel for CPUs has no batching rule (2.13), its plain expression has."""
    is_cpu = not masks.is_on_gpu
    with sdpa_kernel(SDPBackend.MATH) if is_cpu else contextlib.nullcontext():
        yield


_LOSSES = (
    F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits, F.mse_loss, F.l1_loss, F.smooth_l1_loss,
    F.huber_loss,
)  # fmt: skip
_ON_CUDA = (F.softmax, F.log_softmax, F.layer_norm, torch.softmax, torch.log_softmax)


class _AutocastForVmap(TorchFunctionMode):
    """Under autocast these take fp32, but vmap takes some of them apart before autocast sees them (2.13)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_cuda = torch.is_autocast_enabled("cuda") and func in _ON_CUDA
        if on_cuda or (func in _LOSSES and torch._C._is_any_autocast_enabled()):
            args, kwargs = tree_map(_in_fp32, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _in_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


@contextlib.contextmanager
def _count_saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes that autograd keeps for the backward passes of what runs inside, by storage, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield saved


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on this system
        return 2**33
