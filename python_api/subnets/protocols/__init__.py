"""What subnets of several functions say about a network: Break It Down, and Csordas et al.'s table and confusion.

    found = break_it_down(model, {"add": add, "mul": mul}, {"add": test_add, "mul": test_mul}, chance=0.01)
    found.table()                                       # accuracies with and without each subnet, deltas, Q, verdict
    function_accuracies(model, masks, tests).table()    # every function with every mask and its inverse
    confusion_row(predicted, {"add": sums, "mul": products})
    shared_weights(masks).table()                       # subnets.sharing: IoU, IoMin, shared parts

Pictures of all of these: ``subnets.report.protocols``.
"""

from ..sharing import Overlap, Sharing, shared_weights
from .accuracies import Accuracies, confusion_row, function_accuracies
from .break_it_down import BreakItDown, Subroutine, break_it_down, choose_by_quality
from .runs import over_runs, runs_table, sign_flip_p

__all__ = [
    "Accuracies",
    "BreakItDown",
    "Overlap",
    "Sharing",
    "Subroutine",
    "break_it_down",
    "choose_by_quality",
    "confusion_row",
    "function_accuracies",
    "over_runs",
    "runs_table",
    "shared_weights",
    "sign_flip_p",
]
