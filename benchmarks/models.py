"""Whole models: one mask-training step of GPT-2 small and of ResNet-18, ours against fine-tuning and the eager idiom.

The weights are random (ResNet's in channels_last), scores are fp32. All linear layers of GPT-2's blocks are masked, all
convolutions of ResNet. Labels are what the network says under its initial mask, so that its loss there is low and
another mask's is not: the check of captured graphs rests on that. BatchNorm is in eval mode: the net is frozen.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from . import memory
from .cases import BETA
from .ceilings import Ceilings
from .contenders import Skipped, check_capturable, fused_adamw, masks_adamw, neurosurgeon_circuit, neurosurgeon_layer
from .resnet import ResNet18
from .rows import Row
from .runner import Settings, free_memory, in_mode, make_row, set_floor, tuned_convolutions
from .timing import Function, time_interleaved

LAM = 1e-6  # about the size of the mean gradient of a score
# of the loss, by the precision of the products
LOSS_TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-18}
# least cosines between gradients of the scores, and between first updates (Adam makes every gradient's sign a full
# step, rounding flips a few), by that precision and by whether the model is compiled: fused operations round to bf16 at
# other places
LEAST_COSINES = {
    (torch.bfloat16, False): (0.999, 0.98), (torch.bfloat16, True): (0.99, 0.95),
    (torch.float32, False): (1 - 1e-8, 1 - 1e-5), (torch.float32, True): (1 - 1e-8, 1 - 1e-5),
}  # fmt: skip


@dataclass(frozen=True)
class ModelCase:
    """kind: "gpt2" (sizes: layers, width, heads, vocabulary), "transformers" (the same in transformers' GPT-2, whose
    layers are Conv1D; there NeuroSurgeon is its CircuitModel), "resnet18" (sizes: width of the stem, classes) or
    "vision" (the vision experiment's ResNet-18; sizes: width); extent: tokens, or the image's side. precision: "bf16"
    (of the whole network), "fp32", or "amp" (fp32 under autocast to bf16)."""

    name: str
    kind: str
    batch: int
    extent: int
    sizes: dict[str, int] = field(default_factory=dict)
    precision: str = "bf16"

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def product_dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    @property
    def targets(self) -> str:
        return "all-linear" if self.is_language else "all-conv"

    @property
    def is_language(self) -> bool:
        return self.kind in ("gpt2", "transformers")

    @property
    def layer_type(self) -> type[nn.Module]:
        """Of the layers that are masked."""
        if self.kind == "transformers":
            from transformers.pytorch_utils import Conv1D

            return Conv1D
        return nn.Linear if self.is_language else nn.Conv2d

    def num_items(self) -> tuple[int, str]:
        return (self.batch * self.extent, "tokens") if self.is_language else (self.batch, "images")

    def build(self, device: str) -> tuple[nn.Module, Tensor]:
        """(the network, frozen; its input)"""
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.is_language:
                from subnets.training.gpt2 import GPT2Shape, LeanGPT2

                shape = GPT2Shape(**{"context": self.extent, "dropout": 0.0, **self.sizes})
                model: nn.Module = LeanGPT2(shape, generator)
                if self.kind == "transformers":
                    model = LogitsOnly(hugging_face_twin(model))
                x = torch.randint(shape.vocabulary, (self.batch, self.extent), generator=generator).to(device)
            else:
                model = ResNet18(**self.sizes) if self.kind == "resnet18" else self._vision()
                model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
                x = torch.randn(self.batch, 3, self.extent, self.extent, generator=generator)
                if self.kind == "vision":
                    x = x.mul_(64).add_(128).clamp_(0, 255)  # pixels
                x = x.to(device, self.weight_dtype, memory_format=torch.channels_last)
        return model.to(device, self.weight_dtype).eval().requires_grad_(False), x

    def _vision(self) -> nn.Module:
        from subnets.experiments.vision.models import NetworkShape, build

        return build(NetworkShape(width=self.sizes.get("width", 64), image_size=self.extent), seed=0)


_SMALL = {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50257}
MODEL_CASES = [
    ModelCase("gpt2_4x64", "gpt2", 4, 64, _SMALL),
    ModelCase("gpt2_4x64_fp32", "gpt2", 4, 64, _SMALL, precision="fp32"),
    ModelCase("gpt2_4x64_fp32_transformers", "transformers", 4, 64, _SMALL, precision="fp32"),
    ModelCase("gpt2_8x1024", "gpt2", 8, 1024, _SMALL),
    ModelCase("resnet18_b256", "resnet18", 256, 224),
    ModelCase("resnet18_64px_b32_fp32", "vision", 32, 64, precision="fp32"),
    ModelCase("resnet18_64px_b32_amp", "vision", 32, 64, precision="amp"),
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
    has_gradients = True  # whether a backward pass leaves them

    def __init__(self, case: ModelCase, base: nn.Module, x: Tensor, scores: dict[str, Tensor]) -> None:
        self.case, self.x, self.model = case, x, copy.deepcopy(base)
        self.is_autocast = case.precision == "amp"
        self.labels = x.new_zeros(0)
        self.trained = self.prepare(scores)
        self.optimizer = self.make_optimizer()
        self.last_loss: Tensor | None = None

    def prepare(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError

    def make_optimizer(self) -> torch.optim.Optimizer:
        return fused_adamw(list(self.trained.values()))

    def task_loss(self) -> Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.is_autocast):
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


class LogitsOnly(nn.Module):
    """A language model of transformers as a function of tokens to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits


def hugging_face_twin(model: Any) -> nn.Module:
    """transformers' GPT2LMHeadModel with the weights of a LeanGPT2; its Conv1D weights are the transposes."""
    import transformers

    shape = model.shape
    config = transformers.GPT2Config(
        vocab_size=shape.vocabulary, n_positions=shape.context, n_embd=shape.width, n_layer=shape.layers,
        n_head=shape.heads, resid_pdrop=shape.dropout, embd_pdrop=shape.dropout, attn_pdrop=shape.dropout,
    )  # fmt: skip
    twin = transformers.GPT2LMHeadModel(config).eval()
    masked = set(shape.masked_names())
    state = {f"transformer.{n}": p.detach().t() if n in masked else p.detach() for n, p in model.named_parameters()}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert unexpected == [] and [name for name in missing if not name.endswith((".bias", "lm_head.weight"))] == []
    return twin


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
        self.is_autocast = True
        return super().prepare(scores)


class Unmasked(Trainer):
    """No mask: exactly the weights that the others mask are trained, in their own dtype."""

    name = "unmasked"
    is_masked = False

    def prepare(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.model.get_submodule(name).weight.requires_grad_() for name in scores}  # pyright: ignore


class NeuroSurgeon(Trainer):
    """NeuroSurgeon 0.1.0's ContSparse layers and ``calculate_l0()``, fused AdamW; in bf16 by autocast on fp32 weights,
    its way. A model of transformers is wrapped in its CircuitModel."""

    name = "neurosurgeon"

    def prepare(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        self.model.float()
        self.is_autocast = self.case.product_dtype == torch.bfloat16
        if isinstance(self.model, LogitsOnly):
            self.model.model = neurosurgeon_circuit(self.model.model, [n.removeprefix("model.") for n in scores], BETA)
            inside = {name: name.replace("model.", "model.wrapped_model.", 1) for name in scores}
            self.layers: dict[str, Any] = {name: self.model.get_submodule(inside[name]) for name in scores}
            for name, layer in self.layers.items():
                layer.weight_mask_params.data = scores[name].clone()
        else:
            self.layers = {}
            for name, value in scores.items():
                self.layers[name] = neurosurgeon_layer(self.model.get_submodule(name), value, BETA)
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, self.layers[name])
        return {name: layer.weight_mask_params for name, layer in self.layers.items()}

    def losses(self) -> tuple[Tensor, Tensor]:
        loss = self.task_loss()
        return loss, loss + LAM * torch.stack([layer.calculate_l0() for layer in self.layers.values()]).sum()


class Ours(Trainer):
    """``masks = mask_model(model); optimizer = masks.adamw(lr, lam=lam); masks.anneal(...)``, on a GPU with all
    effective weights made in one launch and, for convolutions, all score gradients in another. The schedule runs, from
    one beta to the same one, so that the others' masks stay comparable."""

    name = "ours"
    how: dict[str, Any] = {}  # noqa: RUF012  # of masks.adamw

    def prepare(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        from subnets import mask_model

        init = {f"{name}.weight": value for name, value in scores.items()}
        self.masks = mask_model(self.model, self.case.targets, init=init)
        self.masks.anneal(start=BETA, to=BETA, steps=1, on_device=self.masks.is_on_gpu)
        return {name.removesuffix(".scores"): value for name, value in self.masks.scores().items()}

    def make_optimizer(self) -> torch.optim.Optimizer:
        return masks_adamw(self.masks, LAM, **self.how)

    def backward(self) -> None:
        if not self.masks.is_on_gpu:
            return super().backward()
        self.masks.refresh()
        with self.masks.batch_score_gradients():
            super().backward()


class OursInBackward(Ours):
    """The same, its scores stepped in the backward pass."""

    name = "ours_in_backward"
    has_gradients = False
    how: dict[str, Any] = {"in_backward": True}  # noqa: RUF012


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
    c.name: c
    for c in (Eager, Compiled, Finetune, FinetuneAmp, Unmasked, NeuroSurgeon, Ours, OursInBackward, OursCompiled)
}


# --- checks ----------------------------------------------------------------------------------------------------------


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].detach().double().flatten() for name in sorted(tensors)])


