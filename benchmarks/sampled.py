"""``python -m benchmarks.sampled``: a training step with sampled masks, and many bit masks over one weight.

*sampled*: one linear layer, forward, backward and Adam on its scores, with several Gumbel masks per batch: ours, and
the eager lines as Csordas's code has them (two uniforms and three logarithms per weight and mask, one batched product).
Before the clock starts the gradient of ours is compared with fp64 on the same masks. *packed*: T bit masks, each for
its own rows, without gradient: ours, and T effective weights kept in memory. Median over interleaved rounds; kept:
bytes that the graph holds between forward and backward beyond its inputs, or beside W for evaluation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from subnets.training.files import write_csv
from torch import Tensor

from subnet_kernels import effective_weight, masked_linear, pack_mask, packed_linear
from subnet_kernels.masks import Gumbel

from .rows import aligned, environment
from .timing import TimingConfig, time_interleaved

LAM, LR = 1e-6, 1e-2
COLUMNS = ["case", "contender", "ms", "p20_ms", "p80_ms", "x_eager", "kept_mb", "gate"]


def eager_gumbel(logits: Tensor, samples: int) -> Tensor:
    """Masks [samples, ...] by Csordas's lines, straight through: two uniforms and three logarithms for each entry."""
    u = torch.rand(2, samples, *logits.shape, device=logits.device)
    noise = -torch.log(torch.log(u[1] + 1e-10) / torch.log(u[0] + 1e-10) + 1e-10)
    soft = torch.sigmoid(logits + noise)
    return ((soft > 0.5).float() - soft).detach() + soft


