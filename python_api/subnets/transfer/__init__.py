"""Planting a subnet in another network: `transfer`, and `release` to let it train freely again."""

from .planting import release, transfer

__all__ = ["release", "transfer"]
