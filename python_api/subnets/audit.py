"""MaskSet.audit: does every mask count, and does only it?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from subnet_kernels.shards import is_sharded

from .nn import MaskedParameter
from .subnet_file import listed

if TYPE_CHECKING:
    from .masking import MaskSet

Run = Callable[[], list[Tensor]]


def audit(masks: MaskSet, inputs: tuple[Any, ...], named_inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """See :meth:`subnets.MaskSet.audit`."""
    from .masking import backend_of

    model = masks.model
    if any(is_sharded(scores) for scores in masks.scores().values()):
        raise RuntimeError("MaskSet.audit: the model is sharded (FSDP); audit it before fully_shard")

    def run() -> list[Tensor]:
        outputs = [leaf for leaf in tree_leaves(model(*inputs, **named_inputs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in outputs if leaf.is_floating_point()]
        if not any(bool(torch.isfinite(leaf).any()) for leaf in outputs):
            raise RuntimeError(
                "MaskSet.audit: there is no finite floating-point tensor in the model's output (a tensor, or tensors "
                "in tuples, lists, dicts or outputs of transformers), so nothing can be told from it; give inputs or "
                "flags with which it returns its logits or loss"
            )
        return outputs

    if masks._state.is_disabled or masks._state.penalties is not None or torch.is_inference_mode_enabled():
        raise RuntimeError(
            "MaskSet.audit: inside disabled(), collect_penalty() or inference_mode() it can't tell; call it outside"
        )
    known = {id(scores) for scores in masks.scores().values()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if others:
        raise RuntimeError(
            f"MaskSet.audit: only scores should train, but {listed(others)} require grad too; "
            "set requires_grad_(False) for the audit"
        )
    with _restored(model):
        runs = _count_runs(masks, run)
        effects = _effects(masks, run)
        bypassed = _bypassed(masks, run)
        model.eval()
        with torch.no_grad():
            bypassed += [name for name in _bypassed(masks, run) if name not in bypassed]
    if bypassed:
        are_read = all(isinstance(masks.layers[name], MaskedParameter) for name in bypassed)
        cure = (
            "something takes it from parameters(), state_dict() or _parameters; let it read the module's attribute"
            if are_read
            else "something reads layer.weight itself; mask_model(..., fused=False) masks every read"
        )
        verb = "is" if len(bypassed) == 1 else "are"
        raise RuntimeError(
            f"MaskSet.audit: masks are bypassed: {listed(bypassed)} {verb} read without the mask ({cure})"
        )
    densities = masks.density(per_layer=True)
    return [
        {"name": name, "shape": list(layer.weight.shape), "unit": layer.unit, "density": densities[name],
         "runs": runs[name], "has_effect": effects[name], "backend": backend_of(layer, layer.weight.dtype).name}
        for name, layer in masks.layers.items()
    ]  # fmt: skip


def _count_runs(masks: MaskSet, run: Run) -> dict[str, int]:
    """How often each layer's forward pass (for parameters: a read) happens in one run."""
    runs = dict.fromkeys(masks.layers, 0)

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            runs[name] += 1

        return hook

    handles = [layer.register_forward_hook(count(name)) for name, layer in masks.layers.items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return runs


def _effects(masks: MaskSet, run: Run) -> dict[str, bool]:
    """Whether the gradient of the outputs reaches each layer's effective weight."""
    with torch.enable_grad(), _served(masks) as w_effs:
        outputs = [out for out in run() if out.requires_grad]
        leaves = list(w_effs.values())
        if not outputs:
            return dict.fromkeys(w_effs, False)
        torch.manual_seed(0)  # an even sum may be constant, as that of a softmax is
        weighted = torch.stack([(out * torch.randn_like(out)).float().sum() for out in outputs]).sum()
        grads = torch.autograd.grad(weighted, leaves, allow_unused=True)
    return {
        name: grad is not None and bool(grad.ne(0).any()) for name, grad in zip(w_effs, grads, strict=True)
    }  # fmt: skip


def _bypassed(masks: MaskSet, run: Run) -> list[str]:
    """The layers whose base weight reaches the outputs although all are given their effective weights."""
    layers = masks.layers

    def differs(names: list[str]) -> bool:
        with _served(masks):
            before, again = _seeded(run), _seeded(run)
            with _changed([layers[name].weight for name in names]):
                after = _seeded(run)
        noise = _distance(before, again)  # 0 but for kernels that add up in no fixed order
        if noise > 1e-2 * max(float(out.nan_to_num(0.0, 0.0, 0.0).abs().max()) for out in before if out.numel()):
            raise RuntimeError(
                "MaskSet.audit: two runs on the same inputs and torch seed differ (random numbers of Python or numpy? "
                "state that a run changes?), so nothing can be told from it; call model.eval() or fix that seed first"
            )
        return _distance(before, after) > 10 * noise

    if not differs(list(layers)):
        return []
    return [name for name in layers if differs([name])]


def _seeded(run: Run) -> list[Tensor]:
    torch.manual_seed(0)
    return [out.detach().double() for out in run()]


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    finite = [torch.nan_to_num(x - y, nan=0.0, posinf=1e30, neginf=1e30).abs() for x, y in zip(a, b, strict=True)]
    return max((float(x.max()) for x in finite if x.numel()), default=0.0)


@contextlib.contextmanager
def _served(masks: MaskSet) -> Iterator[dict[str, Tensor]]:
    """All layers use fixed effective weights, leaves: about half of each base weight, whatever the masks."""
    w_effs = {name: (layer.weight.detach() * 0.5).requires_grad_() for name, layer in masks.layers.items()}
    with contextlib.ExitStack() as stack:
        for name, layer in masks.layers.items():
            stack.enter_context(layer.serve(layer.scores, w_effs[name], layer.scores.new_zeros(())))
        yield w_effs


@contextlib.contextmanager
def _changed(weights: list[nn.Parameter]) -> Iterator[None]:
    """Other values in these weights inside the block."""
    saved = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(-0.75).add_(weight.abs().mean())
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, saved, strict=True):
                weight.copy_(old)


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Buffers, random state and modes are afterwards as before."""
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in modes for name, buffer in module._buffers.items() if buffer is not None
    ]  # fmt: skip
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for module, name, buffer, old in buffers:
                module._buffers[name] = buffer  # a forward pass may have put another there
                buffer.copy_(old)
