"""Many small GPT-2s of one shape, trained side by side: every parameter carries a leading member dimension P.

One network of this size keeps a CPU busy with call overhead rather than arithmetic. Stacked, each layer is one batched
GEMM over all members. Forward and backward are written out by hand, so that gradients land in persistent buffers and
nothing is allocated twice; a test holds losses and gradients against autograd on the plain network.

Members never mix: each row of every product belongs to one member, so a member's numbers depend on who else is in the
stack only through the rounding of the GEMM library.

Letters: P members, B sequences, T = 3 input positions, M = B * T rows, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from subnet_kernels import random_bits
from subnets.training.gpt2 import GPT2Shape
from subnets.training.stacked_parameters import StackedParameters

_EPS = 1e-5  # of every LayerNorm, as in GPT-2


class DropoutNoise:
    """Dropout factors (0 or 1/(1-p)) of one training step by `random_bits`: equal on every device, the same alone and
    in company.

    `seeds` int64 [P] is one seed per member, `step` int64 0-d the count of steps; both are read on their device. Each
    decision uses 16 random bits, so p is rounded to a multiple of 2^-16. What a sequence draws depends on its place in
    the batch, not on how many there are.
    """

    def __init__(self, seeds: Tensor, step: Tensor, p: float) -> None:
        self.seeds, self.step = seeds, step
        self.threshold = round(p * 65536) - 32768
        self.scale = 1.0 / (1.0 - p)

    def factors(self, batch: int, counts: Sequence[int]) -> list[Tensor]:
        """One fp32 [P, batch, count] tensor of factors for each count (elements of one sequence)."""
        bits = random_bits(self.seeds, self.step, (batch, sum(counts)), num_samples=len(self.seeds))
        keep = bits.view(torch.int16) >= self.threshold  # uniform, read with a sign too; uint16 has no comparison
        return [part.to(torch.float32).mul_(self.scale) for part in keep.split(list(counts), dim=2)]


@dataclass
class _Norm:
    """What LayerNorm's backward needs: its input, the normalised input, mean and 1/std."""

    x: Tensor
    normalised: Tensor
    mean: Tensor
    rstd: Tensor


@dataclass
class _BlockTape:
    """What one block keeps for backward; the dropout factors are None without dropout."""

    norm_1: _Norm
    normed_1: Tensor
    qkv: Tensor
    probabilities: Tensor
    dropped: Tensor
    mixed: Tensor
    norm_2: _Norm
    normed_2: Tensor
    hidden: Tensor
    gate: Tensor
    activated: Tensor
    drop_attention: Tensor | None = None
    drop_residual: Tensor | None = None
    drop_mlp: Tensor | None = None


@dataclass
class _Tape:
    """What the whole pass keeps for backward."""

    tokens: Tensor
    dtype: torch.dtype  # of all but what goes in and out of products
    blocks: list[_BlockTape] = field(default_factory=list)
    drop_embedding: Tensor | None = None
    norm_f: _Norm | None = None
    normed_f: Tensor | None = None


def _mix(weights: Tensor, values: Tensor, out: Tensor | None = None) -> Tensor:
    """weights [N, T, T] @ values [N, T, d] for tiny T: T elementwise passes, 4x faster than bmm at T = 3, d = 32."""
    out = torch.mul(weights[:, :, :1], values[:, :1], out=out)
    for j in range(1, values.shape[1]):
        out.addcmul_(weights[:, :, j : j + 1], values[:, j : j + 1])
    return out


