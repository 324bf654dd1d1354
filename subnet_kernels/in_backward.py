"""Scores stepped in the backward pass: how a layer finds their optimizer, and what stands for their gradient."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .shards import is_sharded


class Stepper(Protocol):
    """What MaskAdamW(in_backward=True) is to a layer."""

    def check_use(self, use: Use) -> None: ...
    def step_use(self, use: Use, linear: tuple[Tensor, Tensor, Tensor | None] | None, grads: Any) -> bool: ...


_steppers = WeakTensorKeyDictionary()  # scores -> weak reference to their Stepper
_uses: dict[int, weakref.WeakSet[Use]] = {}  # by id of the scores: forward passes whose backward pass is to come


class Use:
    """One forward pass of a layer whose scores are stepped in the backward pass."""

    def __init__(self, scores: Tensor, stepper: Stepper, is_transposed: bool) -> None:
        self.scores, self.is_transposed = scores, is_transposed  # whether the op gets scores.t()
        self._stepper, self._is_over = stepper, False

    def begin(self) -> bool:
        """Refuse what the step would get wrong, before anything is done. False: this pass does not want the scores'
        gradient (torch.autograd.grad of something else, backward(inputs=...)), and nothing is to be stepped."""
        node = torch.autograd.graph.get_gradient_edge(self.scores).node
        if not torch._C._will_engine_execute_node(node):  # pyright: ignore
            return False
        others = _uses.get(id(self.scores), ())
        if self._is_over:
            raise RuntimeError("MaskAdamW: in_backward=True: this backward pass has already stepped the scores")
        if any(other is not self and other.scores is self.scores for other in others):
            raise RuntimeError(
                "MaskAdamW: in_backward=True: another forward pass of the same masked layer is waiting for its "
                "backward pass (a layer used twice, or a loss or an exception of an earlier pass that is "
                "still alive); use in_backward=False, and torch.no_grad() where nothing is trained"
            )
        self._stepper.check_use(self)
        return True

    def end(self) -> None:
        self._is_over = True
        if (uses := _uses.get(id(self.scores))) is not None:
            uses.discard(self)
            if not uses:
                del _uses[id(self.scores)]

    def step_linear(self, grad_out: Tensor, x: Tensor, grad_penalty: Tensor | None) -> bool:
        """Step with what reaches a linear layer's output [M, N] and its penalty; False if there is no kernel for it."""
        return self._stepper.step_use(self, (grad_out, x, grad_penalty), None)

    def step_w_eff(self, grad_w_eff: Tensor, grad_penalty: Tensor | None) -> bool:
        """Step with the gradients of the effective weight and the penalty; likewise."""
        return self._stepper.step_use(self, None, (grad_w_eff, grad_penalty))

    def step_scores(self, grad_scores: Tensor) -> None:
        """Step with the scores' gradient, in the parameter's own dimensions."""
        self._stepper.step_use(self, None, grad_scores)


def step_in_backward(scores: Tensor, stepper: Stepper) -> None:
    """From now on the backward passes of layers with these scores step them."""
    check_one_process()
    if is_sharded(scores):
        raise RuntimeError(
            "MaskAdamW: in_backward=True can't work with sharded scores (FSDP): their gradients are summed up and "
            "split after the backward pass; use in_backward=False"
        )
    _steppers[scores] = weakref.ref(stepper)


def use_of(scores: Tensor) -> Use | None:
    """What a forward pass that needs the scores' gradient keeps for its backward pass; None where an optimizer steps
    them in the ordinary way. A transposed view stands for its scores."""
    if not len(_steppers):
        return None
    leaf = scores if scores.is_leaf else scores._base
    stepper = None if leaf is None else _steppers.get(leaf)
    stepper = None if stepper is None else stepper()
    if leaf is None or stepper is None:
        return None
    is_transposed = scores is not leaf
    if is_transposed and (
        scores.dim() != 2 or scores.data_ptr() != leaf.data_ptr()
        or (scores.shape, scores.stride()) != (leaf.t().shape, leaf.t().stride())
    ):  # fmt: skip
        return None  # another view: its gradient reaches scores.grad, and step() uses it
    use = Use(leaf, stepper, is_transposed)
    if torch._C._current_graph_task_id() == -1:  # not what checkpointing runs again inside a backward pass
        _uses.setdefault(id(leaf), weakref.WeakSet()).add(use)
    return use


def num_processes() -> int:
    """How many processes torch.distributed has here; 1 where it is not in use."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def check_one_process() -> None:
    """Refuse several processes: they would have to add their gradients up first."""
    if num_processes() > 1:
        raise RuntimeError(
            "MaskAdamW: in_backward=True can't work in several processes (DDP, FSDP): gradients are to be added up "
            "over them before the step; use in_backward=False"
        )


_HARMLESS = {
    "__get__", "zero_", "_foreach_zero_", "requires_grad_", "detach_", "size", "stride", "dim", "numel",
    "is_contiguous", "__repr__",
}  # fmt: skip  # what zero_grad() does, and questions about the shape


class SpentGradient(Tensor):
    """``.grad`` of scores that were stepped in the backward pass: of their shape, without memory. Arithmetic with it
    (clipping, a GradScaler, logging of norms) raises and says why."""

    @staticmethod
    def like(scores: Tensor) -> SpentGradient:
        return Tensor._make_wrapper_subclass(  # pyright: ignore
            SpentGradient, scores.size(), strides=scores.stride(), dtype=scores.dtype, device=scores.device
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"SpentGradient({list(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _HARMLESS:
            if func.__name__ == "_foreach_zero_":
                others = [tensor for tensor in args[0] if not isinstance(tensor, SpentGradient)]
                return func(others) if others else None
            if func.__name__ == "zero_":
                return args[0]
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise RuntimeError(
            f"MaskAdamW: in_backward=True: these scores were stepped in the backward pass and have no gradient for "
            f"{getattr(func, '__name__', func)}; clipping, accumulation, GradScaler and reading gradients need "
            "in_backward=False"
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.__torch_function__(func, types, args, kwargs)
