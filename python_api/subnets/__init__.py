"""Masked layers, discovery of subnetworks and their transfer to other networks.

    masks = mask_model(model); opt = masks.adamw(lr=1e-3, lam=1e-8); masks.anneal(to=200, steps=total)
    for batch in loader:
        task_loss(model, batch).backward(); opt.step(); opt.zero_grad()
    with masks.hard(): accuracy = evaluate(model)
    masks.subnet(task="ab mod 7").save("s1.safetensors", weights=model); masks.unmask()

or :func:`discover`, which is this loop with evaluation, checkpoints and history. The kernels are in ``subnet_kernels``.
"""

from . import metrics, objectives
from .capture import CapturedStep
from .discovery import Discoveries, Discovery, DiscoveryConfig, discover
from .evaluation import evaluate_subnet
from .masking import MaskSet, mask_model, masks_of
from .nn import MaskedConv2d, MaskedHFConv1D, MaskedLinear
from .readers import read_masks, read_neurosurgeon, read_neurosurgeon_scores
from .side_by_side import outputs_of
from .subnet import Subnet
from .transfer import release, transfer

__all__ = [
    "CapturedStep",
    "Discoveries",
    "Discovery",
    "DiscoveryConfig",
    "MaskSet",
    "MaskedConv2d",
    "MaskedHFConv1D",
    "MaskedLinear",
    "Subnet",
    "discover",
    "evaluate_subnet",
    "mask_model",
    "masks_of",
    "metrics",
    "objectives",
    "outputs_of",
    "read_masks",
    "read_neurosurgeon",
    "read_neurosurgeon_scores",
    "release",
    "transfer",
]
__version__ = "0.1.0"
