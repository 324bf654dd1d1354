"""Methods that find a subnetwork by training the weights: magnitude pruning and lottery-ticket sparse fine-tuning.

Those that train masks over frozen weights are `subnets.discover`'s.
"""

from .magnitude_pruning import PruningConfig, Tickets, iterative_magnitude_pruning
from .sparse_difference import Change, SparseDifference
from .sparse_finetuning import SparseFinetuning, lottery_ticket_sparse_finetuning

__all__ = [
    "Change",
    "PruningConfig",
    "SparseDifference",
    "SparseFinetuning",
    "Tickets",
    "iterative_magnitude_pruning",
    "lottery_ticket_sparse_finetuning",
]