class Sampled:
    """One layer with its data: [size, size], ``samples`` masks for ``batch`` rows."""

    def __init__(self, size: int, batch: int, samples: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.samples, self.name = samples, f"sampled_{size}x{size}_b{batch}_s{samples}"
        self.weight = (torch.randn(size, size, generator=generator) / size**0.5).to(device)
        self.x = torch.randn(batch, size, generator=generator).to(device)
        self.key = torch.tensor([1, 0], device=device)
        self.scores = {name: self._scores(generator, device) for name in ("eager", "ours")}
        self.optimizers = {name: torch.optim.Adam([s], lr=LR, fused=True) for name, s in self.scores.items()}

    def _scores(self, generator: torch.Generator, device: str) -> Tensor:
        return (2 + 0.1 * torch.randn(self.weight.shape, generator=generator)).to(device).requires_grad_()

    def eager(self) -> Tensor:
        """The loss by the authors' formula."""
        scores = self.scores["eager"]
        masks = eager_gumbel(scores, self.samples)
        parts = self.x.view(self.samples, -1, self.x.shape[1])
        return torch.bmm(parts, (self.weight * masks).transpose(1, 2)).square().mean() + LAM * scores.sum()

    def ours(self) -> Tensor:
        """The loss by the op."""
        out, penalty = masked_linear(
            self.x, self.weight, self.scores["ours"], 1.0, kind=Gumbel(samples=self.samples), key=self.key
        )
        return out.square().mean() + LAM * penalty

    def step(self, name: str) -> Callable[[], None]:
        """A training step of that contender."""
        loss: Callable[[], Tensor] = getattr(self, name)
        optimizer = self.optimizers[name]

        def step() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            self.key[1] += 1

        return step

    def kept_mb(self, name: str) -> float:
        """What the graph of one loss holds, without x, W, scores."""
        inputs = {t.untyped_storage().data_ptr() for t in (self.x, self.weight, self.scores[name], self.key)}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in inputs:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = getattr(self, name)()
        del loss
        return sum(kept.values()) / 2**20

    def gate(self) -> float:
        """Largest error of ours's score gradient against fp64 on the same masks, over its largest entry, in 2^-18."""
        scores = self.scores["ours"]
        (got,) = torch.autograd.grad(self.ours(), scores)
        exact = scores.detach().double().requires_grad_()
        outs = []
        kind = Gumbel(samples=self.samples)
        masks, _ = effective_weight(torch.ones_like(self.weight), scores.detach(), 1.0, kind=kind, key=self.key)
        for part, m, one in zip(self.x.chunk(self.samples), masks, kind.at(self.key).each(), strict=True):
            straight = m.double() + one.slope(exact.detach(), 1.0) * (exact - exact.detach())
            outs.append(part.double() @ (self.weight.double() * straight).T)
        (expected,) = torch.autograd.grad(torch.cat(outs).square().mean() + LAM * exact.sum(), exact)
        return ((got - expected).abs().max() / expected.abs().max() * 2**18).item()


def packed_contenders(
    shape: tuple[int, int], masks: int, rows: int, device: str
) -> tuple[str, dict[str, Callable[[], Any]], dict[str, float], float]:
    """(name, contenders, MB that each keeps beside W, the largest difference of their outputs in 2^-20)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(device)
    chosen = [(torch.rand(shape, generator=generator) < 0.3).to(device) for _ in range(masks)]
    packed = torch.stack([pack_mask(mask) for mask in chosen])
    kept = torch.stack([weight * mask for mask in chosen])
    del chosen
    x = torch.randn(masks * rows, shape[1], generator=generator).to(device)

    def cached() -> Tensor:
        return torch.cat([F.linear(part, w_eff) for part, w_eff in zip(x.chunk(masks), kept, strict=True)])

    def ours() -> Tensor:
        return packed_linear(x, weight, packed)

    exact = cached()
    gate = ((ours() - exact).abs().max() / exact.abs().max() * 2**20).item()
    megabytes = {"eager": kept.numel() * kept.element_size() / 2**20, "ours": packed.numel() / 2**20}
    return f"packed_{shape[0]}x{shape[1]}_t{masks}_{rows}rows", {"eager": cached, "ours": ours}, megabytes, gate


def run(config: TimingConfig, device: str, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Rows of all cases."""
    rows: list[dict[str, Any]] = []

    def add(case: str, functions: dict[str, Callable[[], Any]], kept: dict[str, float], gate: float) -> None:
        timings = time_interleaved(functions, device, config)
        for name, timing in timings.items():
            low, middle, high = (timing.percentile_us(percent) / 1e3 for percent in (20, 50, 80))
            rows.append({
                "case": case, "contender": name, "ms": middle, "p20_ms": low, "p80_ms": high,
                "x_eager": timing.ratio(timings["eager"]), "kept_mb": kept[name],
                "gate": gate if name == "ours" else None,
            })  # fmt: skip
        say(f"{case} done")

    for size, batch, samples in ((800, 128, 8), (800, 128, 4), (400, 128, 4), (2000, 128, 8)):
        layer = Sampled(size, batch, samples, device)
        kept, gate = {name: layer.kept_mb(name) for name in layer.scores}, layer.gate()
        add(layer.name, {name: layer.step(name) for name in layer.scores}, kept, gate)
    with torch.no_grad():
        for shape, masks, per_mask in (((800, 800), 16, 16), ((4096, 4096), 16, 16)):
            add(*packed_contenders(shape, masks, per_mask, device))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampled", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds per case (30)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--out", type=Path, help="a .csv file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = run(TimingConfig(args.rounds, 5, args.budget, clock=args.clock), args.device)
    lines = [tuple(COLUMNS)]
    lines += [tuple(f"{r[c]:.4g}" if isinstance(r[c], float) else str(r[c] or "") for c in COLUMNS) for r in rows]
    print(aligned(lines, 2))
    if args.out:
        where = environment(args.device, args.threads, args.clock)
        write_csv(args.out, [*COLUMNS, *where], [{**row, **where} for row in rows])
    if any(row["gate"] is not None and not row["gate"] <= 1 for row in rows):
        raise SystemExit("a result of ours did not pass its check")


if __name__ == "__main__":
    main()