def _packed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in this dtype and without gaps, in one copy at most."""
    return x.contiguous() if x.dtype == dtype else x.to(dtype, memory_format=torch.contiguous_format)


_GELU = 2.0 * math.sqrt(2.0 / math.pi)


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """The gate g = sigmoid(c (x + 0.044715 x^3)), c = 2 sqrt(2/pi), and gelu_new(x) = x g; 0.6x the time of F.gelu.

    In bf16 F.gelu, which rounds once; there is no gate then (x stands in for it).
    """
    if x.dtype == torch.bfloat16:
        return x, F.gelu(x, approximate="tanh")
    gate = torch.addcmul(x.new_full((), _GELU), x, x, value=0.044715 * _GELU).mul_(x).sigmoid_()
    return gate, x * gate


def _gelu_backward(grad: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """grad * d gelu_new/dx = grad * g (1 + x (1 - g) c (1 + 3 * 0.044715 x^2))."""
    if x.dtype == torch.bfloat16:
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    slope = torch.addcmul(x.new_full((), _GELU), x, x, value=3 * 0.044715 * _GELU).mul_(x)
    return slope.addcmul_(slope, gate, value=-1).add_(1.0).mul_(gate).mul_(grad)


class StackedGPT2(StackedParameters):
    """P networks of one shape; `params[name]` is fp32 [P, ...] (fp64 for states in fp64) under the names of `LeanGPT2`,
    `grads` likewise.

    Args:
        shape: of every network.
        states: one state dict for each.
        device: where they live; None: where the first state is.
    """

    trains_embeddings = True

    def __init__(
        self, shape: GPT2Shape, states: Sequence[dict[str, Tensor]], *, device: torch.device | str | None = None
    ) -> None:
        if not states:
            raise ValueError("StackedGPT2: states must hold at least one state dict, got none")
        self.shape = shape
        stacked = {name: torch.stack([state[name] for state in states]).to(device) for name in states[0]}
        self.params = {n: value.to(torch.promote_types(value.dtype, torch.float32)) for n, value in stacked.items()}
        self.grads = {name: torch.zeros_like(value) for name, value in self.params.items()}

    def state(self, member: int) -> dict[str, Tensor]:
        """A copy of one member's parameters on the CPU, fit for `LeanGPT2.load_state_dict`."""
        return {name: value[member].to("cpu", copy=True) for name, value in self.params.items()}

    @torch.no_grad()
    def loss_and_grads(
        self, sequences: Tensor, noise: DropoutNoise | None = None, live: Tensor | None = None
    ) -> Tensor:
        """Language-model loss [P] of sequences int64 [P, B, 4]; fills `grads` with each member's own gradient.

        `live` (bool [P, B]) says which sequences count; a member's loss is the mean over those, None: over all.
        """
        inputs, targets = sequences[..., :-1], sequences[..., 1:].flatten(1)
        tape = self._forward(inputs, noise)
        probabilities = torch.softmax(self._logits(tape), dim=-1, dtype=tape.dtype)
        right = probabilities.gather(-1, targets[..., None])
        grad_logits = probabilities.scatter_(-1, targets[..., None], right - 1.0)
        losses = -right.clamp_min(1e-45).log_()
        if live is None:
            shares = right.new_full((1, 1, 1), 1.0 / targets.shape[1])
        else:
            shares = live.to(right.dtype) / (live.sum(1, keepdim=True) * inputs.shape[2])
            shares = shares.repeat_interleave(inputs.shape[2], 1)[..., None]
        self._backward(tape, grad_logits, shares, sequences.shape[1])
        return losses.mul_(shares).sum((1, 2))

    @torch.no_grad()
    def answers(self, sequences: Tensor) -> Tensor:
        """The argmax over the vocabulary at the separator, int64 [P, B], without dropout."""
        return self._logits(self._forward(sequences[..., :-1], None, answers_only=True)).argmax(-1)

    def right(self, sequences: Tensor) -> Tensor:
        """Which of sequences [P, B, 4] are answered right: bool [P, B]."""
        return self.answers(sequences) == sequences[..., -1]

    # ------------------------------------------------------------------ forward

    def _forward(self, tokens: Tensor, noise: DropoutNoise | None, answers_only: bool = False) -> _Tape:
        shape = self.shape
        _, batch, length = tokens.shape
        x, tape = self._embed(tokens)
        drops = self._drops(noise, batch, length)
        if drops is not None:
            tape.drop_embedding = drops[0]
            x = x.mul_(drops[0])
        for i in range(shape.layers):
            block_drops = None if drops is None else drops[1 + 3 * i : 4 + 3 * i]
            x, block = self._block(i, x, batch, block_drops, last_only=answers_only and i == shape.layers - 1)
            if not answers_only:
                tape.blocks.append(block)
        tape.normed_f, tape.norm_f = self._norm("ln_f", x)
        return tape

    def _embed(self, tokens: Tensor) -> tuple[Tensor, _Tape]:
        """Embeddings of tokens [P, B, T] as [P, M, D]."""
        members, batch, length = tokens.shape
        embeddings, width = self.params["wte.weight"], self.shape.width
        offset = torch.arange(members, device=tokens.device).view(-1, 1, 1) * self.shape.vocabulary
        tape = _Tape((tokens + offset).flatten(), embeddings.dtype)
        x = F.embedding(tape.tokens, embeddings.flatten(0, 1)).view(members, batch, length, width)
        return x.add_(self.params["wpe.weight"][:, None, :length]).flatten(1, 2), tape

    def _logits(self, tape: _Tape) -> Tensor:
        assert tape.normed_f is not None
        return torch.bmm(tape.normed_f, self.params["wte.weight"].transpose(1, 2))

    def _drops(self, noise: DropoutNoise | None, batch: int, length: int) -> list[Tensor] | None:
        """Factors for the embedding, then per block for attention, its output and the MLP's output."""
        if noise is None:
            return None
        shape = self.shape
        rows, pairs = length * shape.width, shape.heads * length * length
        flat = noise.factors(batch, [rows] + [pairs, rows, rows] * shape.layers)
        for i, part in enumerate(flat):
            if i % 3 == 1:
                flat[i] = part.reshape(-1, length, length)
            else:
                flat[i] = part.view(self.members, batch * length, shape.width)
        return flat

    def _norm(self, name: str, x: Tensor) -> tuple[Tensor, _Norm]:
        normalised, mean, rstd = torch.native_layer_norm(x, (self.shape.width,), None, None, _EPS)
        weight, bias = self.params[f"{name}.weight"], self.params[f"{name}.bias"]
        return torch.addcmul(bias[:, None], normalised, weight[:, None]), _Norm(x, normalised, mean, rstd)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.params[f"{name}.weight"], self.params[f"{name}.bias"]
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    def _block(
        self, i: int, x: Tensor, batch: int, drops: list[Tensor] | None, last_only: bool = False
    ) -> tuple[Tensor, _BlockTape]:
        """One block on x [P, M, D]; `last_only` goes on with the last position alone after attention: [P, B, D]."""
        heads, width = self.shape.heads, self.shape.width
        members, rows, _ = x.shape
        length = rows // batch
        normed_1, norm_1 = self._norm(f"h.{i}.ln_1", x)
        qkv = self._linear(f"h.{i}.attn.c_attn", normed_1)
        qkv = qkv.view(members * batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        qkv = _packed(qkv, x.dtype).view(3, -1, length, width // heads)
        causal = torch.full((length, length), -math.inf, dtype=x.dtype, device=x.device).triu_(1)
        scores = torch.baddbmm(causal, qkv[0], qkv[1].transpose(1, 2), alpha=1.0 / math.sqrt(width // heads))
        probabilities = torch.softmax(scores, dim=-1)
        dropped = probabilities if drops is None else probabilities * drops[0]
        mixed = _mix(dropped, qkv[2]).view(members * batch, heads, length, -1).transpose(1, 2)
        mixed = _packed(mixed, normed_1.dtype).view(members, rows, width)
        if last_only:
            mixed, x = (part.view(members, batch, length, width)[:, :, -1] for part in (mixed, x))
        residual = self._linear(f"h.{i}.attn.c_proj", mixed).to(x.dtype)
        x = residual.add_(x) if drops is None else torch.addcmul(x, residual, drops[1])
        normed_2, norm_2 = self._norm(f"h.{i}.ln_2", x)
        hidden = self._linear(f"h.{i}.mlp.c_fc", normed_2)
        gate, activated = _gelu(hidden)
        residual = self._linear(f"h.{i}.mlp.c_proj", activated).to(x.dtype)
        x = residual.add_(x) if drops is None else torch.addcmul(x, residual, drops[2])
        tape = _BlockTape(
            norm_1, normed_1, qkv, probabilities, dropped, mixed, norm_2, normed_2, hidden, gate, activated
        )
        if drops is not None:
            tape.drop_attention, tape.drop_residual, tape.drop_mlp = drops
        return x, tape

    # ----------------------------------------------------------------- backward

    def _backward(self, tape: _Tape, grad_logits: Tensor, shares: Tensor, batch: int) -> None:
        """`grad_logits` [P, M, vocabulary] of each row's own loss; `shares` [P, M, 1] of the rows in the mean."""
        shape = self.shape
        assert tape.norm_f is not None
        grad = self._norm_backward("ln_f", self._head_backward(tape, grad_logits, shares), tape.norm_f)
        for i in reversed(range(shape.layers)):
            grad = self._block_backward(i, grad, tape.blocks[i], batch)
        self._embedding_backward(tape, grad, batch)

    def _head_backward(self, tape: _Tape, grad_logits: Tensor, shares: Tensor) -> Tensor:
        assert tape.normed_f is not None
        torch.bmm(grad_logits.transpose(1, 2), tape.normed_f * shares, out=self.grads["wte.weight"])
        return torch.bmm(grad_logits, self.params["wte.weight"]) * shares  # rows of width D, not of the vocabulary's

    def _embedding_backward(self, tape: _Tape, grad: Tensor, batch: int) -> None:
        grads, width = self.grads, self.shape.width
        if tape.drop_embedding is not None:
            grad = grad.mul_(tape.drop_embedding)
        by_position = grad.view(self.members, batch, -1, width).sum(1)
        grads["wpe.weight"].zero_()
        grads["wpe.weight"][:, : by_position.shape[1]] = by_position
        grads["wte.weight"].flatten(0, 1).index_add_(0, tape.tokens, grad.view(-1, width))

    def _norm_backward(self, name: str, grad: Tensor, norm: _Norm) -> Tensor:
        torch.sum(grad, 1, out=self.grads[f"{name}.bias"])
        torch.sum(grad * norm.normalised, 1, out=self.grads[f"{name}.weight"])
        grad = grad * self.params[f"{name}.weight"][:, None]
        return torch.ops.aten.native_layer_norm_backward(
            grad, norm.x, (self.shape.width,), norm.mean, norm.rstd, None, None, (True, False, False)
        )[0]

    def _linear_grads(self, name: str, grad: Tensor, x: Tensor) -> None:
        torch.sum(grad, 1, out=self.grads[f"{name}.bias"])
        torch.bmm(grad.transpose(1, 2), x, out=self.grads[f"{name}.weight"])

    def _linear_backward(self, name: str, grad: Tensor, x: Tensor) -> Tensor:
        """Fills the gradients of weight and bias; the gradient of x."""
        self._linear_grads(name, grad, x)
        return torch.bmm(grad, self.params[f"{name}.weight"])

    def _block_backward(self, i: int, grad: Tensor, tape: _BlockTape, batch: int) -> Tensor:
        inner = grad if tape.drop_mlp is None else grad * tape.drop_mlp
        inner = self._linear_backward(f"h.{i}.mlp.c_proj", inner, tape.activated)
        inner = _gelu_backward(inner, tape.hidden, tape.gate)
        inner = self._linear_backward(f"h.{i}.mlp.c_fc", inner, tape.normed_2)
        grad = self._norm_backward(f"h.{i}.ln_2", inner, tape.norm_2).add_(grad)
        inner = grad if tape.drop_residual is None else grad * tape.drop_residual
        inner = self._linear_backward(f"h.{i}.attn.c_proj", inner, tape.mixed)
        inner = self._attention_backward(inner, tape, batch)
        if i == 0 and not self.trains_embeddings:
            self._linear_grads(f"h.{i}.attn.c_attn", inner, tape.normed_1)
            return grad  # nobody wants the gradient of the first block's input
        inner = self._linear_backward(f"h.{i}.attn.c_attn", inner, tape.normed_1)
        return self._norm_backward(f"h.{i}.ln_1", inner, tape.norm_1).add_(grad)

    def _attention_backward(self, grad: Tensor, tape: _BlockTape, batch: int) -> Tensor:
        """Gradient of q, k and v, [P, M, 3D], from the gradient of the mixed values, [P, M, D]."""
        heads, width = self.shape.heads, self.shape.width
        members, rows, _ = grad.shape
        length = rows // batch
        q, k, v = tape.qkv
        grad = grad.view(members * batch, length, heads, -1).transpose(1, 2)
        grad = _packed(grad, q.dtype).view(-1, length, width // heads)
        grad_qkv = torch.empty_like(tape.qkv)
        _mix(tape.dropped.transpose(1, 2), grad, out=grad_qkv[2])
        grad_scores = torch.bmm(grad, v.transpose(1, 2))
        if tape.drop_attention is not None:
            grad_scores = grad_scores.mul_(tape.drop_attention)
        grad_scores = torch._softmax_backward_data(  # pyright: ignore
            grad_scores, tape.probabilities, -1, q.dtype
        )
        grad_scores = grad_scores.mul_(1.0 / math.sqrt(width // heads))
        _mix(grad_scores, k, out=grad_qkv[0])
        _mix(grad_scores.transpose(1, 2), q, out=grad_qkv[1])
        grad_qkv = grad_qkv.view(3, members * batch, heads, length, -1).permute(1, 3, 0, 2, 4)
        return _packed(grad_qkv, tape.normed_1.dtype).view(members, rows, 3 * width)
