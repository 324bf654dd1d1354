"""Whole models: one mask-training step of GPT-2 small and of ResNet-18, ours against fine-tuning and the eager idiom.

The weights are random, in bf16 (ResNet's in channels_last); scores are fp32. All linear layers of GPT-2's blocks are
masked, all convolutions of ResNet. Labels are what the network says under its initial mask, so that its loss there is
low and another mask's is not: the check of captured graphs rests on that. BatchNorm is in eval mode: the net is frozen.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from . import memory
from .cases import BETA
from .ceilings import Ceilings
from .contenders import Skipped, check_capturable, fused_adamw, masks_adamw
from .resnet import ResNet18
from .rows import Row
from .runner import Settings, free_memory, in_mode, make_row, set_floor, tuned_convolutions
from .timing import Function, time_interleaved

LAM = 1e-6  # about the size of the mean gradient of a score
LOSS_TOLERANCE = 2.0**-8  # of the loss: bf16's rounding
# least cosines between gradients of the scores, and between first updates (Adam makes every gradient's sign a full
# step, rounding flips a few); for compiled models lower, as fused operations round to bf16 at other places
LEAST_COSINES = {False: (0.999, 0.98), True: (0.99, 0.95)}


@dataclass(frozen=True)
class ModelCase:
    """kind: "gpt2" (sizes: layers, width, heads, vocabulary) or "resnet18" (sizes: width of the stem, classes);
    extent: tokens, or the image's side."""

    name: str
    kind: str
    batch: int
    extent: int
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def targets(self) -> str:
        return "all-linear" if self.kind == "gpt2" else "all-conv"

    def num_items(self) -> tuple[int, str]:
        return (self.batch * self.extent, "tokens") if self.kind == "gpt2" else (self.batch, "images")

    def build(self, device: str) -> tuple[nn.Module, Tensor]:
        """(the network, frozen, in bf16; its input)"""
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.kind == "gpt2":
                from subnets.training.gpt2 import GPT2Shape, LeanGPT2

                shape = GPT2Shape(**{"context": self.extent, "dropout": 0.0, **self.sizes})
                model: nn.Module = LeanGPT2(shape, generator)
                x = torch.randint(shape.vocabulary, (self.batch, self.extent), generator=generator).to(device)
            else:
                model = ResNet18(**self.sizes).to(memory_format=torch.channels_last)
                x = torch.randn(self.batch, 3, self.extent, self.extent, generator=generator)
                x = x.to(device, torch.bfloat16, memory_format=torch.channels_last)
        return model.to(device, torch.bfloat16).eval().requires_grad_(False), x


_SMALL = {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50257}
MODEL_CASES = [
    ModelCase("gpt2_4x64", "gpt2", 4, 64, _SMALL),
    ModelCase("gpt2_8x1024", "gpt2", 8, 1024, _SMALL),
    ModelCase("resnet18_b256", "resnet18", 256, 224),
    ModelCase("gpt2_tiny_2x16", "gpt2", 2, 16, {"layers": 2, "width": 32, "heads": 2, "vocabulary": 101}),
    ModelCase("resnet18_tiny_b2", "resnet18", 2, 32, {"width": 8, "num_classes": 10}),
]


# --- contenders ------------------------------------------------------------------------------------------------------


