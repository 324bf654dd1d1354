"""A lean GPT-2 on nn.Linear: the network of the arithmetic experiment.

The architecture and the arithmetic are those of `transformers.GPT2LMHeadModel` (pre-layer-norm, gelu_new, tied
embeddings); a test holds the two against each other. The names of the parameters are the same too, except that the four
projections of a block are nn.Linear and so hold the transpose of Hugging Face's Conv1D weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROJECTIONS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@dataclass(frozen=True)
class GPT2Shape:
    """Sizes of the network; the MLP is 4 * width wide."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    vocabulary: int = 1001
    context: int = 4
    dropout: float = 0.1
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "vocabulary", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPT2Shape: {name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"GPT2Shape: width must be a multiple of heads={self.heads}, got {self.width}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"GPT2Shape: dropout must be in [0, 1), got {self.dropout}")

    def masked_names(self) -> list[str]:
        """Names of the weights that discovery masks: the four projections of every block (12 * width^2 each block)."""
        return [f"h.{i}.{name}.weight" for i in range(self.layers) for name in PROJECTIONS]


_SHORT = 8  # tokens


def _short_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention as two products and a softmax: on a CPU, in bf16 and for three tokens, forward and backward take
    half the time of torch's kernel (500 sequences, 4 heads of 32, one thread: 8.5 ms, not 16.6), which is the faster
    one in fp32."""
    hidden = torch.full((q.shape[-2], k.shape[-2]), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + hidden, -1)
    return F.dropout(weights, dropout) @ v


class Attention(nn.Module):
    """Causal self-attention, softmax(q k^T / sqrt(d)) v, with dropout on the probabilities and on the output."""

    def __init__(self, shape: GPT2Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.dropout = shape.dropout
        self.c_attn = nn.Linear(shape.width, 3 * shape.width)
        self.c_proj = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.c_attn(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        if q.dtype == torch.bfloat16 and not q.is_cuda and tokens <= _SHORT:
            mixed = _short_attention(q, k, v, dropout)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, width)
        return F.dropout(self.c_proj(mixed), self.dropout, self.training)


class MLP(nn.Module):
    """width -> 4 * width -> width with GPT-2's tanh form of gelu ("gelu_new")."""

    def __init__(self, shape: GPT2Shape) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.c_fc = nn.Linear(shape.width, 4 * shape.width)
        self.c_proj = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), self.dropout, self.training)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: GPT2Shape) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.width)
        self.attn = Attention(shape)
        self.ln_2 = nn.LayerNorm(shape.width)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class LeanGPT2(nn.Module):
    """Tokens int64 [B, T] -> logits [B, T, vocabulary]; the output head is the token embedding (tied).

    `generator` draws the initial weights: N(0, init_std^2) for embeddings and projections, 0 for biases, 1 for norms.
    """

    def __init__(self, shape: GPT2Shape, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.wte = nn.Embedding(shape.vocabulary, shape.width)
        self.wpe = nn.Embedding(shape.context, shape.width)
        self.h = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.width)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=shape.init_std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = F.dropout(self.wte(tokens) + self.wpe(positions), self.shape.dropout, self.training)
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


def lm_loss(model: nn.Module, sequences: Tensor) -> Tensor:
    """The ordinary language-model loss, a 0-d mean over the three predicted positions of [B, 4] sequences."""
    logits = model(sequences[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten())


def _stacked(model: nn.Module) -> Any:
    from subnets.training.frozen_gpt2 import stacked_lm_loss  # it needs LeanGPT2

    return stacked_lm_loss(model)


lm_loss.stacked = _stacked  # pyright: ignore[reportFunctionMemberAccess]  # what discovery in bulk asks for


@torch.no_grad()
def accuracy(model: nn.Module, sequences: Tensor) -> float:
    """Share of [B, 4] sequences whose answer is the argmax over the whole vocabulary at the separator."""
    logits = model(sequences[:, :-1])[:, -1]
    return (logits.argmax(-1) == sequences[:, -1]).float().mean().item()
