"""mask_model, and the MaskSet through which all masks of a model are seen and steered."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from subnet_kernels.backends.base import Backend, keeps_w_eff
from subnet_kernels.capturing import FOREIGN, capture_number, memory_number
from subnet_kernels.dispatch import choose_for
from subnet_kernels.masks import MOST_SAMPLES, MaskKind, as_kind, expand_scores
from subnet_kernels.ops.checks import check_beta_value
from subnet_kernels.ops.effective_weight import effective_weight, effective_weights_raw
from subnet_kernels.ops.sampled import choose_sampled
from subnet_kernels.optim import MaskAdamW
from subnet_kernels.shards import is_sharded, whole

from .audit import audit
from .distributed import (
    WholeTensors,
    check_not_wrapped,
    check_one_process,
    check_taken_up,
    take_up_shards,
    unwrapped,
)
from .nn import MaskedLayer, MaskedParameter
from .nn.base import MaskState, Schedule, Unit, new_state
from .nn.convert import check_can_revert, convert_in_place, revert_in_place
from .nn.parameter import mask_parameter, unmask_parameter
from .targets import Target, Targets, TargetsWithOptions, find_targets

if TYPE_CHECKING:
    from .subnet import Subnet

_MOST_UNDECIDED = 0.05  # of the masks, above which a subnet comes with a warning
ScoreInit = Callable[[str, Tensor], Tensor] | Mapping[str, Tensor]


def mask_model(
    model: nn.Module, targets: TargetsWithOptions | None = None, exclude: Targets = (), *,
    init: ScoreInit | None = None, score_init: float = -0.1, kind: str | MaskKind = "sigmoid", unit: Unit = "weight",
    fused: bool = True, keep_effective_weights: bool = True, seed: int = 0,
) -> MaskSet:
    """Put a mask over ``model``'s weights, in place, freeze everything but the scores, and return the MaskSet.

    Args:
        model: any nn.Module. Modules keep their identity, names, hooks and base state_dict keys; each masked linear
            layer and nn.Conv2d gains the parameter ``<layer>.scores``, any other masked parameter
            ``<parameter>_mask.scores``.
        targets: what to mask. None is every linear layer (nn.Linear, transformers' Conv1D, the projections of
            nn.MultiheadAttention) and convolution, but not the output head (``get_output_embeddings()``) and tied
            weights. Or "all-linear", "all-conv", "all-embedding"; a regex for whole module names, or, if it fits no
            such module, for whole parameter names; a module type; a list of these groups, types and names of modules or
            parameters, whole or their last parts ("c_attn", "W_Q", "bias"); or a dict from any of these (but lists) to
            options of their own (kind, unit, score_init, fused), the first that matches wins. A tied weight that is
            named has one mask for all its places. A group never means the output head or tied weights.
        exclude: of the same forms but dict; wins over targets. A module that is named is left out with its biases.
        init: initial scores by parameter name ("0.weight"): a mapping, or a function (name, weight) -> scores; where it
            has nothing (or is None), score_init holds.
        score_init: the initial score, finite. The default -0.1 is the paper's.
        kind: "sigmoid", or another kind of subnet_kernels.masks by name or as a MaskKind (``Gumbel(samples=4)``).
        unit: "weight", "row", "column", "head:H", or block sizes.
        fused: nn.Linear, nn.Conv2d and Conv1D mask within their forward pass, which is fastest. Code that reads
            ``layer.weight`` itself would get the base weight there (:meth:`MaskSet.audit` finds out). False: as for all
            other parameters, whoever reads it gets the masked weight. The output head, and layers whose weight the
            code of a class around them reads by name (``self.head.weight``; nn.TransformerEncoderLayer's fast path),
            are always masked so.
        keep_effective_weights: each layer keeps one effective weight, which all passes between two optimizer steps
            share. False, where memory matters more, keeps nothing of a weight's size: the Triton backend makes the mask
            inside its products, others make an effective weight for each product (plan "recompute").
        seed: of sampled kinds; equal seeds draw equal masks. Each optimizer step draws anew (see MaskSet.step).

    Returns:
        The MaskSet of the model; ``masks_of(model)`` gives it again at any time.

    Raises:
        ValueError: nothing matches; a target can't be masked; the model is masked already; a weight or initial score is
            not finite; a unit does not fit. The model is then unchanged.
        TypeError: an argument is of another form.

    Source: Savarese et al. 2020 (arXiv 1912.04427); Zhang et al. 2023 (arXiv 2310.10899).

    Example:
        >>> from torch import nn
        >>> masks = mask_model(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> list(masks.layers)
        ['0.weight', '2.weight']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"mask_model: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(score_init, (int, float)) or not math.isfinite(score_init):
        raise ValueError(f"mask_model: score_init must be finite, got {score_init!r}")
    if type(seed) is not int or not -(2**63) <= seed < 2**63:
        raise ValueError(f"mask_model: seed must be an int of 64 bits, got {seed!r}")
    if masked := [name for name, module in model.named_modules() if isinstance(module, MaskedLayer)]:
        raise ValueError(
            f"mask_model: the model is masked already (first masked layer: {masked[0] or 'the model itself'}); use "
            "masks_of(model), or masks_of(model).unmask() first"
        )
    check_not_wrapped(model)
    found = find_targets(model, targets, exclude, fused)
    _check_init(init, list(found))
    state = new_state(_device_of(next(iter(found.values()))), seed)
    state.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    converted: list[MaskedLayer] = []
    settings = {"kind": kind, "unit": unit, "score_init": score_init}
    try:
        for name, target in found.items():
            converted.append(_mask(name, target, init, settings, state))
    except Exception:
        for layer in converted:
            _unmask(layer)
        raise
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in converted:
        layer.scores.requires_grad_(True)
        layer.plan = None if keep_effective_weights and not layer.kind.is_sampled else "recompute"
    return masks_of(model)


def _device_of(target: Target) -> torch.device | None:
    parameter = target.module._parameters.get(target.parameter)
    return None if parameter is None else parameter.device


def _mask(
    name: str, target: Target, init: ScoreInit | None, settings: dict[str, Any], state: MaskState
) -> MaskedLayer:
    """Mask one parameter in place."""
    module, where = target.module, f"mask_model: {name.rpartition('.')[0] or 'the model'}"
    own = {key: value for key, value in target.options.items() if key != "fused"}
    settings = {**settings, **own, "state": state}
    if not as_kind(settings["kind"]).is_trainable:
        kind = as_kind(settings["kind"]).name
        raise ValueError(f"{where}: kind {kind!r} trains no scores; use 'sigmoid', and harden() later")
    if (weight := module._parameters.get(target.parameter)) is not None:  # else the conversion says what is there
        settings["score_init"] = _initial_scores(init, name, weight, settings["score_init"])
    try:
        if target.cls is not None:
            return convert_in_place(module, target.cls, where, **settings)
        return mask_parameter(module, target.parameter, where, target.sharers, **settings)
    except ValueError as error:  # of a setting, which knows the layer's class alone
        raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from None


def _unmask(layer: MaskedLayer) -> None:
    """Put the ordinary module back."""
    unmask_parameter(layer) if isinstance(layer, MaskedParameter) else revert_in_place(layer)


def _check_init(init: ScoreInit | None, names: list[str]) -> None:
    if init is None or callable(init):
        return
    if not isinstance(init, Mapping):
        raise TypeError(f"mask_model: init must be a mapping or a function (name, weight), got {type(init).__name__}")
    if unknown := sorted(set(init) - set(names)):
        raise ValueError(f"mask_model: init names {unknown}, which are not masked here; masked are {names}")


def _initial_scores(init: ScoreInit | None, name: str, weight: Tensor, score_init: float) -> float | Tensor:
    if init is None:
        return score_init
    scores = init(name, weight.detach()) if callable(init) else init.get(name)
    if scores is not None and not isinstance(scores, Tensor):
        raise TypeError(f"mask_model: init must give a tensor or None for {name}, got {type(scores).__name__}")
    return score_init if scores is None else scores


def masks_of(model: nn.Module) -> MaskSet:
    """The MaskSet of a masked model: one made by mask_model, its deep copy or unpickled self, or a net of masked layers
    built by hand (whose layers then share one beta).

    Args:
        model: any module with masked layers in it.

    Raises:
        ValueError: no masked layer; or hand-built layers that differ in beta or state.
    """
    model = unwrapped(model)
    layers = {m.weight_name(n): m for n, m in model.named_modules() if isinstance(m, MaskedLayer)}
    if not layers:
        raise ValueError("masks_of: the model has no masked layer; make it one with mask_model(model)")
    states = list({id(layer._state): layer._state for layer in layers.values()}.values())
    first = states[0]
    for other in states[1:]:
        if other.is_hard != first.is_hard or float(other.beta) != float(first.beta):
            raise ValueError(
                f"masks_of: the masked layers disagree: beta {float(first.beta)} and {float(other.beta)}, hard "
                f"{first.is_hard} and {other.is_hard}; set them alike first"
            )
    if len({layer._first_sample for layer in layers.values()}) < len(layers):  # else a part of a model keeps its draws
        for i, layer in enumerate(layers.values()):
            layer._first_sample = i * MOST_SAMPLES
    for layer in layers.values():
        layer._state = first
        layer._bind_scores()
    masks = MaskSet(model, layers, first)
    take_up_shards(masks)
    return masks


class MaskSet:
    """All masks of one model. It holds no state of its own: beta, schedule and hard/soft live with the layers, so that
    a copied or reloaded model brings them along.

    Attributes:
        model: the masked model.   layers: base weight's name ("0.weight") -> masked layer.
    """

    def __init__(self, model: nn.Module, layers: dict[str, Any], state: MaskState) -> None:
        self.model, self.layers, self._state = model, layers, state

    # --- beta and state --------------------------------------------------------------------------------------------

    @property
    def beta(self) -> float:
        """The inverse temperature of all masks; setting it checks it (finite, >= 0) and writes the shared tensor."""
        return float(self._state.beta)

    @beta.setter
    def beta(self, value: float) -> None:
        self._write_beta(check_beta_value("MaskSet.beta", float(value)))

    def _write_beta(self, value: float) -> None:
        with torch.no_grad():
            self._state.beta.fill_(value)
        self.invalidate()

    def anneal(
        self, start: float = 1.0, to: float = 200.0, *, steps: int, every: int = 1, on_device: bool = False
    ) -> None:
        """beta = start * (to/start)^(t/steps) after t optimizer steps, changed every ``every`` steps; ``to`` from step
        ``steps`` on. Sets beta to ``start`` now. An optimizer from :meth:`adamw` advances it; with another call
        :meth:`step` after ``optimizer.step()``.

        ``on_device`` counts the steps in a tensor beside beta, so that :meth:`step` is tensor operations alone and goes
        into a captured CUDA graph. The values are the same, to fp32 rounding.

        Raises:
            ValueError: start or to not finite and > 0, steps or every < 1.
        """
        for name, value in (("start", start), ("to", to)):
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"MaskSet.anneal: {name} must be finite and > 0, got {value}")
        if steps < 1 or every < 1:
            raise ValueError(f"MaskSet.anneal: steps and every must be >= 1, got {steps} and {every}")
        schedule = Schedule(float(start), float(to), int(steps), int(every))
        if on_device:
            schedule.to_device(self._state.beta.device)
        self._state.schedule = schedule
        self._write_beta(start)

    def step(self) -> None:
        """Advance the schedule, if there is one, by one optimizer step; sampled kinds draw anew from then on."""
        check_taken_up(self)
        self._state.key[1] += 1
        schedule = self._state.schedule
        if schedule is None:
            return
        if schedule.is_on_device:
            self._step_on_device(schedule)
            return
        before = schedule.beta()
        schedule.count += 1
        if (now := schedule.beta()) != before:
            self._write_beta(now)

    def _check_soft(self) -> None:
        if self._state.is_hard and all(layer.scores.grad is None for layer in self.layers.values()):
            raise RuntimeError(
                "MaskAdamW.step: the masks are hard and their scores have no gradient, so only penalty and decay would "
                "move them; train outside hard(), or call soften() first"
            )

    def _upcoming(self, beta: Tensor) -> Tensor:
        """What :meth:`step` will make of this beta."""
        schedule = self._state.schedule
        if schedule is None or beta is not self._state.beta:
            return beta
        value = replace(schedule, count=schedule.count + 1).beta()
        return value.to(beta.dtype) if isinstance(value, Tensor) else torch.full_like(beta, value)

    @torch.no_grad()
    def _step_on_device(self, schedule: Schedule) -> None:
        schedule.count += 1
        beta = self._state.beta.copy_(schedule.beta())
        is_captured = capture_number(beta) != 0
        for layer in self.layers.values():
            layer._slot.note_capture() if is_captured else layer._slot.clear()

    @property
    def is_on_gpu(self) -> bool:
        """Whether beta, and with it the masks, are on a CUDA device."""
        return self._state.beta.is_cuda

    @property
    def is_hard(self) -> bool:
        """Whether the masks in force are 1[s > 0]."""
        return self._state.is_hard

    def harden(self) -> None:
        """From now on the masks are 1[s > 0]; scores get no gradient. train() and eval() never change this."""
        self._state.is_hard = True
        self.invalidate()

    def soften(self) -> None:
        """From now on the masks are soft again."""
        self._state.is_hard = False
        self.invalidate()

    @contextlib.contextmanager
    def hard(self) -> Iterator[None]:
        """Hard masks inside the block; what was before, after it."""
        before = self._state.is_hard
        self.harden()
        try:
            yield
        finally:
            self._state.is_hard = before
            self.invalidate()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The unmasked model inside the block: the base output bit for bit."""
        before = self._state.is_disabled
        self._state.is_disabled = True
        try:
            yield
        finally:
            self._state.is_disabled = before

    # --- training ----------------------------------------------------------------------------------------------------

    def adamw(
        self, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, lam: float | Tensor = 0.0, in_backward: bool = False,
        moment_dtype: torch.dtype | None = None, capturable: bool = False,
    ) -> MaskAdamW:
        """The optimizer of all scores that require grad: AdamW, plus ``lam`` times the penalty's gradient, and after
        each step the schedule of :meth:`anneal` advances. Arguments as :class:`subnet_kernels.optim.MaskAdamW`."""
        take_up_shards(self)
        tied = {id(scores): scores for scores in self.scores().values() if scores.requires_grad}
        trained = list(tied.values())
        optimizer = MaskAdamW(
            trained, lr, betas, eps, weight_decay, lam=lam, in_backward=in_backward, moment_dtype=moment_dtype,
            capturable=capturable,
        )  # fmt: skip
        optimizer.before = None if in_backward else self._check_soft  # in backward the step is over by then
        optimizer.advance, optimizer.upcoming = self.step, self._upcoming
        return optimizer

    @contextlib.contextmanager
    def batch_score_gradients(self) -> Iterator[None]:
        """``with masks.batch_score_gradients(): loss.backward()``: the score gradients of all convolutions are made
        when the block ends, in one call (on a GPU one kernel), and added to ``scores.grad``. Until then the gradient of
        each layer's effective weight is kept. Hooks on scores and torch.autograd.grad do not see what is added; use it
        with ``.backward()`` alone.

        Raises:
            RuntimeError: entered twice, or in several processes.
        """
        check_one_process("batch_score_gradients", "DDP and FSDP see no gradient made so; use plain loss.backward()")
        pending = self._state.pending
        if pending.is_open:
            raise RuntimeError("batch_score_gradients: entered twice; one block may be open at a time")
        pending.is_open = True
        try:
            yield
            pending.finish()
        finally:
            pending.is_open = False
            pending.clear()

    def collect_penalty(self) -> PenaltyCollection:
        """``with masks.collect_penalty() as penalty: loss = task(model(x))``; ``(loss + lam*penalty()).backward()``.

        penalty() is the raw sum of the masks over all masked weights, 0-d: a layer that ran twice counts once, one that
        did not run is added from its scores. Call it once, before backward.

        Raises:
            RuntimeError: entered twice, inside disabled(), called twice, or a layer ran without grad inside it.
        """
        return PenaltyCollection(self)

    # --- what the masks say ------------------------------------------------------------------------------------------

    def scores(self) -> dict[str, nn.Parameter]:
        """Name ("0.scores") -> scores parameter."""
        return {layer.scores_name(name): layer.scores for name, layer in self.layers.items()}

    def kept(self) -> dict[str, Tensor]:
        """Name of the base weight -> bool tensor of its shape: {s > 0}, unless the kind says otherwise."""
        return {
            name: expand_scores(layer.kept(), tuple(layer.weight.shape)) for name, layer in self.layers.items()
        }

    @overload
    def density(self, per_layer: Literal[False] = False) -> float: ...
    @overload
    def density(self, per_layer: Literal[True]) -> dict[str, float]: ...
    def density(self, per_layer: bool = False) -> float | dict[str, float]:
        """The fraction of masked weights that are kept (s > 0); per layer, by the base weight's name, if asked."""
        kept = {name: int(layer.kept().sum()) * layer.weights_per_score for name, layer in self.layers.items()}
        sizes = {name: layer.weight.numel() for name, layer in self.layers.items()}
        if per_layer:
            return {name: kept[name] / max(sizes[name], 1) for name in kept}
        return sum(kept.values()) / max(sum(sizes.values()), 1)

    def undecided(self, margin: float = 0.01) -> float:
        """The fraction of masked weights whose soft mask (of a sampled kind, the probability to be kept) lies strictly
        between margin and 1 - margin."""
        if not 0 <= margin < 0.5:
            raise ValueError(f"MaskSet.undecided: margin must be in [0, .5), got {margin}")
        count = total = 0
        with torch.no_grad():
            for layer in self.layers.values():
                m = layer.kind.soft_value(whole(layer.scores), self._state.beta)
                count += int(((m > margin) & (m < 1 - margin)).sum()) * layer.weights_per_score
                total += layer.weight.numel()
        return count / max(total, 1)

    def check_finite(self) -> None:
        """Raises ValueError naming the layers whose scores have NaN or infinite entries."""
        bad = [name for name, scores in self.scores().items() if not bool(torch.isfinite(whole(scores.detach())).all())]
        if bad:
            raise ValueError(
                f"scores are not finite in {', '.join(bad)}; lower the rate or lam, and start from a checkpoint"
            )

    def subnet(self, *, ranks: bool = False, **provenance: Any) -> Subnet:
        """The subnet {s > 0} as masks by parameter name; ``provenance`` is stored with it (json values; base_model,
        architecture, beta and versions are filled in), and a hash of the base weights, so that it can't be planted from
        another network by mistake. ``ranks=True`` keeps a byte per kept weight, so that fractions can be planted."""
        from .provenance import provenance_of
        from .subnet import Subnet
        from .subnet_file import weights_hash

        self.check_finite()
        base_hash = weights_hash(WholeTensors({name: layer.weight.detach() for name, layer in self.layers.items()}))
        undecided = self.undecided()
        if undecided > _MOST_UNDECIDED and not self.is_hard:
            warnings.warn(
                f"MaskSet.subnet: {undecided:.0%} of the masks are undecided at beta {self.beta:g} (between .01 and "
                ".99), so the hard network is not the one that was trained; train on with masks.anneal(to=200, "
                "steps=...), or harden() first if the scores are meant as they are",
                stacklevel=2,
            )
        known = provenance_of(self.model, beta=self.beta) | {"undecided": round(undecided, 6)}
        subnet = Subnet(self.kept(), known | provenance, base_hash=base_hash)
        if not ranks:
            return subnet
        scores = {name: layer.kind.rank(layer.scores.detach()) for name, layer in self.layers.items()}
        return subnet.with_ranks(WholeTensors(scores))

    def print_trainable_parameters(self) -> None:
        """Print how many scores train, of how many parameters."""
        trained = sum(s.numel() for s in self.scores().values() if s.requires_grad)
        everything = sum(p.numel() for p in self.model.parameters())
        share = 100 * trained / max(everything, 1)
        print(f"trainable scores: {trained:,} || all parameters: {everything:,} || {share:.2f} %")

    def audit(self, *inputs: Any, **named_inputs: Any) -> list[dict[str, Any]]:
        """Prove, by running the model on these inputs, that no mask is bypassed and that only scores train.

        Runs the model in its present mode with gradients and in eval mode without (buffers, random state and modes are
        put back). A mask is bypassed where the output changes although every masked layer is given its effective
        weight and only the base weight underneath is changed: something reads it without its mask.

        Returns:
            Of every masked layer a dict: name, shape, unit, density, runs (how often its mask was used), has_effect
            (whether the output's gradient reaches its mask: False for a layer that these inputs do not need), backend.

        Raises:
            RuntimeError: naming the layers whose masks are bypassed, or other parameters than scores that train; or
                nothing can be told: no finite floating-point output, or another one from each run.
        """
        return audit(self, inputs, named_inputs)

    # --- effective weights -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self) -> None:
        """Make every effective weight that is stale now, all in one call per dtype (one launch on a GPU)."""
        groups: dict[tuple[Any, ...], list[MaskedLayer]] = {}
        is_rehearsal = memory_number(self._state.beta) != 0  # a capture's warm-up: runs what the capture will
        for layer in self.layers.values():
            if not keeps_w_eff(layer.plan) or (isinstance(layer, MaskedParameter) and layer._slot.w_eff is None):
                continue  # read through their mask, parameters need a kept one only where no gradient is wanted
            dtype = layer.weight.dtype if layer._slot.w_eff is None else layer._slot.w_eff.dtype
            fresh = layer._slot.is_fresh(*_outputs_first(layer), self._state.beta, layer.current_kind, dtype)
            if fresh and not is_rehearsal:
                continue
            backend = backend_of(layer, dtype)  # the layer's own, so that bits do not depend on who made them
            key = layer.current_kind, dtype, backend, layer.weight.dtype, layer.weight.device
            groups.setdefault(key, []).append(layer)
        for (kind, dtype, backend, _, _), layers in groups.items():
            triples = [_outputs_first(layer) for layer in layers]
            beta = self._state.beta
            pairs = [la._slot.buffers(w, dtype) for la, (w, _) in zip(layers, triples, strict=True)]
            for layer in layers:
                layer._slot.clear()
            if capture_number(beta) == FOREIGN:  # one call for all reads a table of addresses, copied from the host
                for (w, s), pair in zip(triples, pairs, strict=True):
                    backend.effective_weight(w, s, beta, kind, dtype, pair)
            else:
                weights, scores = [list(t) for t in zip(*triples, strict=True)]
                out = [w_eff for w_eff, _ in pairs]
                _, penalties = effective_weights_raw(weights, scores, beta, kind, dtype, out, backend)
                torch._foreach_copy_([p for _, p in pairs], list(penalties.unbind()))  # pyright: ignore
            for layer, (w, s) in zip(layers, triples, strict=True):
                layer._slot.mark_fresh(w, s, beta, kind, dtype)

    def invalidate(self) -> None:
        """Make every effective weight stale: the next use makes it again. Needed after writing scores or weights
        through ``.data``, which leaves no trace; everything else is noticed."""
        for layer in self.layers.values():
            layer._slot.clear()

    @torch.no_grad()
    def check_fresh(self) -> None:
        """Prove that the next forward pass uses the effective weights of the present scores, weights and beta.

        Raises:
            RuntimeError: naming the layers that hold a stale one, and what to do.
        """
        stale = []
        for name, layer in self.layers.items():
            if (kept := layer._slot.w_eff) is None:
                continue
            weight, scores = _outputs_first(layer)
            backend = backend_of(layer, kept.dtype)
            if not layer._slot.is_exact(weight, scores, self._state.beta, layer.current_kind, kept.dtype, backend):
                stale.append(name)
        if stale:
            raise RuntimeError(
                f"check_fresh: stale effective weights in {', '.join(stale)}: scores, weights or beta were changed "
                "behind torch's version counters (through .data?); call MaskSet.invalidate() after such a change"
            )

    # --- leaving and saving ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def unmask(self, keep: str = "base") -> nn.Module:
        """Put ordinary layers and the parameters' requires_grad flags back, in place, and return the model.

        Args:
            keep: "base" leaves the base weights; "masked" multiplies them by the hard mask first.
        """
        if keep not in ("base", "masked"):
            raise ValueError(f"MaskSet.unmask: keep must be 'base' or 'masked', got {keep!r}")
        for name, layer in self.layers.items():
            if not isinstance(layer, MaskedLayer):
                raise ValueError(f"MaskSet.unmask: {name} is masked no more; get the present set with masks_of(model)")
            if not isinstance(layer, MaskedParameter):
                check_can_revert(layer, name)
            if is_sharded(layer.scores):
                raise ValueError(
                    f"MaskSet.unmask: {name} is sharded (FSDP), which can't be undone in place; take masks.subnet() on "
                    "every rank and apply it to a model of its own"
                )
        flag_of = self._flags_before_masking()
        kept = self.kept() if keep == "masked" else {}
        for name, layer in self.layers.items():
            if keep == "masked":
                layer.weight.mul_(kept[name].to(layer.weight.dtype))
            _unmask(layer)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(flag_of.get(name, parameter.requires_grad))
        self.layers = {}
        return self.model

    def _flags_before_masking(self) -> dict[str, bool]:
        """requires_grad by present name; mask_model may have seen another part of the model, and so other names."""
        flags = self._state.requires_grad
        some_layer = next(iter(self.layers), "")
        for known in flags:
            if some_layer == known or some_layer.endswith("." + known):  # a part was masked, this is the whole
                prefix = some_layer.removesuffix(known)
                return {prefix + name: flag for name, flag in flags.items()}
            if known.endswith("." + some_layer):  # the whole was masked, this is a part
                prefix = known.removesuffix(some_layer)
                return {n.removeprefix(prefix): flag for n, flag in flags.items() if n.startswith(prefix)}
        return {}

    def state_dict(self) -> dict[str, Any]:
        """beta, hard/soft, the schedule and the key of sampled kinds, as plain values (scores are in the model's own
        state_dict)."""
        schedule = self._state.schedule
        return {
            "beta": self.beta,
            "is_hard": self.is_hard,
            "schedule": None if schedule is None else schedule.values(),
            "key": self._state.key.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        Raises:
            ValueError: an entry is missing (but "key") or beta is not finite and >= 0; nothing is changed then.
        """
        if missing := {"beta", "is_hard", "schedule"} - set(state):
            raise ValueError(f"MaskSet.load_state_dict: misses {sorted(missing)}")
        beta = check_beta_value("MaskSet.load_state_dict", float(state["beta"]))
        schedule = None if state["schedule"] is None else _read_schedule(state["schedule"], self._state.beta.device)
        key = _read_key(state.get("key", self._state.key.tolist()))
        self._state.is_hard = bool(state["is_hard"])
        self._state.key.copy_(key)
        now = self._state.schedule
        if schedule is not None and now is not None:
            before, count = now.count, schedule.count
            if isinstance(before, Tensor) and isinstance(count, Tensor):
                schedule.count = before.copy_(count)  # the tensor that a captured graph counts in
        self._state.schedule = schedule
        self._write_beta(beta)

    def __repr__(self) -> str:
        state = "hard" if self.is_hard else f"beta {self.beta:g}"
        if any(is_sharded(scores) for scores in self.scores().values()):
            return f"MaskSet({len(self.layers)} layers, {state}, sharded)"  # density() waits for all ranks
        return f"MaskSet({len(self.layers)} layers, {state}, density {self.density():.3f})"


class PenaltyCollection:
    """What :meth:`MaskSet.collect_penalty` returns: a context, and the function ``penalty()``. A class, because a
    generator's context costs more than a small layer's mask."""

    __slots__ = ("_collected", "_is_used", "_masks")

    def __init__(self, masks: MaskSet) -> None:
        self._masks, self._is_used = masks, False
        self._collected: dict[int, Tensor] = {}

    def __enter__(self) -> PenaltyCollection:
        state = self._masks._state
        if state.penalties is not None:
            raise RuntimeError("collect_penalty: entered twice; one block may be open at a time")
        if state.is_disabled:
            raise RuntimeError("collect_penalty: inside disabled() there is no penalty; leave disabled() first")
        state.penalties = self._collected
        return self

    def __exit__(self, *exception: Any) -> None:
        self._masks._state.penalties = None

    def __call__(self) -> Tensor:
        if self._is_used:
            raise RuntimeError("collect_penalty: penalty() was called twice; call it once per block, before backward")
        self._is_used = True
        collected = self._collected
        terms = []
        for layer in self._masks.layers.values():
            term = collected.get(layer._slot.number)
            terms.append(_penalty_of(layer) if term is None else term)
        collected.clear()
        if len(terms) == 1:
            return terms[0]
        return torch.stack([term.to(terms[0].dtype) for term in terms]).sum()


def _read_key(key: Any) -> Tensor:
    is_good = isinstance(key, (list, tuple)) and len(key) == 2
    if not is_good or not all(type(part) is int and -(2**63) <= part < 2**63 for part in key):
        raise ValueError(f"MaskSet.load_state_dict: key must be [seed, step], two ints of 64 bits, got {key!r}")
    return torch.tensor(key, dtype=torch.int64)


def _read_schedule(values: Mapping[str, Any], device: torch.device) -> Schedule:
    values = dict(values)
    on_device = bool(values.pop("on_device", False))
    try:
        schedule = Schedule(**values)
        is_good = min(schedule.start, schedule.to) > 0 and min(schedule.steps, schedule.every) >= 1
    except TypeError as error:
        raise ValueError(f"MaskSet.load_state_dict: schedule does not fit: {error}") from None
    if not is_good or schedule.count < 0:
        raise ValueError(f"MaskSet.load_state_dict: schedule needs start, to > 0 and steps, every >= 1, got {values}")
    if on_device:
        schedule.to_device(device)
    return schedule


def _outputs_first(layer: MaskedLayer) -> tuple[Tensor, Tensor]:
    """(weight, scores) as the op gets them: [N, K] also for transformers' transposed Conv1D."""
    if layer.passes_transposed:
        return layer.weight.t(), layer.scores.t()
    return layer.weight, layer.scores


def backend_of(layer: MaskedLayer, dtype: torch.dtype) -> Backend:
    """The backend that serves a layer's forward pass in that dtype; of sampled masks the one that draws."""
    kind = layer.current_kind
    if kind.is_sampled:
        return choose_sampled(layer.weight, layer.scores, kind.name, dtype, None)
    return choose_for(layer.op, layer.weight, layer.scores, kind.name, dtype, layer.plan)


def _penalty_of(layer: MaskedLayer) -> Tensor:
    """The penalty of a layer from its scores alone, with gradient."""
    if is_sharded(layer.scores):
        raise RuntimeError(
            "collect_penalty: a sharded layer (FSDP) did not run inside it, and its scores are not gathered now; use "
            "masks.adamw(lam=...), which needs no penalty in the loss"
        )
    return effective_weight(layer.weight, layer.scores, layer.beta, kind=layer.current_kind)[1]
