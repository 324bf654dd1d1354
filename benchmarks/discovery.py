"""``python -m benchmarks.discovery``: the arithmetic discovery, ours against the same loop on NeuroSurgeon.

Each contender looks for S1 in one trained T1 network (4 layers, batch 500) with AdamW fused in its way, in fp32 and
under bf16 autocast; they take turns epoch by epoch, evaluation not counted. Steps per second, their ratio (median
over the epochs), and what was found: accuracy of the hard mask on S1 and density.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from subnets.discovery.bar import Bar
from subnets.discovery.config import DiscoveryConfig
from subnets.discovery.data import EpochData
from subnets.discovery.loop import _masked, _Run
from subnets.discovery.random_state import RandomState
from subnets.experiments.arithmetic import data, stages
from subnets.experiments.arithmetic.config import make_config
from subnets.training.gpt2 import LeanGPT2, accuracy, lm_loss
from torch import Tensor, nn

from .models import LogitsOnly, hugging_face_twin
from .rows import aligned


class Contender:
    """A discovery that goes on by the epoch."""

    name = ""

    def __init__(self, base: LeanGPT2, batches: Any, config: DiscoveryConfig, dtype: torch.dtype) -> None:
        self.model, self.batches, self.config, self.dtype = copy.deepcopy(base), batches, config, dtype
        self.seconds: list[float] = []
        self.start()

    def start(self) -> None:
        raise NotImplementedError

    def epoch(self, epoch: int) -> None:
        """Train for one epoch."""
        raise NotImplementedError

    def found(self, held_out: Tensor) -> tuple[float, float]:
        """(accuracy of the hard mask, density)"""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return lm_loss(model, batch)


class Ours(Contender):
    """The loop of subnets.discover itself."""

    name = "ours"

    def start(self) -> None:
        self.scope = contextlib.ExitStack()
        self.masks = self.scope.enter_context(_masked(self.model, self.config))
        everything, state = EpochData(self.batches, self.config), RandomState([torch.device("cpu")])
        self.run = _Run(self.masks, everything, self.loss, self.config, None, (), state)
        self.bar = Bar(None, 0, False)

    def epoch(self, epoch: int) -> None:
        self.run.epoch(epoch, self.bar)

    def found(self, held_out: Tensor) -> tuple[float, float]:
        with torch.no_grad(), self.masks.hard():
            return accuracy(self.model, held_out), self.masks.density()


class Theirs(Contender):
    """NeuroSurgeon's layers in the same model, torch's fused AdamW on the loss + lam * their L0."""

    name = "neurosurgeon"

    def start(self) -> None:
        from NeuroSurgeon.Masking import ContSparseGPTConv1D, ContSparseLinear
        from transformers.pytorch_utils import Conv1D

        twins = {nn.Linear: ContSparseLinear, Conv1D: ContSparseGPTConv1D}
        self.model.requires_grad_(False).eval()
        self.layers = []
        for name, module in list(self.model.named_modules()):
            if type(module) in twins and not name.endswith("lm_head"):
                new = twins[type(module)].from_layer
                twin = new(module, mask_unit="weight", mask_init_value=self.config.score_init)
                twin.requires_grad_(False)
                twin.weight_mask_params.requires_grad_()
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, twin)
                self.layers.append(twin)
        scores = [layer.weight_mask_params for layer in self.layers]
        config = self.config
        self.optimizer = torch.optim.AdamW(scores, lr=config.lr, weight_decay=config.weight_decay, fused=True)

    def epoch(self, epoch: int) -> None:
        for layer in self.layers:
            layer.temperature = self.config.beta(epoch, self.config.epochs)
            layer.train(True)
        for batch in self.batches(epoch):
            loss = self.loss(self.model, batch)
            loss = loss + self.config.lam * torch.stack([layer.calculate_l0() for layer in self.layers]).sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def found(self, held_out: Tensor) -> tuple[float, float]:
        for layer in self.layers:
            layer.train(False)
        kept = sum(int((layer.weight_mask_params > 0).sum()) for layer in self.layers)
        with torch.no_grad():
            return accuracy(self.model, held_out), kept / sum(layer.weight.numel() for layer in self.layers)


class TheirsInTransformers(Theirs):
    """The same in transformers' GPT-2 with these weights, which is what NeuroSurgeon's users train."""

    name = "neurosurgeon, transformers"

    def start(self) -> None:
        self.model = LogitsOnly(hugging_face_twin(self.model))  # pyright: ignore
        super().start()


def run(folder: Path, layers: int, epochs: int, steps: int, say: Callable[[str], None] = print) -> str:
    """All contenders; the table. The base network lies in ``folder`` and is trained where it is missing."""
    values = make_config("quick", {"layers": str(layers), "discovery_batch": "500"})
    settings = dataclasses.replace(values, discovery_pairs=500 * steps, discovery_epochs=epochs, discovery_lr=1e-3)
    depth = stages.Depth(settings, layers, folder)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"the base network in {folder} (trained now if missing: some minutes)")
    base = depth.model(stages.base_stage(depth))
    batches = stages.s1_batches(settings)
    config = stages.discovery_config(settings, layers)
    held_out = data.held_out_set(data.S1, "test", settings.seed, settings.num_held_out)
    kinds = (Ours, Theirs, TheirsInTransformers)
    contenders = [kind(base, batches, config, d) for d in (torch.float32, torch.bfloat16) for kind in kinds]
    for epoch in range(epochs):
        for contender in contenders:
            torch.manual_seed(epoch)
            begin = time.perf_counter()
            contender.epoch(epoch)
            contender.seconds.append(time.perf_counter() - begin)
        say(f"epoch {epoch + 1} of {epochs}: " + ", ".join(f"{steps / c.seconds[-1]:.2f}" for c in contenders))
    lines = [("contender", "dtype", "steps/s", "x neurosurgeon", "x in transformers", "S1 accuracy", "density")]
    for contender in contenders:
        ratios = []
        for name in (Theirs.name, TheirsInTransformers.name):
            other = next(c for c in contenders if c.name == name and c.dtype == contender.dtype)
            both = zip(contender.seconds[1:], other.seconds[1:], strict=True)
            ratios.append(f"{statistics.median(theirs / mine for mine, theirs in both):.2f}")
        found, density = contender.found(held_out)
        rate = steps / statistics.median(contender.seconds[1:])
        dtype = "fp32" if contender.dtype == torch.float32 else "bf16 autocast"
        lines.append((contender.name, dtype, f"{rate:.2f}", *ratios, f"{found:.3f}", f"{density:.4f}"))
    return aligned(lines, 2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.discovery", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-discovery"), help="folder of the base network")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=25, help="steps per epoch")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(run(args.out, args.layers, args.epochs, args.steps))


if __name__ == "__main__":
    main()
