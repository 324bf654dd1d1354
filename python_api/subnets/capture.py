"""CapturedStep: a whole step of mask training as one CUDA graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subnet_kernels.capturing import capture_scope

from .masking import MaskSet
from .nn.base import Schedule

Result = Tensor | tuple[Tensor, ...] | None


class CapturedStep:
    """``step()`` captured as a CUDA graph, which each call replays: forward, backward, optimizer and schedule in one
    launch from the host.

    Static inputs are tensors that ``step`` reads and the caller writes in place before a call::

        lam = torch.tensor(1e-8, device="cuda")
        opt = masks.adamw(lr=1e-3, lam=lam, capturable=True); masks.anneal(to=200, steps=total, on_device=True)
        def step():
            loss = task_loss(model, x)
            loss.backward(); opt.step(); opt.zero_grad()
            return loss
        run = CapturedStep(masks, step, opt)
        for batch in loader:
            x.copy_(batch); loss = run()

    Making one trains nothing: trained parameters, the model's buffers, the optimizer's state, beta, the schedule's
    count and torch's random numbers are put back after the warm-up, so that the first call is the first step. Other
    tensors that ``step`` changes are the caller's to put back. All gradients are dropped (set to None); a step that
    does not end with ``zero_grad()`` overwrites them in every replay.

    What is no tensor is part of the graph and stays: a float ``lam`` or learning rate, batch shapes, Python branches.
    beta, scores and static inputs may be changed in place between calls; the graph reads and writes the memory that it
    was captured with. Eager passes between calls see the new scores; from now on they make their effective weights at
    each use.

    Args:
        masks: of the model that ``step`` trains, its layers all on one CUDA device.
        step: function of no arguments: forward on static inputs, backward, ``optimizer.step()``. It must not wait for
            the device (``.item()``, GradScaler). Runs ``num_warmups`` + 1 times.
        optimizer: a torch Adam or AdamW, such as ``masks.adamw``'s, with ``capturable=True``.
        num_warmups: steps before the capture, at least 1, in which kernels are compiled and optimizer state is made;
            the last one, if there are three or more, may not wait for the device any more.

    Calling it returns what ``step`` returned, a tensor, a tuple of tensors or None, detached, in memory that the next
    call overwrites: clone what is to be kept.

    Raises:
        ValueError: masks are not on one CUDA device, hard or disabled; the optimizer is not capturable; a schedule that
            is not on the device; an open collect_penalty; num_warmups < 1.
        TypeError: an argument, or what step returns, is of another form.
        RuntimeError: step can't be captured; or a call finds masks that are hard, disabled, moved or removed, another
            schedule, or a state that was loaded into the optimizer since.
    """

    def __init__(
        self, masks: MaskSet, step: Callable[[], Result], optimizer: torch.optim.Optimizer, *, num_warmups: int = 3
    ) -> None:
        _check_arguments(masks, step, optimizer, num_warmups)
        device = _cuda_device_of(masks)
        self._masks, self._optimizer, self._step = masks, optimizer, step  # with step its static inputs
        self._written = [masks._state.beta, *_trained(masks, optimizer)]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), capture_scope() as kept:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), torch.random.fork_rng([device.index]), put_back(masks, optimizer):
                for _ in range(num_warmups - 1):
                    masks.invalidate()  # the capture will trust nothing: let each run load what that takes
                    _check_result(step())
                masks.invalidate()
                # a capture that fails half-way leaves torch in disorder; the first two runs may make tables and memory
                with _in_words(), _waits_refused() if num_warmups > 2 else contextlib.nullcontext():
                    _check_result(step())
            torch.cuda.current_stream().wait_stream(stream)
            try:
                with _in_words(), torch.cuda.stream(stream), torch.cuda.graph(self._graph, stream=stream):
                    self._result = _detached(step())
            finally:
                _drop_gradients(self._written)
        self._remember(kept)

    def _remember(self, kept: list[Tensor]) -> None:
        """What a call compares, and the memory that the graph uses, which must live as long as it does."""
        schedule = self._masks._state.schedule
        self._schedule = None if schedule is None else replace(schedule)
        self._optimizer_state = self._optimizer.state
        self._addresses = [tensor.data_ptr() for tensor in self._written]
        everything = [*self._written, *self._masks.model.parameters(), *self._masks.model.buffers()]
        self._alive = [tensor.detach() for tensor in (*everything, *_state_tensors(self._optimizer), *kept)]

    def __call__(self) -> Result:
        """One step: replays the graph and returns step's result, in memory that the next call overwrites."""
        self._check_unchanged()
        self._graph.replay()
        torch.autograd.graph.increment_version(self._written)  # a backward pass pending since before would be wrong
        return self._result

    def _check_unchanged(self) -> None:
        state, what = self._masks._state, None
        if state.is_hard or state.is_disabled:
            what = "masks are hard or disabled now, the graph has soft ones; soften() first"
        elif not _is_same_schedule(state.schedule, self._schedule):
            what = "schedule is another than at the capture; make a new CapturedStep after anneal()"
        elif self._optimizer.state is not self._optimizer_state:
            what = "optimizer's state was loaded since the capture; load it first, then make the CapturedStep"
        elif not self._masks.layers or [tensor.data_ptr() for tensor in self._written] != self._addresses:
            what = "masks were moved or removed since the capture; make a new CapturedStep"
        if what is not None:
            raise RuntimeError(f"CapturedStep: the {what}")


