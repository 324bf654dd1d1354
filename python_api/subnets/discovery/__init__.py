"""Discovery: which weights of a trained network serve an objective."""

from .config import SGD, DiscoveryConfig
from .discoveries import Discoveries
from .loop import discover
from .presets import (
    METHODS,
    ContinuousSparsification,
    Csordas,
    EdgePopup,
    HardConcreteGates,
    LearnedSupermask,
    Lepori,
    Method,
    Piggyback,
)
from .record import Discovery

__all__ = [
    "METHODS",
    "SGD",
    "ContinuousSparsification",
    "Csordas",
    "Discoveries",
    "Discovery",
    "DiscoveryConfig",
    "EdgePopup",
    "HardConcreteGates",
    "LearnedSupermask",
    "Lepori",
    "Method",
    "Piggyback",
    "discover",
]
