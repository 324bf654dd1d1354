"""GPT-2s that share all but their projections: the pass of many masks over one frozen network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subnets.training.gpt2 import PROJECTIONS, GPT2Shape, LeanGPT2
from subnets.training.stacked import _EPS, StackedGPT2, _Norm, _Tape


class FrozenGPT2(StackedGPT2):
    """Losses of G networks that differ in their projections alone, and the gradients of the projections::

        run = FrozenGPT2(shape, state)
        losses, grads = run(weights, sequences)

    Everything else is frozen, lies in memory once and gets no gradient. No dropout. It equals, for each g, ``lm_loss``
    of `LeanGPT2` in eval mode with ``weights[name][g]`` in place of its projections, and autograd's gradients.

    Args:
        shape: of the networks.
        state: a state dict of `LeanGPT2`, which is not copied where it is fp32 (or fp64) already; other entries, such
            as scores, are not used.
        dtype: of the products. bf16: products in bf16, embeddings, residual sums, norms and softmax in fp32, as under
            autocast. None: the state's.
        at_once: networks whose activations are in memory at the same time. One at a time is fastest on a CPU, whose
            caches hold the activations of about one network of this size; None: one on a CPU, all elsewhere.
    """

    trains_embeddings = False

    def __init__(
        self, shape: GPT2Shape, state: Mapping[str, Tensor], *, dtype: torch.dtype | None = None,
        at_once: int | None = None,
    ) -> None:  # fmt: skip
        wide = torch.promote_types(state["wte.weight"].dtype, torch.float32)
        self.shape, self.dtype, self.projections = shape, dtype or wide, shape.masked_names()
        self.base = {name: state[name].detach() for name in self.projections}
        self.shared = {name: state[name].detach().to(wide) for name in _shared_names(shape)}
        self.low = {name: value.to(self.dtype) for name, value in self.shared.items()}
        self.at_once = at_once
        self.params: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, weights: Mapping[str, Tensor], sequences: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(losses [G], fp32 or fp64; the gradients of `weights`, new tensors of their shapes and dtypes).

        `weights[name]` [G, N, K] for some of `shape.masked_names()`, the others are the state's; `sequences` int64
        [G, B, 4], or [B, 4] for all. Raises ValueError when names or sizes differ from that.
        """
        number = self._check(weights, sequences)
        given = {name: weights.get(name, self.base[name].expand(number, -1, -1)) for name in self.projections}
        given = {name: value.to(self.dtype) for name, value in given.items()}
        made = {name: torch.empty_like(w, memory_format=torch.contiguous_format) for name, w in weights.items()}
        if sequences.dim() == 2:
            sequences = sequences.expand(number, -1, -1)
        step = self.at_once or (1 if sequences.device.type == "cpu" else number)
        losses = []
        for first in range(0, number, step):
            part = slice(first, first + step)
            self.params = {name: value[part] for name, value in given.items()}
            self.grads = {name: value[part] for name, value in made.items()}
            losses.append(self.loss_and_grads(sequences[part]))
        self.params, self.grads = {}, {}
        return torch.cat(losses), made

    def _check(self, weights: Mapping[str, Tensor], sequences: Tensor) -> int:
        unknown = sorted(set(weights) - set(self.projections))
        if unknown or not weights:
            raise ValueError(
                f"FrozenGPT2: weights must be of projections ({self.projections[0]} and {len(self.projections) - 1} "
                f"more), got {unknown or 'none'}"
            )
        numbers = {len(value) for value in weights.values()}
        if sequences.dim() == 3:
            numbers.add(len(sequences))
        if len(numbers) != 1 or sequences.dim() not in (2, 3):
            raise ValueError(
                "FrozenGPT2: weights [G, N, K] and sequences [G, B, 4] or [B, 4] must agree in G, got "
                f"{sorted(numbers)} and sequences {list(sequences.shape)}"
            )
        return numbers.pop()

    # ------------------------------------------------------------- shared parts

    def _embed(self, tokens: Tensor) -> tuple[Tensor, _Tape]:
        x = F.embedding(tokens, self.shared["wte.weight"]).add_(self.shared["wpe.weight"][: tokens.shape[-1]])
        return x.flatten(1, 2), _Tape(tokens, x.dtype)

    def _norm(self, name: str, x: Tensor) -> tuple[Tensor, _Norm]:
        weight, bias = self.shared[f"{name}.weight"], self.shared[f"{name}.bias"]
        normed, mean, rstd = torch.native_layer_norm(x, (self.shape.width,), weight, bias, _EPS)
        return normed.to(self.dtype), _Norm(x, x, mean, rstd)  # the normalised input is not needed

    def _norm_backward(self, name: str, grad: Tensor, norm: _Norm) -> Tensor:
        weight, bias = self.shared[f"{name}.weight"], self.shared[f"{name}.bias"]
        return torch.ops.aten.native_layer_norm_backward(
            grad.to(norm.x.dtype), norm.x, (self.shape.width,), norm.mean, norm.rstd, weight, bias, (True, False, False)
        )[0]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.params[f"{name}.weight"], self.low[f"{name}.bias"]
        if len(weight) == 1:
            return F.linear(x[0], weight[0], bias)[None]
        return torch.baddbmm(bias, x, weight.transpose(1, 2))

    def _linear_grads(self, name: str, grad: Tensor, x: Tensor) -> None:
        out, grad = self.grads.get(f"{name}.weight"), grad.to(self.dtype)
        if out is None:
            return
        if out.dtype == self.dtype:
            torch.bmm(grad.transpose(1, 2), x, out=out)
        else:
            out.copy_(torch.bmm(grad.transpose(1, 2), x))

    def _linear_backward(self, name: str, grad: Tensor, x: Tensor) -> Tensor:
        grad = grad.to(self.dtype)
        self._linear_grads(name, grad, x)
        return torch.bmm(grad, self.params[f"{name}.weight"])

    def _logits(self, tape: _Tape) -> Tensor:
        assert tape.normed_f is not None
        return F.linear(tape.normed_f, self.low["wte.weight"])

    def _head_backward(self, tape: _Tape, grad_logits: Tensor, shares: Tensor) -> Tensor:
        return (grad_logits.to(self.dtype) @ self.low["wte.weight"]) * shares

    def _embedding_backward(self, tape: _Tape, grad: Tensor, batch: int) -> None:
        return


