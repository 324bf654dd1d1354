"""Our curves beside the published ones: how far apart they are, and what is known of the reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from subnets.experiments.arithmetic.config import CONDITIONS, PRESETS, ArithmeticConfig
from subnets.experiments.arithmetic.results import Curve, DepthResults, published_curve
from subnets.report.curves import Difference, mean_curve
from subnets.report.page import Table

PUBLISHED_DEPTHS = (2, 4, 6, 8, 10, 12)
_NO_RECIPE = {  # keys that choose what is run, and where, but do not change a curve
    "preset", "layers", "seed", "conditions", "sizes", "base_seeds", "transfer_seeds", "transfer_seeds_at",
    "subnet_controls", "device", "stack",
}  # fmt: skip


def mean_over_depths(depths: Sequence[DepthResults], condition: str) -> Curve:
    """Our mean over depths at the sizes that all of them have; depths without this condition are left out."""
    return mean_curve([curve for depth in depths if (curve := depth.curve(condition))])


def published_mean(depths: Sequence[int], condition: str) -> Curve:
    """The published mean over the same depths: of the curves per depth, or where there are none and all six were run,
    as published; empty otherwise."""
    curves = [published_curve(layers, condition) for layers in depths]
    if curves and all(curves):
        return mean_curve(curves)
    return published_curve("mean", condition) if sorted(depths) == list(PUBLISHED_DEPTHS) else {}


def depths_with(depths: Sequence[DepthResults], condition: str) -> list[int]:
    """The depths whose results hold this condition."""
    return [depth.layers for depth in depths if condition in depth.conditions()]


def difference_table(depths: Sequence[DepthResults]) -> Table:
    """Mean absolute difference of our means from the published values, per condition and depth."""
    shown = [depth for depth in depths if depth.runs]
    rows = []
    for condition in CONDITIONS:
        pairs = [(depth.curve(condition), published_curve(depth.layers, condition)) for depth in shown]
        if len(shown) > 1:
            published = published_mean(depths_with(shown, condition), condition)
            pairs.append((mean_over_depths(shown, condition), published))
        cells = [Difference.between(ours, published) for ours, published in pairs]
        if any(cells):
            rows.append([condition, *[str(cell) if cell else "-" for cell in cells]])
    head = ["condition", *[f"{depth.layers} layers" for depth in shown]]
    title = "Mean absolute difference from the published curves (mean signed difference, number of n that both have)"
    return Table(title, head + (["mean over depths"] if len(shown) > 1 else []), rows)


def reasons(config: ArithmeticConfig) -> list[str]:
    """Why the curves can differ from the published ones, for this config, the surest first."""
    found = []
    changed = [
        f"{key} {getattr(config, key)} (paper {value})"
        for key, value in dataclasses.asdict(_paper()).items()
        if key not in _NO_RECIPE and getattr(config, key) != value
    ]
    if changed:
        found.append(f"Another recipe than the paper's: {', '.join(changed)}.")
    if any(name.startswith("sampled") for name in config.conditions):
        found.append(
            "The published sampled controls are inverted: their sampling returns a mask with |S| zeros, so N - |S| "
            "weights of T1 were planted. Their curves are compared with ours of that reading (..._as_published); "
            "'sampled', |S| planted, has no published curve."
        )
    found.append(
        "The T1 network decides more than anything else (networks that are all right on .99 of T1 pairs gave subnets "
        "of .48 to .78 at 2 layers and n = 640), and each published curve stands on one per depth. "
        + (
            "So does ours: its error bars, over transfer seeds alone, do not show this."
            if config.base_seeds == 1
            else f"Ours is a mean over {config.base_seeds}; its bars over replicates show how much that moves."
        )
    )
    found.append(
        f"T1 training here ends when held-out accuracy reaches {config.base_stop_at:g}, the paper's after 10 epochs "
        "without gain: a network that gets to accuracy 1 is trained for 10 epochs more there."
    )
    if config.inherit == "unmasked":
        found.append(
            "Every condition inherits T1's embeddings, norms and biases, random_init included: where our T1 "
            "embeddings hold more of the task than the published ones, random_init and sampled are better than "
            "published, and sampled_as_published, with most of T1 frozen around them, is worse."
        )
    else:
        found.append("inherit='none' here: nothing outside the planted weights comes from T1, as it does in the paper.")
    return found


def _paper() -> ArithmeticConfig:
    return ArithmeticConfig(**PRESETS["paper"])
