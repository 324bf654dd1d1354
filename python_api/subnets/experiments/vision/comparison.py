"""Our numbers beside the published ones: tables of both, and what differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from subnets.experiments.vision.config import VisionConfig
from subnets.experiments.vision.results import (
    CHANCE,
    PUBLISHED_ACCURACY,
    PUBLISHED_GAIN,
    PUBLISHED_SHAPE_BIAS,
    VisionResults,
    spread_of,
)
from subnets.report.curves import format_cell
from subnets.report.page import Table

NETWORKS = {"resnet18": "ResNet-18", "vit": "ViT"}
TWO_SOURCES = (
    f"The paper's summary gives +{PUBLISHED_GAIN:.1%} accuracy on mean-pooled ImageNet for ResNet-18. Its training "
    "curves, the source of the table, end at .507 against .250: 25.7 points. The two published figures differ; ours "
    "stand beside those of the curves."
)
SHAPE_BIAS_SOURCE = (
    "Shape bias of people and of published networks: Geirhos et al., ICLR 2019, photographs of 16 classes painted in "
    "the style of others' textures."
)
_RECIPE = (  # keys whose default in VisionConfig is the paper's value
    "inherit", "norms", "fresh_scale", "discovery_epochs", "discovery_batch", "discovery_lr", "lam", "score_init",
    "beta_end", "transfer_epochs", "transfer_batch", "transfer_lr", "transfer_optimizer", "transfer_decay",
)  # fmt: skip
COMPARABLE = {  # source of the images -> what the published numbers beside ours can say
    "generated": (
        "Our images are generated, their classes show in outline and texture alone, and our networks have seen nothing "
        "else. The published numbers are those of people and of networks trained on photographs. Compare the sign and "
        "the size of differences between conditions, not single values."
    ),
    "folders": (
        "Our images are photographs too, yet segments, training and evaluation images need not be the published ones "
        "(see the table): differences between conditions can be compared, single values with care."
    ),
    "conflict": (
        "Our images are cue-conflict photographs alone, a few hundred to train on; no test image shares its shape's or "
        "its texture's instance with a training image. Every image's natural class is that of its shape here, and "
        "transfer labels are shape or texture at random. This can show that loaders, mean pooling, pipeline and metric "
        "work on photographs, and whether a planted subnet moves decisions towards shape; it can't show how well such "
        "networks see, and single values can't be compared with the published ones."
    ),
}


def published_table(results: VisionResults) -> Table:
    """The published accuracies and their gaps beside ours at the largest size."""
    size = max(results.sizes(), default=0)
    architecture = results.rows[0]["architecture"] if results.rows else None

    def ours(name: str, condition: str, measure: str) -> float | None:
        spread = results.spread(condition, size, measure) if name == architecture else None
        return spread.mean if spread else None

    rows = []
    for name in NETWORKS:
        values: dict[str, list[float | None]] = {}
        for condition in ("subnet", "random_init"):
            natural, pooled = PUBLISHED_ACCURACY[name, condition]
            values[condition] = [
                ours(name, condition, "natural"),
                natural,
                ours(name, condition, "mean_pooled"),
                pooled,
            ]
            rows.append([f"{NETWORKS[name]}, {condition}", *[_number(value) for value in values[condition]]])
        gaps = [
            None if a is None or b is None else a - b
            for a, b in zip(values["subnet"], values["random_init"], strict=True)
        ]
        rows.append([f"{NETWORKS[name]}, difference", *[_number(gap, "+.3f") for gap in gaps]])
    title = f"Accuracy, ours (n = {size:,}) and published (training curves on 1,549 images; chance {CHANCE:.4f})"
    return Table(title, ["", "natural, ours", "published", "mean-pooled, ours", "published"], rows)


def shape_bias_table(results: VisionResults) -> Table:
    """Shape bias of our conditions at the largest size, of people and of published networks, the largest first."""
    size = max(results.sizes(), default=0)
    found = [(value, f"{value:.3f}", name, "published") for name, value in PUBLISHED_SHAPE_BIAS.items()]
    for condition in results.conditions():
        spread = results.spread(condition, size, "shape_bias")
        if spread:
            found.append((spread.mean, str(spread), condition, f"ours, n = {size:,}"))
    rows = [[name, shown, source] for _, shown, name, source in sorted(found, reverse=True)]
    return Table("Shape bias: people, published networks and ours", ["who", "shape bias", "source"], rows)


def real_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Networks on real cue-conflict images, with people and published networks beneath."""
    measures = ("shape_bias", "shape_decisions", "texture_decisions", "shape_accuracy")
    lines = []
    for condition in dict.fromkeys(row["condition"] for row in rows):
        own = [row for row in rows if row["condition"] == condition]
        spreads = [spread_of([row[measure] for row in own]) for measure in measures]
        counts = "/".join(str(count) for count in sorted({row["num_images"] for row in own}))
        lines.append([condition, *[format_cell(spread, len(own)) for spread in spreads], counts, str(len(own))])
    for name, value in PUBLISHED_SHAPE_BIAS.items():
        lines.append([f"{name}, published", f"{value:.3f}", "-", "-", "-", "1280", "-"])
    title = (
        "Real cue-conflict images: decisions where the cues differ (mean ± std over networks; [k]: of k networks that "
        "decide at all)"
    )
    head = ["who", "shape bias", "shape decisions", "texture decisions", "accuracy for shape", "images", "networks"]
    return Table(title, head, lines)


def recipe_table(config: VisionConfig) -> Table:
    """Where our images, networks and recipe are the paper's and where not."""
    is_generated = config.source == "generated"
    images = {"generated": "generated scenes", "folders": "photographs", "conflict": "cue-conflict photographs alone"}
    natural = f"{config.base_images:,}" if is_generated else "all training"
    most = f"at most {config.most_per_class:,} per class" if config.source == "folders" else "all training images"
    base = "a checkpoint with a new head" if config.base_model else f"trained here, {config.base_epochs} epochs"
    rows = [
        ["images", images[config.source], "photographs, ImageNet"],
        ["image size", f"{config.image_size} px", "224 px"],
        ["network", f"{NETWORKS[config.architecture]}, width {config.width}", "ResNet-18, width 64; ViT-B/16, 768"],
        ["base network", f"{base}, {natural} images", "an ImageNet classifier, its head adapted to 16 classes"],
        ["mean-pooled images for discovery", f"{config.discovery_images:,}" if is_generated else most, "13,929"],
        ["segments", "the generator's own" if is_generated else "SAM" if config.masks else "scikit-image", "SAM"],
        ["images for transfer", ", ".join(f"{n:,}" for n in config.sizes) or "all there are", "all of the 16 classes"],
        ["base networks", str(config.base_seeds), "-"],
        ["transfer seeds on the first base network", str(config.transfer_seeds), "-"],
    ]  # fmt: skip
    paper = {knob.name: knob.default for knob in dataclasses.fields(config) if knob.name in _RECIPE}
    if config.architecture == "vit":
        paper["transfer_epochs"] = 40
    rows += [[name, str(getattr(config, name)), str(paper[name])] for name in _RECIPE]
    return Table(f"What differs: preset {config.preset} and the paper", ["", "ours", "the paper"], rows)


def _number(value: float | None, format_spec: str = ".3f") -> str:
    return "-" if value is None else format(value, format_spec)
