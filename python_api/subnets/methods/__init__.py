"""Methods that find a subnetwork.

Those that train the weights, or read masks off a trained network, are functions here; those that train masks over
frozen weights are for ``subnets.discover(method=...)``, by name or as an object of one of these classes.
"""

from ..discovery.presets import METHODS as METHODS  # a dict: no entry of __all__, which the API reference lists
from ..discovery.presets import (
    ContinuousSparsification,
    Csordas,
    EdgePopup,
    HardConcreteGates,
    LearnedSupermask,
    Lepori,
    Method,
    Piggyback,
)
from .magnitude_pruning import PruningConfig, Tickets, iterative_magnitude_pruning
from .sparse_difference import Change, SparseDifference
from .sparse_finetuning import SparseFinetuning, lottery_ticket_sparse_finetuning
from .supermasks import signed_constant_, supermask
from .ticket_search import Ticket, ticket_search

__all__ = [
    "Change",
    "ContinuousSparsification",
    "Csordas",
    "EdgePopup",
    "HardConcreteGates",
    "LearnedSupermask",
    "Lepori",
    "Method",
    "Piggyback",
    "PruningConfig",
    "SparseDifference",
    "SparseFinetuning",
    "Ticket",
    "Tickets",
    "iterative_magnitude_pruning",
    "lottery_ticket_sparse_finetuning",
    "signed_constant_",
    "supermask",
    "ticket_search",
]
