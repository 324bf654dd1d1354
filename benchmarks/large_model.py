"""Memory of mask training on a large model: bytes per masked weight by choice, predicted and measured.

``python -m benchmarks.large_model [--choices NAME ...] [--layers N] [--out FILE.csv]``: for each choice a few
training steps of a randomly initialised Llama with bf16 weights on the CPU. Resident is what lives from step to step
(frozen weights, scores, moments, kept effective weights), peak what a step holds beyond that at most; both in bytes per
masked weight, embeddings and activations included in what is measured.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from subnets import mask_model
from torch import nn

from . import memory


@dataclass(frozen=True)
class Choice:
    """How scores are kept and stepped, and the bytes per masked weight (bf16) that this takes."""

    unit: str = "weight"
    in_backward: bool = False
    bf16_moments: bool = False
    keeps_effective_weights: bool = True

    def bytes_per_weight(self) -> dict[str, float]:
        """Predicted: base weight, scores, gradients, moments, kept effective weight; per-row numbers are nearly 0."""
        per_score = 1.0 if self.unit == "weight" else 0.0
        return {
            "weight": 2.0,
            "scores": 4.0 * per_score,
            "gradients": 0.0 if self.in_backward else 4.0 * per_score,
            "moments": (4.0 if self.bf16_moments else 8.0) * per_score,
            "effective weight": 2.0 if self.keeps_effective_weights else 0.0,
        }


CHOICES = {
    "adamw": Choice(),
    "bf16 moments": Choice(bf16_moments=True),
    "in backward": Choice(in_backward=True),
    "both": Choice(in_backward=True, bf16_moments=True),
    "both, nothing kept": Choice(in_backward=True, bf16_moments=True, keeps_effective_weights=False),
    "rows, nothing kept": Choice(unit="row", keeps_effective_weights=False),
}
# Llama 3.2 1B's sizes but for its vocabulary (128,256: embeddings are not masked)
_SHAPE: dict[str, int] = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32_000, "max_position_embeddings": 128,
}  # fmt: skip


def build(layers: int) -> nn.Module:
    """A Llama of that many layers, bf16, with weights of a sensible size."""
    import transformers

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_SHAPE, "num_hidden_layers": layers}))
    rotary = {name: type(m) for name, m in model.named_modules() if type(m).__name__ == "LlamaRotaryEmbedding"}
    model = model.bfloat16().to_empty(device="cpu")
    for name, kind in rotary.items():  # its frequencies are no parameters: made anew
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, kind(model.config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:  # the same block of numbers over and over: drawing a billion takes longer than training on them
                block = torch.empty(min(parameter.numel(), 1 << 20), dtype=torch.bfloat16)
                block.normal_(0, 0.02, generator=generator)
                parameter.view(-1).copy_(block.repeat(-(-parameter.numel() // block.numel()))[: parameter.numel()])
    return model.eval().requires_grad_(False)


def measure(model: nn.Module, choice: Choice, steps: int = 2) -> dict[str, Any]:
    """Bytes per masked weight of a few steps, and seconds of the last; the model is unmasked afterwards."""
    masks = mask_model(model, unit=choice.unit, keep_effective_weights=choice.keeps_effective_weights)
    num_weights = sum(layer.weight.numel() for layer in masks.layers.values())
    moments = torch.bfloat16 if choice.bf16_moments else None
    optimizer = masks.adamw(lr=1e-2, lam=1e-9, in_backward=choice.in_backward, moment_dtype=moments)
    masks.anneal(to=200, steps=100)
    ids = torch.randint(model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(1))  # pyright: ignore

    def step() -> None:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        F.cross_entropy(logits.float(), ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(steps - 1):
        step()
    began = time.perf_counter()
    peak = memory.peak_of(step, "cpu")
    seconds = time.perf_counter() - began
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
    kept = [layer._slot.w_eff for layer in masks.layers.values() if layer._slot.w_eff is not None]
    tensors = [*model.parameters(), *model.buffers(), *state, *kept]
    resident = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    density = masks.density()
    masks.unmask()
    return {
        "masked_weights": num_weights, "resident_bytes": round(resident / num_weights, 3),
        "peak_bytes": round((resident + peak) / num_weights, 3), "step_seconds": round(seconds, 2),
        "density": round(density, 4),
    }  # fmt: skip


def main() -> None:
    """Prints a table, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choices", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    parser.add_argument("--layers", type=int, default=_SHAPE["num_hidden_layers"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = build(args.layers)
    rows = []
    for name in args.choices:
        predicted = CHOICES[name].bytes_per_weight()
        row = {"choice": name, "predicted_bytes": sum(predicted.values()), **measure(model, CHOICES[name])}
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
