"""What the results of the vision experiment say: spreads, the verdict, failure signatures, published numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from subnets.report.curves import OVER_REPLICATES, OVER_TRANSFER, Spread, values_of_kind

MEASURE_TITLES = {
    "natural": "accuracy, natural",
    "mean_pooled": "accuracy, mean-pooled",
    "shape_bias": "shape bias",
    "shape_decisions": "shape decisions",
    "texture_decisions": "texture decisions",
}
"""Measure -> its name in tables. Accuracies are class-averaged, decisions fractions of the images whose cues differ."""

BASELINES = ("random_init", "sampled")  # what the claim compares the subnet with
LEAST_RUNS = 3  # fewer have no spread to judge by

CHANCE = 1 / 16
BASE_LEARNED = 0.5  # below this there is no function to find a subnet of
FEW_DECISIONS = 4 * CHANCE  # guessing decides 2 / 16 of conflict images by one of their cues
ALL_OR_NOTHING = 0.001  # a subnet with fewer weights, or all but so few, selects nothing

# Geirhos et al., "ImageNet-trained CNNs are biased towards texture" (ICLR 2019), on its 1,200 cue-conflict images
PUBLISHED_SHAPE_BIAS = {"people": 0.959, "AlexNet": 0.429, "GoogLeNet": 0.312, "ResNet-50": 0.221, "VGG-16": 0.172}

# (architecture, condition) -> accuracy on ordinary and on mean-pooled images: training curves of arXiv 2310.10899, on
# 1,549 images of 16 classes
PUBLISHED_ACCURACY = {
    ("resnet18", "subnet"): (0.832, 0.507),
    ("resnet18", "random_init"): (0.719, 0.250),
    ("vit", "subnet"): (0.862, 0.666),
    ("vit", "random_init"): (0.650, 0.241),
}
PUBLISHED_GAIN = 0.188  # ResNet-18 on mean-pooled ImageNet, in the paper's summary; its curves say .507 - .250


@dataclass
class VisionResults:
    """Everything the report says about one run; of a run that is not finished, what is there.

    Args:
        rows: of results.csv, one per transfer run: condition, num_images, seed, base_seed, the measures, ...
        bases, discoveries: base seed -> facts of the base network and of its subnet.
        seconds: stage -> how long it took.
        real: evaluations on real cue-conflict images, one row per network; None if there were none.
        planned: number of transfer runs of the whole config; 0: just those that there are.

    Raises:
        ValueError: rows of several architectures.
    """

    rows: Sequence[Mapping[str, Any]]
    bases: Mapping[int, Mapping[str, Any]]
    discoveries: Mapping[int, Mapping[str, Any]]
    seconds: Mapping[str, float] = field(default_factory=dict)
    real: Sequence[Mapping[str, Any]] | None = None
    planned: int = 0

    def __post_init__(self) -> None:
        architectures = sorted({str(row["architecture"]) for row in self.rows})
        if len(architectures) > 1:
            raise ValueError(f"VisionResults: rows must be of one architecture, got {', '.join(architectures)}")

    @property
    def kind(self) -> str:
        """The kind of spread that means and comparisons are made of."""
        seeds = {*self.bases, *self.discoveries, *(row["base_seed"] for row in self.rows)}
        return OVER_REPLICATES if any(seeds) else OVER_TRANSFER

    def conditions(self) -> list[str]:
        """Conditions with results, in the order of their first rows."""
        return list(dict.fromkeys(row["condition"] for row in self.rows))

    def sizes(self) -> list[int]:
        """Numbers of training images with results, rising."""
        return sorted({row["num_images"] for row in self.rows})

    def values(self, condition: str, size: int, measure: str, kind: str | None = None) -> list[float]:
        """One number per run that has the measure: a shape bias without decisions is none."""
        runs = {
            (row["base_seed"], row["seed"]): row[measure]
            for row in self.rows
            if row["condition"] == condition and row["num_images"] == size
        }
        return numbers(values_of_kind(runs, kind or self.kind))

    def spread(self, condition: str, size: int, measure: str, kind: str | None = None) -> Spread | None:
        """Mean and spread of one kind, `self.kind` by default; None where no run has the measure."""
        return spread_of(self.values(condition, size, measure, kind))

    def curve(self, condition: str, measure: str) -> dict[int, float]:
        """Number of training images -> mean."""
        spreads = {size: self.spread(condition, size, measure) for size in self.sizes()}
        return {size: spread.mean for size, spread in spreads.items() if spread}

    def beats(self, condition: str, baseline: str, size: int, measure: str) -> bool | None:
        """Is the condition's mean above the baseline's by more than the larger population std? None where either has
        fewer than LEAST_RUNS runs with the measure."""
        ours, theirs = self.spread(condition, size, measure), self.spread(baseline, size, measure)
        if ours is None or theirs is None or min(ours.count, theirs.count) < LEAST_RUNS:
            return None
        return ours.is_above(theirs)

    def missing(self) -> int:
        """How many transfer runs are not done."""
        return max(self.planned - len(self.rows), 0)


@dataclass(frozen=True)
class Check:
    """One part of the claim, in words; `holds` is None where it can't be judged."""

    measure: str
    text: str
    holds: bool | None


def checks(results: VisionResults, size: int) -> list[Check]:
    """The claim at one size, part by part: the subnet's shape bias is above each baseline's by more than the spread,
    and its natural accuracy is no lower (its mean at least the baseline's)."""
    return [_check(results, size, measure, baseline) for measure in ("shape_bias", "natural") for baseline in BASELINES]