@contextlib.contextmanager
def put_back(masks: MaskSet, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """After the block, in place and as before it: trained parameters, the model's buffers, beta, the schedule's count,
    the optimizer's state and the tensors among its settings. State made inside is zero, Adam's first. No gradients."""
    state, trained = masks._state, _trained(masks, optimizer)
    tensors = [state.beta, *trained, *masks.model.buffers()]
    if state.schedule is not None and isinstance(state.schedule.count, Tensor):
        tensors.append(state.schedule.count)
    for group in optimizer.param_groups:
        tensors += [value for value in group.values() if isinstance(value, Tensor)]
    tensors += _state_tensors(optimizer)
    before = [tensor.detach().clone() for tensor in tensors]
    _drop_gradients(trained)
    try:
        yield
    finally:
        with torch.no_grad():
            known = {id(tensor) for tensor in tensors}
            for tensor in _state_tensors(optimizer):
                if id(tensor) not in known:
                    tensor.zero_()
            for tensor, value in zip(tensors, before, strict=True):
                if not torch.equal(tensor, value):  # a buffer may be an expanded view, which can't be written
                    tensor.copy_(value)
        _drop_gradients(trained)
        masks.invalidate()


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "CapturedStep: step can't be captured in a CUDA graph; it must not wait for the device (.item(), "
            f"float(loss), GradScaler), copy from host memory or draw from a generator of its own: {error}"
        ) from error


@contextlib.contextmanager
def _waits_refused() -> Iterator[None]:
    """Inside, what waits for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _trained(masks: MaskSet, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The optimizer's parameters, and those of the model that get gradients."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parameters += [p for p in masks.model.parameters() if p.requires_grad]
    return list({id(p): p for p in parameters}.values())


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _drop_gradients(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.grad = None


def _is_same_schedule(now: Schedule | None, then: Schedule | None) -> bool:
    """Whether a graph that was captured with ``then`` does what ``now`` says: it counts in the same memory."""
    if now is None or then is None:
        return now is then
    if now.count is not then.count:
        return False
    return (now.start, now.to, now.steps, now.every) == (then.start, then.to, then.steps, then.every)


def _check_arguments(
    masks: MaskSet, step: Callable[[], Result], optimizer: torch.optim.Optimizer, num_warmups: int
) -> None:
    if not isinstance(masks, MaskSet):
        raise TypeError(f"CapturedStep: masks must be a MaskSet, got {type(masks).__name__}")
    if not callable(step):
        raise TypeError(f"CapturedStep: step must be a function of no arguments, got {step!r}")
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise TypeError(
            f"CapturedStep: optimizer must be an Adam or AdamW (masks.adamw(capturable=True)), whose state begins at "
            f"zero, got {type(optimizer).__name__}"
        )
    if not isinstance(num_warmups, int) or num_warmups < 1:
        raise ValueError(f"CapturedStep: num_warmups must be an int >= 1, got {num_warmups!r}")
    if not all(group["capturable"] for group in optimizer.param_groups):
        raise ValueError("CapturedStep: the optimizer is not capturable; make it with adamw(..., capturable=True)")
    state = masks._state
    if state.schedule is not None and not state.schedule.is_on_device:
        raise ValueError(
            "CapturedStep: the schedule counts on the host, so that a replay would not advance it; call "
            "anneal(..., on_device=True)"
        )
    if state.penalties is not None:
        raise ValueError("CapturedStep: made inside an open collect_penalty(); open and use it inside step")
    if state.is_hard or state.is_disabled:
        raise ValueError("CapturedStep: the masks are hard or disabled, so no score would be trained; soften() first")
    if torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled():
        raise ValueError("CapturedStep: made inside autocast, whose cache a graph would miss; use autocast inside step")


def _cuda_device_of(masks: MaskSet) -> torch.device:
    devices = {scores.device for scores in masks.scores().values()} | {masks._state.beta.device}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        names = ", ".join(sorted(str(device) for device in devices))
        raise ValueError(f"CapturedStep: a CUDA graph needs all masks on one CUDA device, they are on {names}")
    return devices.pop()


def _check_result(result: Any) -> None:
    items = result if isinstance(result, tuple) else (result,)
    if result is not None and not all(isinstance(item, Tensor) for item in items):
        raise TypeError(f"CapturedStep: step must return a tensor, a tuple of tensors or None, got {result!r}")


def _detached(result: Result) -> Result:
    if isinstance(result, tuple):
        return tuple(item.detach() for item in result)
    return None if result is None else result.detach()
