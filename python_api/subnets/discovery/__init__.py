"""Discovery: which weights of a trained network serve an objective."""

from .config import DiscoveryConfig
from .discoveries import Discoveries
from .loop import discover
from .record import Discovery

__all__ = ["Discoveries", "Discovery", "DiscoveryConfig", "discover"]