def _shared_names(shape: GPT2Shape) -> list[str]:
    blocks = [f"h.{i}." for i in range(shape.layers)]
    norms = ["ln_f", *(f"{block}{name}" for block in blocks for name in ("ln_1", "ln_2"))]
    biases = [f"{block}{name}.bias" for block in blocks for name in PROJECTIONS]
    return ["wte.weight", "wpe.weight", *(f"{norm}.{part}" for norm in norms for part in ("weight", "bias")), *biases]


def _has_hooks(model: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for module in model.modules() for kind in kinds)


def stacked_lm_loss(model: nn.Module) -> Callable[[Mapping[str, Tensor], Tensor], Any] | None:
    """`lm_loss` for many masks over one model: (weights, sequences) -> (losses, gradients), as `FrozenGPT2`.

    Under autocast the products take its dtype. None where it does not serve: the model is no `LeanGPT2`, would drop out
    or has hooks, or a layer is masked that is none of its projections.
    """
    if type(model) is not LeanGPT2 or (model.training and model.shape.dropout > 0) or _has_hooks(model):
        return None
    scores = [name for name, _ in model.named_parameters() if name.endswith(".scores")]
    masked = {name.removesuffix("scores") + "weight" for name in scores}
    if not masked <= set(model.shape.masked_names()):
        return None
    state, passes = model.state_dict(), {}

    def run(weights: Mapping[str, Tensor], sequences: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        device = sequences.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if dtype not in passes:
            passes[dtype] = FrozenGPT2(model.shape, state, dtype=dtype)
        with torch.autocast(device, enabled=False):
            return passes[dtype](weights, sequences)

    return run
