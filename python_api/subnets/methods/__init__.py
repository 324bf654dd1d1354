"""Methods that find a subnetwork by training the weights: magnitude pruning and lottery-ticket sparse fine-tuning.

Those that train masks over frozen weights are `subnets.discover`'s.
"""

from .magnitude_pruning import PruningConfig, Tickets, iterative_magnitude_pruning

__all__ = ["PruningConfig", "Tickets", "iterative_magnitude_pruning"]