def _cosine(a: Tensor, b: Tensor) -> float:
    return (torch.dot(a, b) / (a.norm() * b.norm()).clamp_min(1e-30)).item()


def gate_step(trainer: Trainer, eager: Trainer, scores: dict[str, Tensor]) -> float:
    """One step of both from the same scores, in multiples of what is allowed: the difference of the losses over
    LOSS_TOLERANCE, and by LEAST_COSINES 1 - cosine of the scores' gradients (of the loss without penalty) and of the
    first updates (with it). Without gradients to look at, the updates alone. A NaN is infinite."""
    losses, gradients, updates = [], [], []
    for each in (trainer, eager):
        each.set_scores(scores)
        each.optimizer = each.make_optimizer()
        for tensor in each.trained.values():
            tensor.grad = None
        if trainer.has_gradients:
            loss, _ = each.losses()
            loss.backward()
            gradients.append(_flat({name: t.grad for name, t in each.trained.items() if t.grad is not None}))
            del loss
        each.step()
        losses.append(each.last_loss.item())  # pyright: ignore[reportOptionalMemberAccess]
        updates.append(_flat(each.trained) - _flat(scores))
    precision = trainer.case.product_dtype
    least_gradient, least_update = LEAST_COSINES[precision, trainer.is_compiled]
    ratios = [abs(losses[0] - losses[1]) / (LOSS_TOLERANCE[precision] * abs(losses[1]))]
    ratios.append((1 - _cosine(*updates)) / (1 - least_update))
    if trainer.has_gradients:
        ratios.append((1 - _cosine(*gradients)) / (1 - least_gradient))
    return float("inf") if any(ratio != ratio for ratio in ratios) else max(ratios)


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
    generator = torch.Generator(x.device).manual_seed(1)
    scores = {}
    for name, module in base.named_modules():
        if isinstance(module, case.layer_type):
            weight: Any = module.weight
            values = torch.randn(weight.shape, generator=generator, device=x.device)
            scores[name] = torch.empty_like(weight, dtype=torch.float32).copy_(values)
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
                # forward W and s, backward W, s and ds, AdamW 28
                set_floor(row, ceilings, flops, num_weights * (2 * case.weight_dtype.itemsize + 40), case.product_dtype)
                count, unit = case.num_items()
                row.note = f"{count / (row.median_us or 1) * 1e6:.4g} {unit}/s, {num_weights} weights masked"
                rows.append(row)
            del functions
            free_memory(settings.device)
    return rows

