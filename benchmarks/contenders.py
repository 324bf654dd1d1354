"""What is compared: a masked (or plain) layer each, all on the same values: forward, backward, optimizer step.

Each contender owns what it trains, so that an optimizer step of one leaves the others alone; what nobody writes (x,
frozen weights) they share. x requires grad in all (as for a layer inside a network), the bias is frozen in all, and
every masked one's backward pass includes the penalty's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import subnet_kernels
from subnet_kernels import BackendRefused
from subnet_kernels.dispatch import choose_for
from subnet_kernels.testing import Case

LR = 1e-4


class Skipped(RuntimeError):
    """A contender that can't run here; the message says why."""


def fused_adamw(trained: list[Tensor]) -> torch.optim.Optimizer:
    """torch's fused AdamW, on a GPU such that a CUDA graph can hold its step."""
    optimizer: Any = torch.optim.AdamW(trained, lr=LR, fused=True, capturable=trained[0].is_cuda)
    optimizer.writes_effective_weights = True  # else a baseline's step would make ours stale: slots.py
    return optimizer


def masks_adamw(masks: Any, lam: float, **how: Any) -> torch.optim.Optimizer:
    """Ours, likewise where ``masks.adamw`` can be."""
    return masks.adamw(lr=LR, lam=lam, capturable=masks.is_on_gpu, **how)


def check_capturable(optimizer: torch.optim.Optimizer | None) -> None:
    """Raises Skipped where a CUDA graph can't hold the optimizer's step."""
    if optimizer is not None and not all(group.get("capturable") for group in optimizer.param_groups):
        raise Skipped(f"{type(optimizer).__name__} is not capturable")


class Contender:
    """A layer on its own copy of the inputs.

    Attributes:
        x, trained: the leaves: the input and the scores (for plain layers the weight).
        frozen: tensors that exist whatever is kept for the backward pass (weight, bias, beta).
        remakes_mask: whether every call makes its mask anew, so that a replay sees scores changed from outside.
    """

    name = ""
    is_masked = True
    remakes_mask = True
    phases = ("forward", "forward_backward", "step")  # in which it differs from all others

    def __init__(self, case: Case) -> None:
        assert case.grad_out is not None
        self.case, self.grad_out = case, case.grad_out
        self.x = case.x.detach().requires_grad_()
        self.weight, self.bias = case.weight, case.bias
        self.beta = torch.tensor(case.beta, device=case.x.device)
        self.lam = torch.tensor(case.grad_penalty, device=case.x.device)
        self.trained = self.make()
        self.optimizer: torch.optim.Optimizer | None = None

    def make(self) -> Tensor:
        """Build the layer; return the leaf that it trains."""
        return self.case.scores.detach().clone().requires_grad_()

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """(out, penalty), with a graph."""
        raise NotImplementedError

    def forward_backward(self) -> None:
        """Forward, penalty, backward: leaves the gradients in x.grad and trained.grad."""
        self.x.grad = self.trained.grad = None
        out, penalty = self.forward()
        if penalty is None:
            out.backward(self.grad_out)
        else:
            torch.autograd.backward((out, penalty), (self.grad_out, self.lam))

    def step(self) -> None:
        """The same and an optimizer step (torch's fused AdamW)."""
        self.forward_backward()
        if self.optimizer is None:
            self.optimizer = fused_adamw([self.trained])
        self.optimizer.step()

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.case.conv is None:
            return F.linear(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, **self.case.conv)

    def leaves(self) -> list[Tensor]:
        return [self.x, self.trained]

    def note(self) -> str:
        """What a row should say of this contender."""
        return ""

    def own_tensors(self) -> list[Tensor]:
        """Tensors that exist whether or not a backward pass is pending."""
        return [t for t in (self.x, self.weight, self.trained, self.bias, self.beta) if t is not None]

    def resident(self) -> list[Tensor]:
        """Those, and what lives from step to step."""
        state = self.optimizer.state.get(self.trained, {}) if self.optimizer is not None else {}
        return [*self.own_tensors(), *(value for value in state.values() if isinstance(value, Tensor))]


class Eager(Contender):
    """``m = torch.sigmoid(beta*s); F.linear(x, w*m, b); m.sum()``"""

    name = "eager"

    def forward(self) -> tuple[Tensor, Tensor]:
        m = torch.sigmoid(self.beta * self.trained)
        return self.product(self.x, (self.weight * m).to(self.x.dtype)), m.sum()