class Trainer:
    """A copy of the network and how one step trains it.

    Attributes:
        trained: name of the layer -> what trains (scores, or weights).  last_loss: of the last step, without penalty.
    """

    name = ""
    is_masked = True
    is_compiled = False

    def __init__(self, case: ModelCase, base: nn.Module, x: Tensor, scores: dict[str, Tensor]) -> None:
        self.case, self.x, self.model = case, x, copy.deepcopy(base)
        self.labels = x.new_zeros(0)
        self.trained = self.prepare(scores)
        self.optimizer = self.make_optimizer()
        self.last_loss: Tensor | None = None

    def prepare(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError

    def make_optimizer(self) -> torch.optim.Optimizer:
        return fused_adamw(list(self.trained.values()))

    def task_loss(self) -> Tensor:
        logits = self.model(self.x)
        return F.cross_entropy(logits.flatten(0, -2).float(), self.labels.flatten())

    def losses(self) -> tuple[Tensor, Tensor]:
        """(loss, loss with what is added to it for the backward pass)"""
        loss = self.task_loss()
        return loss, loss

    def backward(self) -> None:
        for tensor in self.trained.values():
            tensor.grad = None
        self.last_loss, total = self.losses()
        total.backward()
        self.last_loss = self.last_loss.detach()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()

    @torch.no_grad()
    def set_scores(self, scores: dict[str, Tensor]) -> None:
        for name, tensor in self.trained.items():
            tensor.copy_(scores[name])


class Mask(nn.Module):
    """The parametrization of the eager idiom."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores.clone())
        self.penalty: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        m = torch.sigmoid(BETA * self.scores)
        self.penalty = m.sum()
        return (weight * m).to(weight.dtype)


class Eager(Trainer):
    """What an expert would write: weight -> weight * sigmoid(beta*s) through torch's parametrizations, the sum of the
    masks added to the loss, fused AdamW."""

    name = "eager"

    def prepare(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        self.masks = {name: Mask(value) for name, value in scores.items()}
        for name, mask in self.masks.items():
            parametrize.register_parametrization(self.model.get_submodule(name), "weight", mask)
        return {name: mask.scores for name, mask in self.masks.items()}

    def losses(self) -> tuple[Tensor, Tensor]:
        loss = self.task_loss()
        penalty = loss.new_zeros(())
        for mask in self.masks.values():
            assert mask.penalty is not None
            penalty = penalty + mask.penalty
            mask.penalty = None  # holds the graph, and with it a stream that a capture must not wait for
        return loss, loss + LAM * penalty


class Compiled(Eager):
    """The same, model and loss under torch.compile (its default mode)."""

    name = "compile"
    is_compiled = True

    def prepare(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        torch._dynamo.reset()
        self.losses = torch.compile(super().losses, dynamic=False)  # type: ignore[method-assign]
        return super().prepare(scores)


class Finetune(Trainer):
    """Full fine-tuning: no mask, every parameter of the network is trained, all in bf16, the moments too (few do so:
    steps below a weight's rounding are lost)."""

    name = "finetune"
    is_masked = False

    def prepare(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(self.model.requires_grad_(True).named_parameters())


class FinetuneAmp(Finetune):
    """The same with fp32 weights and moments under autocast to bf16, as mixed precision training is usually done."""

    name = "finetune_amp"

    def prepare(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        self.model.float()
        return super().prepare(scores)

    def task_loss(self) -> Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16):
            return super().task_loss()


class Ours(Trainer):
    """``masks = mask_model(model); optimizer = masks.adamw(lr, lam=lam); masks.anneal(...)``, on a GPU with all
    effective weights made in one launch and, for convolutions, all score gradients in another. The schedule runs, from
    one beta to the same one, so that the others' masks stay comparable."""

    name = "ours"

    def prepare(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        from subnets import mask_model

        init = {f"{name}.weight": value for name, value in scores.items()}
        self.masks = mask_model(self.model, self.case.targets, init=init)
        self.masks.anneal(start=BETA, to=BETA, steps=1, on_device=self.masks.is_on_gpu)
        return {name.removesuffix(".scores"): value for name, value in self.masks.scores().items()}

    def make_optimizer(self) -> torch.optim.Optimizer:
        return masks_adamw(self.masks, LAM)

    def backward(self) -> None:
        if not self.masks.is_on_gpu:
            return super().backward()
        self.masks.refresh()
        with self.masks.batch_score_gradients():
            super().backward()


class OursCompiled(Ours):
    """The masked model and its loss under torch.compile."""

    name = "ours_compile"
    is_compiled = True

    def prepare(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        trained = super().prepare(scores)
        with torch.no_grad():
            self.model(self.x)  # makes the effective weights' memory, which the compiled graph then reads
        self.losses = torch.compile(super().losses, dynamic=False)  # type: ignore[method-assign]
        return trained


MODEL_CONTENDERS: dict[str, type[Trainer]] = {
    c.name: c for c in (Eager, Compiled, Finetune, FinetuneAmp, Ours, OursCompiled)
}


# --- checks ----------------------------------------------------------------------------------------------------------


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].detach().float().flatten() for name in sorted(tensors)])


def _cosine(a: Tensor, b: Tensor) -> float:
    return (torch.dot(a, b) / (a.norm() * b.norm()).clamp_min(1e-30)).item()


def gate_step(trainer: Trainer, eager: Trainer, scores: dict[str, Tensor]) -> float:
    """One step of both from the same scores, in multiples of what is allowed: the difference of the losses over
    LOSS_TOLERANCE, and by LEAST_COSINES 1 - cosine of the scores' gradients (of the loss without penalty) and of the
    first updates (with it). A NaN is infinite."""
    losses, gradients, updates = [], [], []
    for each in (trainer, eager):
        each.set_scores(scores)
        each.optimizer = each.make_optimizer()
        for tensor in each.trained.values():
            tensor.grad = None
        loss, _ = each.losses()
        loss.backward()
        losses.append(loss.item())
        gradients.append(_flat({name: t.grad for name, t in each.trained.items() if t.grad is not None}))
        del loss
        each.step()
        updates.append(_flat(each.trained) - _flat(scores))
    least_gradient, least_update = LEAST_COSINES[trainer.is_compiled]
    worst = max(
        abs(losses[0] - losses[1]) / (LOSS_TOLERANCE * abs(losses[1])),
        (1 - _cosine(*gradients)) / (1 - least_gradient),
        (1 - _cosine(*updates)) / (1 - least_update),
    )
    is_nan = any(value != value for value in (*losses, _cosine(*gradients), _cosine(*updates)))
    return float("inf") if is_nan else worst


def gate_replay(trainer: Trainer, replay: Function, eager: Trainer, scores: dict[str, Tensor]) -> float:
    """Whether replays see the scores of their moment: with negated scores, after one replay that may bring what is kept
    up to date, a replay's loss must be ten times nearer to eager's there than to eager's at the initial scores."""
    loss = trainer.last_loss  # written by replays
    assert loss is not None
    trainer.set_scores({name: -value for name, value in scores.items()})
    replay()
    eager.set_scores({name: value.clone() for name, value in trainer.trained.items()})
    with torch.no_grad():
        expected = eager.task_loss().item()
    replay()
    got = loss.item()
    eager.set_scores(scores)
    with torch.no_grad():
        distance = abs(expected - eager.task_loss().item())
    ratio = abs(got - expected) / (0.1 * distance) if distance else float("inf")
    return ratio if ratio == ratio else float("inf")


# --- rows ------------------------------------------------------------------------------------------------------------


def make_trainers(
    case: ModelCase, settings: Settings
) -> tuple[list[Trainer], Eager, dict[str, Tensor], dict[str, float]]:
    """(trainers that run here, the reference of their checks, the initial scores, gates by name); what breaks or is
    left out is said."""
    base, x = case.build(settings.device)
    kind = nn.Linear if case.targets == "all-linear" else nn.Conv2d
    generator = torch.Generator(x.device).manual_seed(1)
    scores = {}
    for name, module in base.named_modules():
        if isinstance(module, kind):
            values = torch.randn(module.weight.shape, generator=generator, device=x.device)
            scores[name] = torch.empty_like(module.weight, dtype=torch.float32).copy_(values)
    reference = Eager(case, base, x, scores)
    with torch.no_grad():
        labels = reference.model(x).argmax(-1)
    reference.labels = labels
    trainers: list[Trainer] = []
    gates: dict[str, float] = {}
    for name in (name for name in MODEL_CONTENDERS if name in settings.models):
        try:
            trainer = MODEL_CONTENDERS[name](case, base, x, scores)
            trainer.labels = labels
            if trainer.is_masked:
                gates[name] = gate_step(trainer, reference, scores)
            trainer.step()  # compiles, too
        except Skipped as reason:
            settings.say(f"left out {name} of {case.name}: {reason}")
            continue
        except Exception as error:
            settings.broke(case.name)(name, error)
            continue
        trainers.append(trainer)
    return trainers, reference, scores, gates


def run_model(case: ModelCase, settings: Settings, ceilings: Ceilings) -> list[Row]:
    """Rows of one model's step: every contender, in every mode."""
    with tuned_convolutions():
        trainers, reference, scores, gates = make_trainers(case, settings)
        by_name = {t.name: t for t in trainers}
        with FlopCounterMode(display=False) as counter:
            reference.step()
        flops = float(counter.get_total_flops())
        peaks = {}
        if settings.with_memory:
            peaks = {t.name: memory.peak_of(t.step, settings.device) / 2**20 for t in trainers}
        num_weights = sum(value.numel() for value in scores.values())
        rows = []
        for mode in settings.modes:
            functions = in_mode(
                mode, {t.name: t.step for t in trainers}, case.name, settings,
                lambda name: by_name[name].trained.values(), lambda name: check_capturable(by_name[name].optimizer),
            )  # fmt: skip
            timings = time_interleaved(functions, settings.device, settings.timing) if functions else {}
            for name in timings:
                row = make_row("models", case.name, "step", name, mode, timings)
                row.gate = gates.get(name)
                if mode == "graph" and by_name[name].is_masked:
                    row.gate = max(row.gate or 0.0, gate_replay(by_name[name], functions[name], reference, scores))
                row.peak_mb = peaks.get(name)
                set_floor(row, ceilings, flops, num_weights * 44, torch.bfloat16)  # 6 forward, 10 backward, 28 AdamW
                count, unit = case.num_items()
                row.note = f"{count / (row.median_us or 1) * 1e6:.4g} {unit}/s, {num_weights} weights masked"
                rows.append(row)
            del functions
            free_memory(settings.device)
    return rows

