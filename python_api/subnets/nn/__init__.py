"""Drop-in masked layers: the ordinary layer with a trained mask over its weight; masks over any other parameter."""

from .base import MaskedLayer
from .conv import MaskedConv2d
from .hf_conv1d import MaskedHFConv1D
from .linear import MaskedLinear
from .parameter import MaskedParameter

__all__ = ["MaskedConv2d", "MaskedHFConv1D", "MaskedLayer", "MaskedLinear", "MaskedParameter"]