class Compiled(Contender):
    """torch.compile(fullgraph=True) of the same, its backward pass compiled with it."""

    name = "compile"
    mode: str | None = None

    def make(self) -> Tensor:
        torch._dynamo.reset()  # one recompile limit per case
        conv = self.case.conv

        def expression(x: Tensor, w: Tensor, s: Tensor, beta: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
            m = torch.sigmoid(beta * s)
            w_eff = (w * m).to(x.dtype)
            return F.linear(x, w_eff, b) if conv is None else F.conv2d(x, w_eff, b, **conv), m.sum()

        self.compiled = torch.compile(expression, fullgraph=True, dynamic=False, mode=self.mode)
        return super().make()

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.compiled(self.x, self.weight, self.trained, self.beta, self.bias)


class CompiledMax(Compiled):
    """The same with mode="max-autotune-no-cudagraphs": "max-autotune" would make CUDA graphs of its own, which can be
    neither captured by ours nor compared with launched contenders. It compiles for long: only when asked for."""

    name = "compile_max"
    mode = "max-autotune-no-cudagraphs"


class Plain(Contender):
    """nn.Linear or nn.Conv2d that trains its weight: no mask at all."""

    name = "linear"
    is_masked = False

    def make(self) -> Tensor:
        self.weight = self.weight.clone()
        self.layer = plain_layer(self.case, self.weight, self.bias, self.weight.dtype)
        self.layer.weight.requires_grad_()
        return self.layer.weight

    def forward(self) -> tuple[Tensor, None]:
        return self.layer(self.x), None


class PlainAmp(Plain):
    """nn.Linear or nn.Conv2d with fp32 weights, trained under bf16 autocast: how a bf16 case is trained in practice."""

    name = "linear_amp"

    def make(self) -> Tensor:
        if self.case.x.dtype == torch.float32:
            raise Skipped("autocast is for 16-bit cases")
        self.weight = self.weight.float()
        self.bias = None if self.bias is None else self.bias.float()
        return super().make()

    def forward(self) -> tuple[Tensor, None]:
        with torch.autocast(self.x.device.type, self.case.x.dtype):
            return self.layer(self.x), None


class NeuroSurgeon(Contender):
    """NeuroSurgeon 0.1.0's ContSparse layer; bf16 through autocast on an fp32 weight, its way."""

    name = "neurosurgeon"

    def make(self) -> Tensor:
        self.weight = self.weight.float()
        plain = plain_layer(self.case, self.weight, self.bias, torch.float32)
        self.layer = neurosurgeon_layer(plain, self.case.scores, self.case.beta)
        self.is_autocast = self.case.x.dtype != torch.float32
        return self.layer.weight_mask_params

    def forward(self) -> tuple[Tensor, Tensor]:
        dtype = self.case.x.dtype if self.is_autocast else torch.bfloat16
        with torch.autocast(self.x.device.type, dtype, enabled=self.is_autocast):
            return self.layer(self.x), self.layer.calculate_l0()

    def own_tensors(self) -> list[Tensor]:
        return [*super().own_tensors(), *self.layer.parameters()]


class Ours(Contender):
    """Our masked layer. Its effective weight is stale at every call, as after an optimizer step: masking is paid."""

    name = "ours"
    how: dict[str, Any] = {}  # noqa: RUF012  # of masks.adamw

    def make(self) -> Tensor:
        from subnets import masks_of
        from subnets.nn import MaskedConv2d, MaskedLinear

        plain = plain_layer(self.case, self.weight, self.bias, self.weight.dtype)
        if self.case.conv is None:
            self.layer: Any = MaskedLinear.from_linear(plain, score_init=self.case.scores)
        else:
            self.layer = MaskedConv2d.from_conv2d(plain, score_init=self.case.scores)
        self.masks = masks_of(self.layer)
        self.masks.beta = self.case.beta
        self.beta = self.layer.beta
        return self.layer.scores

    def forward(self) -> tuple[Tensor, Tensor]:
        self.masks.invalidate()
        with self.masks.collect_penalty() as penalty:
            out = self.layer(self.x)
        return out, penalty()

    def step(self) -> None:
        """The penalty comes from the optimizer (``lam=``), as in our training loops."""
        if self.optimizer is None:
            self.optimizer = masks_adamw(self.masks, self.case.grad_penalty, **self.how)
        self.x.grad = self.trained.grad = None
        self.layer(self.x).backward(self.grad_out)
        self.optimizer.step()

    def resident(self) -> list[Tensor]:
        slot = self.layer._slot
        return [*super().resident(), *(t for t in (slot.w_eff, slot.penalty) if t is not None)]

    def note(self) -> str:
        return _backend_note(self.case, self.layer.plan)


class OursInBackward(Ours):
    """The same, its scores stepped in the backward pass."""

    name = "ours_in_backward"
    phases = ("step",)
    how: dict[str, Any] = {"in_backward": True}  # noqa: RUF012

    def leaves(self) -> list[Tensor]:
        return [self.x]  # the scores get no gradient


class OursShortMoments(Ours):
    """The first, with bf16 moments."""

    name = "ours_bf16_moments"
    phases = ("step",)
    how = {"moment_dtype": torch.bfloat16}  # noqa: RUF012


class OursLean(OursInBackward):
    """Both: the least memory."""

    name = "ours_lean"
    how = {"in_backward": True, "moment_dtype": torch.bfloat16}  # noqa: RUF012


class OursOp(Contender):
    """Our op without a layer: ``out, penalty = masked_linear(x, w, s, beta, b)``, masking at every call."""

    name = "ours_op"
    plan: str | None = None

    def forward(self) -> tuple[Tensor, Tensor]:
        inputs = (self.x, self.weight, self.trained, self.beta, self.bias)
        if self.case.conv is None:
            return subnet_kernels.masked_linear(*inputs, plan=self.plan)
        return subnet_kernels.masked_conv2d(*inputs, **self.case.conv, plan=self.plan)

    def note(self) -> str:
        return _backend_note(self.case, self.plan)


class OursFused(OursOp):
    """The op with ``plan="fused"``, where a GPU backend has it."""

    name = "ours_fused"
    plan = "fused"

    def make(self) -> Tensor:
        case = self.case
        try:
            choose_for(case.op, case.weight, case.scores, case.kind, case.x.dtype, self.plan, "triton")
        except BackendRefused as refusal:
            raise Skipped(str(refusal)) from refusal
        return super().make()


class OursCached(OursFused):
    """The op with ``plan="cached"``, where a GPU backend has it."""

    name = "ours_cached"
    plan = "cached"


def _backend_note(case: Case, plan: str | None) -> str:
    return f"backend {choose_for(case.op, case.weight, case.scores, case.kind, case.x.dtype, plan).name}"


class OursWithoutPenalty(Ours):
    """The layer called alone, its effective weight made anew at every call: what a call costs over nn.Linear's."""

    name = "ours_cleared"

    def forward(self) -> tuple[Tensor, None]:  # type: ignore[override]
        self.masks.invalidate()
        return self.layer(self.x), None


class OursFresh(OursWithoutPenalty):
    """The layer called alone, its effective weight fresh, as in the second micro-batch between two optimizer steps."""

    name = "ours_fresh"
    remakes_mask = False

    def forward(self) -> tuple[Tensor, None]:  # type: ignore[override]
        return self.layer(self.x), None


BASELINES: dict[str, type[Contender]] = {
    c.name: c for c in (Eager, Compiled, CompiledMax, Plain, PlainAmp, NeuroSurgeon)
}
OURS = (
    Ours, OursInBackward, OursShortMoments, OursLean, OursOp, OursFused, OursCached, OursWithoutPenalty, OursFresh,
)  # fmt: skip
ALL: dict[str, type[Contender]] = {**BASELINES, **{c.name: c for c in OURS}}


def plain_layer(case: Case, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Any:
    """nn.Linear or nn.Conv2d around these tensors, frozen."""
    kwargs: dict[str, Any] = {"bias": bias is not None, "device": "meta"}
    if case.conv is None:
        layer: Any = nn.Linear(weight.shape[1], weight.shape[0], **kwargs)
    else:
        groups = case.conv.get("groups", 1)
        size: Any = tuple(weight.shape[2:])
        layer = nn.Conv2d(weight.shape[1] * groups, weight.shape[0], size, **case.conv, **kwargs)
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer


def neurosurgeon_layer(plain: nn.Module, scores: Tensor, beta: float) -> Any:
    """NeuroSurgeon's twin of an nn.Linear or nn.Conv2d, over its very weight and, likewise in memory, these scores."""
    try:
        from NeuroSurgeon.Masking import ContSparseConv2d, ContSparseLinear
    except ImportError as error:
        raise Skipped(f"NeuroSurgeon is not installed ({error}); pip install NeuroSurgeon==0.1.0") from error
    twin: Any = ContSparseLinear if isinstance(plain, nn.Linear) else ContSparseConv2d
    layer: Any = twin.from_layer(plain, mask_unit="weight")
    layer.requires_grad_(False).to(scores.device)
    layer.weight.data = plain.weight
    layer.weight_mask_params.data = scores.detach().clone()  # a clone keeps the strides
    layer.weight_mask_params.requires_grad_()
    layer.temperature = beta
    layer.train(True)
    return layer


def neurosurgeon_circuit(model: nn.Module, layers: list[str], beta: float) -> Any:
    """NeuroSurgeon's CircuitModel of a transformers model: soft masks over every weight of these layers."""
    try:
        from NeuroSurgeon.Models import CircuitConfig, CircuitModel
    except ImportError as error:
        raise Skipped(f"NeuroSurgeon is not installed ({error}); pip install NeuroSurgeon==0.1.0") from error
    settings = {"ablation": "none", "mask_unit": "weight", "mask_bias": False, "mask_init_value": 0.0}
    circuit: Any = CircuitModel(CircuitConfig("continuous_sparsification", settings, layers, add_l0=False), model)
    circuit.temperature = beta
    return circuit


def make_contenders(case: Case, names: list[str], say: Callable[[str], None]) -> list[Contender]:
    """The contenders that run here; what is left out is said."""
    made = []
    for name in names:
        try:
            made.append(ALL[name](case))
        except Skipped as reason:
            say(f"left out {name}: {reason}")
    return made
