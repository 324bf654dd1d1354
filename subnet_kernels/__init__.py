"""Fused kernels for training masks over the weights of neural networks: functions of tensors, without state.

``w_eff = weight * sigmoid(beta * scores)`` in linear and convolution layers, forward and backward, with the L1 penalty
of the mask and its gradient as by-products. The layers, loops and files built on them are in the package ``subnets``.
"""

from . import optim
from .dispatch import BackendRefused, use_backend
from .explain import explain
from .masks import Bernoulli, Gumbel, HardConcrete, MaskKind, Threshold, TopK
from .ops.effective_weight import effective_weight, effective_weights
from .ops.mask import mask
from .ops.masked_conv import masked_conv2d
from .ops.masked_linear import masked_linear
from .ops.packed import packed_linear
from .packing import pack_mask, unpack_mask
from .random import random_bits
from .slots import Slot

__all__ = [
    "BackendRefused",
    "Bernoulli",
    "Gumbel",
    "HardConcrete",
    "MaskKind",
    "Slot",
    "Threshold",
    "TopK",
    "effective_weight",
    "effective_weights",
    "explain",
    "mask",
    "masked_conv2d",
    "masked_linear",
    "optim",
    "pack_mask",
    "packed_linear",
    "random_bits",
    "unpack_mask",
    "use_backend",
]
__version__ = "0.1.0"