def _check(results: VisionResults, size: int, measure: str, baseline: str) -> Check:
    name = {"shape_bias": "shape bias", "natural": "natural accuracy"}[measure]
    ours, theirs = (results.spread(condition, size, measure) for condition in ("subnet", baseline))
    is_above = results.beats("subnet", baseline, size, measure)
    if ours is None or theirs is None or is_above is None:
        runs = ", ".join(f"{one}: {s.count if s else 0}" for one, s in (("subnet", ours), (baseline, theirs)))
        return Check(measure, f"{name} against {baseline} (runs that have one: {runs}; {LEAST_RUNS} needed)", None)
    values = f"({ours} against {theirs})"
    if measure == "shape_bias":
        return Check(measure, f"{name} above {baseline}'s by more than the spread {values}", is_above)
    if ours.mean >= theirs.mean:
        return Check(measure, f"{name} no lower than {baseline}'s {values}", True)
    by = "more than" if theirs.is_above(ours) else "no more than"
    return Check(measure, f"{name} no lower than {baseline}'s {values}: it is lower, by {by} the spread", False)


def is_shown(results: VisionResults) -> bool:
    """Does every part of the claim hold at the largest size, with no run missing?"""
    sizes = results.sizes()
    return bool(sizes) and not results.missing() and all(check.holds for check in checks(results, sizes[-1]))


def verdict(results: VisionResults) -> str:
    """The first line of the report: which parts of the claim hold at the largest size and which do not."""
    missing = results.missing()
    unfinished = f" NOT FINISHED: {missing:,} of {results.planned:,} transfer runs missing." if missing else ""
    if not results.rows:
        return f"Nothing to judge yet.{unfinished}"
    size = results.sizes()[-1]
    found = checks(results, size)
    if any(check.holds is None for check in found):
        word = "CAN'T BE JUDGED"
    elif all(check.holds for check in found):
        word = "HOLDS"
    else:
        gains = [check.holds for check in found if check.measure == "shape_bias"]
        word = "HOLDS IN PART" if any(gains) else "DOES NOT HOLD"
    labels = {True: "Holds", False: "Does not hold", None: "Can't be judged"}
    texts = {label: "; ".join(c.text for c in found if c.holds is value) for value, label in labels.items()}
    parts = " ".join(f"{label}: {text}." for label, text in texts.items() if text)
    trained = f"Trained on {size:,} images (mean ± std over {results.kind})"
    return f"{trained}, the claim for the shape subnet {word}. {parts}{unfinished}"


def failure_signatures(results: VisionResults) -> list[str]:
    """The signs that the method or the measurement did not work, in words; empty if none holds."""
    found = []
    for r, base in sorted(results.bases.items()):
        if base["natural"] < BASE_LEARNED:
            accuracy = f"accuracy {base['natural']:.3f}, below {BASE_LEARNED}"
            found.append(f"base network {r} has not learned natural images ({accuracy})")
    for r, discovery in sorted(results.discoveries.items()):
        table = discovery["table"]
        subnet = table["subnet"]
        if not ALL_OR_NOTHING <= discovery["density"] <= 1 - ALL_OR_NOTHING:
            found.append(
                f"the subnet of base network {r} keeps {discovery['density']:.2%} of the weights: it selects nothing"
            )
        for other, words in (("full_model", "the whole network"), ("complement", "its complement")):
            if other in table and subnet["mean_pooled"] <= table[other]["mean_pooled"]:
                found.append(
                    f"the subnet of base network {r} is no better on mean-pooled images than {words} "
                    f"({subnet['mean_pooled']:.3f} against {table[other]['mean_pooled']:.3f})"
                )
        biases = numbers([subnet["shape_bias"], table["full_model"]["shape_bias"]])
        if len(biases) == 2 and biases[0] <= biases[1]:
            found.append(
                f"the subnet of base network {r} prefers shape no more than the whole network "
                f"({biases[0]:.3f} against {biases[1]:.3f})"
            )
    compared = {size: results.beats("subnet", "random_init", size, "shape_bias") for size in results.sizes()}
    judged = [above for above in compared.values() if above is not None]
    if judged and not any(judged):
        found.append("the shape bias of subnet is above random_init's at no number of images, within the spread")
    size = max(results.sizes(), default=0)
    decided = {
        condition: [results.spread(condition, size, measure) for measure in ("shape_decisions", "texture_decisions")]
        for condition in results.conditions()
    }
    sums = {condition: sum(s.mean for s in spreads if s) for condition, spreads in decided.items() if all(spreads)}
    few = [f"{condition} {value:.3f}" for condition, value in sums.items() if value < FEW_DECISIONS]
    if few:
        found.append(
            f"few cue-conflict images are decided by one of their cues (guessing: {2 * CHANCE}), so these shape biases "
            f"say little: {', '.join(few)}"
        )
    return found


def numbers(values: Iterable[float | None]) -> list[float]:
    """The values that are numbers: without None and nan."""
    return [float(value) for value in values if value is not None and not math.isnan(value)]


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """The spread of those that are numbers; None if none is."""
    found = numbers(values)
    return Spread.of(found) if found else None


def stages(names: Iterable[str]) -> dict[str, list[str]]:
    """The network's stage ("embedding", "stage 0" or "layer 0", ..., "head") -> its parameters among `names`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_stage(name), []).append(name)
    return groups


def _stage(name: str) -> str:
    block = re.search(r"\b(stage|layer)s?\.(\d+)\.", name)
    if block:
        return f"{block[1]} {block[2]}"
    return "embedding" if "embed" in name else "head" if "classifier" in name else "other"
