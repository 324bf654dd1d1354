"""What the parts of the experiment have in common: units of work with a file each, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from subnets.experiments.digits.config import DigitsConfig
from subnets.report.page import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Facts = dict[str, Any]
Units = Mapping[str, Callable[[], Facts]]  # name, which is its file's, to what makes its facts


@dataclass(frozen=True)
class Summary:
    """What one part found.

    Attributes:
        is_as_expected: whether the claim holds here.
        verdict: the same in a sentence, with numbers.
        table: the results.
        rows: of the CSV file; all have the same keys.
        figure: the picture, if there is one.
    """

    is_as_expected: bool
    verdict: str
    table: Table
    rows: Sequence[Mapping[str, Any]]
    figure: Figure | None = None


@dataclass(frozen=True)
class Part:
    """A part of the experiment: its units of work, and the summary of their facts (by unit's name)."""

    units: Callable[[DigitsConfig], Units]
    summary: Callable[[DigitsConfig, Mapping[str, Facts]], Summary]
