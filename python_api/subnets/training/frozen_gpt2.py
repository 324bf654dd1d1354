"""GPT-2s that share all but their projections: the pass of many masks over one frozen network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from subnets.training.gpt2 import GPT2Shape
from subnets.training.stacked import _EPS, StackedGPT2, _Norm, _Tape


class FrozenGPT2(StackedGPT2):
    """Losses of G networks that differ in their projections alone, and the gradients of the projections::

        run = FrozenGPT2(shape, state)
        losses, grads = run(weights, sequences)

    Everything else is frozen, lies in memory once and gets no gradient. No dropout. It equals, for each g, ``lm_loss``
    of `LeanGPT2` in eval mode with ``weights[name][g]`` in place of its projections, and autograd's gradients.

    Args:
        shape: of the networks.
        state: a state dict of `LeanGPT2`, which is not copied where it is fp32 (or fp64) already.
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
        self.shape, self.dtype, self.projections = shape, dtype or wide, set(shape.masked_names())
        self.shared = {name: value.detach().to(wide) for name, value in state.items() if name not in self.projections}
        self.low = {name: value.to(self.dtype) for name, value in self.shared.items()}
        self.at_once = at_once
        self.grads: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, weights: Mapping[str, Tensor], sequences: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(losses [G], fp32 or fp64, gradients: name -> [G, N, K] in the products' dtype, new tensors).

        `weights[name]` [G, N, K] for each of `shape.masked_names()`; `sequences` int64 [G, B, 4], or [B, 4] for all.
        Raises ValueError when names or sizes differ from that.
        """
        number = self._check(weights, sequences)
        given = {name: weights[name].to(self.dtype) for name in self.shape.masked_names()}
        made = {name: torch.empty_like(value, memory_format=torch.contiguous_format) for name, value in given.items()}
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
        if set(weights) != self.projections:
            missing, other = self.projections - set(weights), set(weights) - self.projections
            raise ValueError(
                f"FrozenGPT2: weights must be those of {len(self.projections)} projections, got none for "
                f"{sorted(missing)} and unknown {sorted(other)}"
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

    @property
    def members(self) -> int:
        """How many networks the pass under way has."""
        return len(next(iter(self.params.values())))

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
        torch.bmm(grad.to(self.dtype).transpose(1, 2), x, out=self.grads[f"{name}.weight"])

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
