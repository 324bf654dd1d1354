"""Discovery: which weights of a trained network serve an objective."""

from .config import DiscoveryConfig
from .loop import Discovery, discover

__all__ = ["Discovery", "DiscoveryConfig", "discover"]
