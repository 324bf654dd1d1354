"""The vision report's numbers by hand, its verdict in each case, and the page and figures it makes."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from subnets.experiments.vision.comparison import published_table, real_table, recipe_table, shape_bias_table
from subnets.experiments.vision.conditions import CONDITIONS, MEANING
from subnets.experiments.vision.config import VisionConfig, make_config
from subnets.experiments.vision.figures import cue_names, draw_filters, draw_sheet
from subnets.experiments.vision.images import ImageSet
from subnets.experiments.vision.models import ARCHITECTURES, NetworkShape, build
from subnets.experiments.vision.report import (
    comparison_lines,
    condition_table,
    reduction_table,
    samples_table,
    subnet_table,
    time_table,
    write_report,
)
from subnets.experiments.vision.results import (
    PUBLISHED_ACCURACY,
    PUBLISHED_SHAPE_BIAS,
    VisionResults,
    failure_signatures,
    is_shown,
    stages,
    verdict,
)
from subnets.report.curves import OVER_REPLICATES, OVER_TRANSFER, Spread
from subnets.report.drawing import COLORS

NAN = math.nan
HISTORY = [{"epoch": e, "score": 0.2 * e, "density": 1 - 0.2 * e, "undecided": 0.1} for e in (1, 2, 3)]
LAYERS = {
    "network.resnet.embedder.embedder.convolution.weight": 0.5,
    "network.resnet.encoder.stages.0.layers.0.layer.0.convolution.weight": 0.3,
    "network.resnet.encoder.stages.0.layers.0.layer.1.convolution.weight": 0.2,
    "network.resnet.encoder.stages.1.layers.0.layer.0.convolution.weight": 0.1,
}


def row(condition: str, size: int, seed: int, base_seed: int = 0, **measures: float) -> dict[str, Any]:
    """One row of results.csv; shape and texture decisions follow from a shape bias of .8 decided images."""
    bias = measures["shape_bias"]
    decided = {"shape_decisions": 0.8 * bias, "texture_decisions": 0.8 * (1 - bias)}
    if math.isnan(bias):
        decided = {"shape_decisions": 0.0, "texture_decisions": 0.0}
    return {
        "condition": condition, "architecture": "resnet18", "num_images": size, "seed": seed, "base_seed": base_seed,
        "mean_pooled": 0.3, "natural": 0.7, **decided, **measures, "images_per_second": 100.0 + 10 * seed,
    }  # fmt: skip


def rows(condition: str, size: int, bias: float, natural: float = 0.7, pooled: float = 0.3) -> list[dict[str, Any]]:
    """Three transfer seeds, each measure spread by .03 around its mean (std .0245)."""
    return [
        row(condition, size, seed, shape_bias=bias + d, natural=natural + d, mean_pooled=pooled + d)
        for seed, d in enumerate((-0.03, 0.0, 0.03))
    ]


def measures(natural: float, pooled: float, by_shape: float, by_texture: float) -> dict[str, float]:
    """What one network does; no shape bias (nan) without decisions."""
    both = by_shape + by_texture
    return {
        "natural": natural, "mean_pooled": pooled, "shape_decisions": by_shape, "texture_decisions": by_texture,
        "shape_bias": by_shape / both if both else NAN,
    }  # fmt: skip


def results(**changes: Any) -> VisionResults:
    """Four conditions at two sizes, a base network and its subnet; the claim holds."""
    every = []
    for size, less in ((1000, 0.2), (4000, 0.0)):
        every += rows("subnet", size, 0.6, 0.82 - less, 0.5 - less)
        every += rows("full_model", size, 0.5, 0.91 - less, 0.4 - less)
        every += rows("sampled", size, 0.4, 0.75 - less, 0.3 - less)
        every += rows("random_init", size, 0.35, 0.7 - less, 0.25 - less)
    base = measures(0.95, 0.35, 0.24, 0.56)
    table = {
        "full_model": base,
        "subnet": measures(0.7, 0.85, 0.72, 0.08),
        "complement": measures(0.1, 0.07, 0.0, 0.0),
    }
    values: dict[str, Any] = {
        "rows": every,
        "bases": {0: {**base, "curve": [], "seconds": 60.0, "images_per_second": 321.0}},
        "discoveries": {
            0: {"density": 0.25, "density_per_layer": LAYERS, "history": HISTORY, "table": table, "seconds": 30}
        },
        "seconds": {"base": 60.0, "discovery": 30.0, "transfer": 330.0},
        "planned": len(every),
    }
    return VisionResults(**{**values, **changes})


def replaced(condition: str, new: list[dict[str, Any]], size: int = 4000) -> VisionResults:
    """`results()` with other rows of one condition at one size."""
    one = results()
    kept = [r for r in one.rows if (r["condition"], r["num_images"]) != (condition, size)]
    return results(rows=[*kept, *new])


def config(**changes: Any) -> VisionConfig:
    usual = {"conditions": CONDITIONS, "inherit": "none", "norms": "trained"}
    return dataclasses.replace(make_config("quick"), **{**usual, **changes})


def test_spreads_are_over_the_runs_of_one_kind_and_leave_out_undefined_shape_biases() -> None:
    one = results()
    assert one.kind == OVER_TRANSFER and one.sizes() == [1000, 4000]
    assert one.conditions() == ["subnet", "full_model", "sampled", "random_init"]
    assert one.spread("subnet", 4000, "shape_bias") == Spread.of([0.57, 0.6, 0.63])
    assert one.spread("subnet", 2000, "shape_bias") is None
    assert one.curve("sampled", "natural") == {1000: pytest.approx(0.55), 4000: pytest.approx(0.75)}

    three = [row("subnet", 4000, r, r, shape_bias=b) for r, b in enumerate((0.5, NAN, 0.7))]
    other = VisionResults([*three, row("subnet", 4000, 1, 0, shape_bias=0.9)], {}, {})
    assert other.kind == OVER_REPLICATES
    assert other.spread("subnet", 4000, "shape_bias") == Spread.of(
        [0.5, 0.7]
    )  # neither nan nor the second transfer seed
    assert other.spread("subnet", 4000, "natural", OVER_TRANSFER) == Spread.of([0.7, 0.7])


def test_beats_is_a_difference_of_means_larger_than_both_stds_over_three_runs() -> None:
    spread = math.sqrt(0.0006)  # population std of (-.03, 0, .03)
    for gap, expected in ((spread + 1e-6, True), (spread - 1e-6, False), (-0.2, False)):
        one = replaced("subnet", rows("subnet", 4000, 0.35 + gap))
        assert one.beats("subnet", "random_init", 4000, "shape_bias") is expected
    wide = [row("random_init", 4000, s, shape_bias=0.35 + d) for s, d in enumerate((-0.4, 0.0, 0.4))]
    assert replaced("random_init", wide).beats("subnet", "random_init", 4000, "shape_bias") is False
    two = replaced("random_init", rows("random_init", 4000, 0.1)[:2])
    assert two.beats("subnet", "random_init", 4000, "shape_bias") is None
    assert two.beats("subnet", "pretrained", 4000, "shape_bias") is None


def test_the_verdict_of_a_claim_that_holds_names_all_four_parts_with_their_numbers() -> None:
    text = verdict(results())
    assert is_shown(results())
    assert text == (
        "Trained on 4,000 images (mean ± std over transfer seeds, one base network and mask), the claim for the shape "
        "subnet HOLDS. Holds: "
        "shape bias above random_init's by more than the spread (0.600 ± 0.024 against 0.350 ± 0.024); "
        "shape bias above sampled's by more than the spread (0.600 ± 0.024 against 0.400 ± 0.024); "
        "natural accuracy no lower than random_init's (0.820 ± 0.024 against 0.700 ± 0.024); "
        "natural accuracy no lower than sampled's (0.820 ± 0.024 against 0.750 ± 0.024)."
    )


@pytest.mark.parametrize(
    ("condition", "new", "word", "does_not_hold"),
    [
        # shape bias above random_init's alone
        (
            "sampled", rows("sampled", 4000, 0.59, 0.75), "HOLDS IN PART",
            ["shape bias above sampled's by more than the spread (0.600 ± 0.024 against 0.590 ± 0.024)"],
        ),
        # natural accuracy lower: within the spread, and beyond it
        (
            "sampled", rows("sampled", 4000, 0.4, 0.83), "HOLDS IN PART",
            [
                "natural accuracy no lower than sampled's (0.820 ± 0.024 against 0.830 ± 0.024): it is lower, by no "
                "more than the spread"
            ],
        ),
        (
            "random_init", rows("random_init", 4000, 0.35, 0.9), "HOLDS IN PART",
            [
                "natural accuracy no lower than random_init's (0.820 ± 0.024 against 0.900 ± 0.024): it is lower, by "
                "more than the spread"
            ],
        ),
        # accuracy alone is no part of the claim
        (
            "subnet", rows("subnet", 4000, 0.3, 0.9), "DOES NOT HOLD",
            ["shape bias above random_init's by more than the spread (0.300 ± 0.024 against 0.350 ± 0.024)",
             "shape bias above sampled's by more than the spread (0.300 ± 0.024 against 0.400 ± 0.024)"],
        ),
    ],
)  # fmt: skip
def test_the_verdict_says_which_parts_do_not_hold(condition, new, word, does_not_hold) -> None:
    one = replaced(condition, new)
    text = verdict(one)
    assert f", the claim for the shape subnet {word}. " in text and not is_shown(one)
    assert re.search(r"Does not hold: (.*)\.$", text)[1].split("; ") == does_not_hold  # pyright: ignore


def test_what_is_missing_can_not_be_judged_and_is_said() -> None:
    few = replaced("sampled", rows("sampled", 4000, 0.1)[:2])
    assert "CAN'T BE JUDGED" in verdict(few) and not is_shown(few)
    assert (
        "Can't be judged: shape bias against sampled (runs that have one: subnet: 3, sampled: 2; 3 needed); "
        in verdict(few)
    )
    assert verdict(few).endswith(" NOT FINISHED: 1 of 24 transfer runs missing.")

    undecided = [row("subnet", 4000, s, shape_bias=NAN if s else 0.6, natural=0.9) for s in range(3)]
    text = verdict(replaced("subnet", undecided))
    assert "CAN'T BE JUDGED. Holds: natural accuracy" in text
    assert "shape bias against random_init (runs that have one: subnet: 1, random_init: 3; 3 needed)" in text
    assert "NOT FINISHED" not in text

    one = results(planned=30)  # all four parts hold, but other runs are missing
    assert verdict(one).endswith("NOT FINISHED: 6 of 30 transfer runs missing.") and not is_shown(one)
    assert (
        verdict(results(rows=[], planned=30)) == "Nothing to judge yet. NOT FINISHED: 30 of 30 transfer runs missing."
    )
    assert verdict(results(rows=[r for r in results().rows if r["condition"] != "sampled"])).count("sampled: 0") == 2


def with_density(density: float) -> VisionResults:
    """`results()` whose subnet has another density."""
    return results(discoveries={0: {**results().discoveries[0], "density": density}})


def failing(**table: dict[str, float]) -> VisionResults:
    """`results()` with other numbers in the table of the subnet's own."""
    one = results()
    new = {name: {**values, **table.get(name, {})} for name, values in one.discoveries[0]["table"].items()}
    return results(discoveries={0: {**one.discoveries[0], "table": new}})


@pytest.mark.parametrize(
    ("one", "signature"),
    [
        (
            results(bases={0: {"natural": 0.4}}),
            "base network 0 has not learned natural images (accuracy 0.400, below 0.5)",
        ),
        (with_density(0.0), "the subnet of base network 0 keeps 0.00% of the weights: it selects nothing"),
        (with_density(0.9995), "the subnet of base network 0 keeps 99.95% of the weights: it selects nothing"),
        (
            failing(subnet={"mean_pooled": 0.34}),
            "the subnet of base network 0 is no better on mean-pooled images than the whole network (0.340 against "
            "0.350)",
        ),
        (
            failing(complement={"mean_pooled": 0.9}),
            "the subnet of base network 0 is no better on mean-pooled images than its complement (0.850 against 0.900)",
        ),
        (
            failing(subnet={"shape_bias": 0.2}),
            "the subnet of base network 0 prefers shape no more than the whole network (0.200 against 0.300)",
        ),
        (
            results(rows=rows("subnet", 4000, 0.36) + rows("random_init", 4000, 0.35)),
            "the shape bias of subnet is above random_init's at no number of images, within the spread",
        ),
        (
            replaced(
                "sampled",
                [{**r, "shape_decisions": 0.05, "texture_decisions": 0.06} for r in rows("sampled", 4000, 0.4)],
            ),
            "few cue-conflict images are decided by one of their cues (guessing: 0.125), so these shape biases say "
            "little: sampled 0.110",
        ),
    ],
)  # fmt: skip
def test_each_failure_signature_is_named_when_it_holds_and_only_then(one: VisionResults, signature: str) -> None:
    assert failure_signatures(results()) == []
    assert failure_signatures(one) == [signature]


def test_rows_of_two_architectures_are_refused() -> None:
    two = [row("subnet", 1000, 0, shape_bias=0.5), {**row("subnet", 1000, 1, shape_bias=0.5), "architecture": "vit"}]
    with pytest.raises(ValueError, match="one architecture, got resnet18, vit"):
        VisionResults(two, {}, {})


def test_the_table_of_conditions_has_mean_spread_and_the_count_where_runs_are_missing() -> None:
    one = replaced("subnet", [row("subnet", 4000, 0, shape_bias=0.6), row("subnet", 4000, 1, shape_bias=NAN)])
    table = condition_table(one, 4000, config())
    assert table.title == (
        "Trained on 4,000 images, inherit='none', norms='trained': mean ± std over 3 transfer seeds, one "
        "base network and mask; [k]: of k runs that have the number so far"
    )
    cells = {line[0]: list(line[1:]) for line in table.rows}
    assert cells["random_init"] == ["0.700 ± 0.024", "0.250 ± 0.024", "0.350 ± 0.024", "0.280 ± 0.020", "0.520 ± 0.020"]
    assert cells["subnet"] == [
        "0.700 ± 0.000 [2]", "0.300 ± 0.000 [2]", "0.600 [1]", "0.240 ± 0.240 [2]", "0.160 ± 0.160 [2]"
    ]  # fmt: skip

    several = [row("subnet", 4000, r, r, shape_bias=0.5 + 0.1 * r) for r in range(3)]
    both = VisionResults([*several, row("subnet", 4000, 1, 0, shape_bias=0.9)], {}, {})
    lines = [[line[0], line[3]] for line in condition_table(both, 4000, config()).rows]
    assert lines == [["subnet", "0.600 ± 0.082"], ["  over transfer seeds", "0.700 ± 0.200"]]


def test_samples_and_data_reduction_are_bounds_where_a_curve_starts_above_the_target() -> None:
    one = replaced("random_init", rows("random_init", 4000, 0.35, 0.74))
    # natural: subnet .62 to .82, full_model .71 to .91, random_init .5 to .74, from 1,000 to 4,000
    samples = {line[0]: list(line[1:]) for line in samples_table(one, "natural").rows}
    at = 1000 * 4 ** ((0.7 - 0.62) / 0.2)
    assert samples["subnet"] == ["<= 1,000", "<= 1,000", f"{at:,.0f}", f"{1000 * 4**0.9:,.0f}", "not reached"]
    assert samples["full_model"] == [
        "<= 1,000",
        "<= 1,000",
        "<= 1,000",
        f"{1000 * 4**0.45:,.0f}",
        f"{1000 * 4**0.95:,.0f}",
    ]
    reduction = {line[0]: list(line[1:]) for line in reduction_table(one, "natural").rows}
    assert reduction["random_init"] == ["-", "-", f"{1000 * 4 ** (0.2 / 0.24) / at:.1f}x", f"> {4**0.1:.1f}x", "-"]
    assert reduction["full_model"][2] == "-"  # there at 1,000 already
    pooled = {line[0]: list(line[1:]) for line in reduction_table(one, "mean_pooled").rows}
    assert pooled["sampled"] == [
        "> 4.0x",
        "> 1.0x",
        "-",
        "-",
        "-",
    ]  # .3 at 1,000 against 4,000; .5 at 4,000 against never


def test_the_subnets_own_table_shows_a_shape_bias_without_decisions_as_none() -> None:
    table = subnet_table(results())
    assert "density of the subnet 0.250" in table.title
    assert [list(line) for line in table.rows] == [
        ["full_model", "0.950", "0.350", "0.300", "0.240", "0.560"],
        ["subnet", "0.700", "0.850", "0.900", "0.720", "0.080"],
        ["complement", "0.100", "0.070", "-", "0.000", "0.000"],
    ]


def test_published_accuracies_stand_beside_ours_of_the_same_architecture() -> None:
    lines = {line[0]: list(line[1:]) for line in published_table(results()).rows}
    assert lines["ResNet-18, subnet"] == ["0.820", "0.832", "0.500", "0.507"]
    assert lines["ResNet-18, random_init"] == ["0.700", "0.719", "0.250", "0.250"]
    assert lines["ResNet-18, difference"] == ["+0.120", "+0.113", "+0.250", "+0.257"]
    assert lines["ViT, subnet"] == ["-", "0.862", "-", "0.666"]
    assert lines["ViT, difference"] == ["-", "+0.212", "-", "+0.425"]
    assert PUBLISHED_ACCURACY["vit", "random_init"] == (0.650, 0.241)


def test_shape_bias_of_people_and_networks_stands_beside_ours_in_order() -> None:
    names = [line[0] for line in shape_bias_table(results()).rows]
    assert names == [
        "people", "subnet", "full_model", "AlexNet", "sampled", "random_init", "GoogLeNet", "ResNet-50", "VGG-16"
    ]  # fmt: skip
    assert PUBLISHED_SHAPE_BIAS == {
        "people": 0.959, "ResNet-50": 0.221, "AlexNet": 0.429, "VGG-16": 0.172, "GoogLeNet": 0.312
    }  # fmt: skip


def real(condition: str, biases: tuple[float, ...]) -> list[dict[str, Any]]:
    return [
        {
            "condition": condition, "seed": seed, "shape_decisions": 0.2, "texture_decisions": 0.4, "shape_bias": bias,
            "shape_accuracy": 0.25, "num_images": 1280,
        }
        for seed, bias in enumerate(biases)
    ]  # fmt: skip


def test_real_images_have_a_table_with_people_and_published_networks_beneath() -> None:
    lines = [list(line) for line in real_table(real("subnet", (0.3, 0.5)) + real("random_init", (0.2, NAN))).rows]
    assert lines[0] == ["subnet", "0.400 ± 0.100", "0.200 ± 0.000", "0.400 ± 0.000", "0.250 ± 0.000", "1280", "2"]
    assert lines[1][:2] == ["random_init", "0.200 [1]"]
    assert [line[:2] for line in lines[2:4]] == [["people, published", "0.959"], ["AlexNet, published", "0.429"]]


def test_times_and_images_per_second_are_means_over_networks() -> None:
    slow = [{**r, "images_per_second": None} if r["condition"] == "sampled" else r for r in results().rows]
    lines = [list(line) for line in time_table(results(rows=slow)).rows]
    assert lines[0] == ["base", "1", "60 s", "321"] and lines[1] == ["discovery", "1", "30 s", "-"]
    assert lines[2] == ["transfer", "24", "6 min", "110"]
    assert [line[0].strip() for line in lines[3:] if line[3] == "-"] == ["sampled"]


def test_sizes_at_which_the_subnet_is_above_each_condition() -> None:
    lines = comparison_lines(replaced("full_model", rows("full_model", 1000, 0.6, 0.4), size=1000))
    assert lines[0] == (
        "Shape bias: by more than the larger std, subnet is above sampled at n = 1,000, 4,000; random_init at n = "
        "1,000, 4,000; full_model at n = 4,000."
    )
    assert lines[1].endswith("full_model at n = 1,000.")
    never = comparison_lines(replaced("full_model", rows("full_model", 1000, 0.6, 0.9), size=1000))[1]
    assert never.startswith("Accuracy, natural: ") and never.endswith("full_model at no n.")
    assert comparison_lines(results(rows=rows("subnet", 4000, 0.6))) == [
        "No two conditions have 3 runs each yet, so none are compared."
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_of_both_networks_are_grouped_by_their_stages(architecture: str) -> None:
    model = build(NetworkShape(architecture=architecture, width=8, depth=2, patch=16), 0)
    names = [name for name, value in model.named_parameters() if value.dim() in (2, 4)]
    found = {stage: len(group) for stage, group in stages(names).items()}
    if architecture == "vit":
        assert found == {"embedding": 1, "layer 0": 6, "layer 1": 6, "head": 1}
    else:
        assert found == {"embedding": 1, "stage 0": 4, "stage 1": 5, "stage 2": 5, "stage 3": 5, "head": 1}


def test_every_condition_has_a_colour() -> None:
    assert set(CONDITIONS) <= set(COLORS)


# ----------------------------------------------------------------------------- figures


def picture(path: Path) -> torch.Tensor:
    """RGB of a PNG, uint8 [H, W, 3]."""
    return torch.tensor(matplotlib.image.imread(path))[..., :3].mul(255).round().to(torch.uint8)


def has_colour(pixels: torch.Tensor, colour: tuple[int, int, int]) -> bool:
    return bool((pixels == torch.tensor(colour, dtype=torch.uint8)).all(-1).any())


def image_set(count: int, colour: tuple[int, int, int], classes: int = 16) -> ImageSet:
    images = torch.tensor(colour, dtype=torch.uint8)[None, :, None, None].expand(count, 3, 16, 16).clone()
    shape = torch.arange(count) % classes
    return ImageSet(images, shape, (shape + 1) % classes, tuple(f"shape{i} / texture{i}" for i in range(classes)))


def test_the_sheet_shows_the_first_image_of_each_of_twelve_classes_per_kind(tmp_path: Path) -> None:
    twice = image_set(32, (10, 200, 30)).take([i // 2 for i in range(32)])  # every class twice in a row
    red = torch.tensor([200, 10, 30], dtype=torch.uint8)[:, None, None]
    twice.images[1::2], twice.images[24:] = red, red  # second images, and those of the last four classes
    pixels = picture(draw_sheet({"natural": twice, "conflict": image_set(5, (30, 10, 200))}, tmp_path / "sheet.png"))
    assert has_colour(pixels, (10, 200, 30)) and has_colour(pixels, (30, 10, 200))
    assert not has_colour(pixels, (200, 10, 30))
    green, blue = ((pixels == torch.tensor(c)).all(-1).any(0).sum() for c in ((10, 200, 30), (30, 10, 200)))
    assert green / blue == pytest.approx(12 / 5, rel=0.05)  # columns of pixels: twelve images against five
    with pytest.raises(ValueError, match="at least one image"):
        draw_sheet({"natural": image_set(0, (0, 0, 0))}, tmp_path / "none.png")


def test_names_above_an_image_are_those_of_its_two_cues() -> None:
    assert cue_names("ring / dots", "star / bricks") == "ring\nbricks"
    assert cue_names("ring / dots", "ring / dots") == "ring\ndots"
    assert cue_names("cat", "elephant") == "cat\nelephant" and cue_names("cat", "cat") == "cat"


def test_filters_are_drawn_as_they_are_and_grey_where_the_subnet_removes_them(tmp_path: Path) -> None:
    weight = torch.zeros(20, 3, 7, 7)
    weight[:, 0], weight[:, 1] = 2.0, -2.0  # red, and no green: (255, 0, half)
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    removed = picture(draw_filters(weight, mask, tmp_path / "removed.png")).int()
    kept = picture(draw_filters(weight, ~mask, tmp_path / "kept.png")).int()
    half = torch.tensor((127.5, 127.5, 127.5))
    for colour, counts in ((torch.tensor((255.0, 0.0, 127.5)), (1, 2)), (half, (1, 0))):
        found = [((pixels - colour).abs() < 1).all(-1).sum().item() for pixels in (removed, kept)]
        block = found[0] / counts[0]  # pixels of twenty filters; a few grey ones are edges of letters
        assert block > 10_000 and found[1] == pytest.approx(counts[1] * block, abs=0.02 * block)
    vit = torch.randn(8, 3, 16, 16)
    assert picture(draw_filters(vit, vit > 0, tmp_path / "vit.png")).shape[1] == kept.shape[1]
    for bad_weight, bad_mask in ((weight[:, :2], mask[:, :2]), (weight, mask[:1]), (weight, mask.float())):
        with pytest.raises(ValueError, match=r"draw_filters: weight must be \[O, 3, k, k\] and mask bool"):
            draw_filters(bad_weight, bad_mask, tmp_path / "bad.png")


# -------------------------------------------------------------------------------- page


def test_the_report_is_one_file_that_starts_with_the_verdict(tmp_path: Path) -> None:
    weight = torch.randn(16, 3, 7, 7)
    images = {"natural": image_set(16, (10, 200, 30)), "mean_pooled": image_set(16, (9, 9, 9))}
    one = results(real=real("subnet", (0.3, 0.5)))
    text = write_report(one, config(), tmp_path, images, (weight, weight > 0))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>Subtask Induction on images: preset quick</title>" in page
    assert page.split("</h1>")[1].strip().startswith('<p class="verdict good">Trained on 4,000 images (mean')
    assert page.count("data:image/png;base64,") == 5 and 'src="http' not in page and "href=" not in page
    drawn = {path.name: path.stat().st_size for path in (tmp_path / "figures").iterdir()}
    assert set(drawn) >= {"conditions.png", "conditions.svg", "sizes.png", "images.png", "filters.png", "discovery.png"}
    assert all(size > 4000 for size in drawn.values())
    for words in (
        "0.959", "0.221", "0.429", "0.172", "0.312", "0.832", "0.507", "0.719", "0.862", "0.666", "0.650", "0.241",
        "+18.8%", "25.7 points", "0.600 ± 0.024", "Our images are generated", "Real cue-conflict images",
        "Trained on 1,000 images, inherit=&#x27;none&#x27;, norms=&#x27;trained&#x27;", *MEANING.values(), *LAYERS,
    ):  # fmt: skip
        assert words in page, words
    assert text.splitlines()[0] == verdict(one)
    assert "0.820 ± 0.024" in text and "Time: 7 min (base 60 s, discovery 30 s, transfer 6 min)." in text
    assert "FAILURE SIGNATURE" not in text and str(tmp_path / "report.html") in text


def test_a_run_that_has_only_begun_has_a_report_too(tmp_path: Path) -> None:
    empty = VisionResults([], {}, {}, {"base": 0.0}, None, planned=36)
    text = write_report(empty, config(), tmp_path, {}, None)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.startswith("Nothing to judge yet. NOT FINISHED: 36 of 36 transfer runs missing.")
    assert '<p class="verdict bad">' in page and "data:image" not in page
    undecided = [row("subnet", 1000, s, shape_bias=NAN) for s in range(3)]
    text = write_report(results(rows=undecided, discoveries={}), config(), tmp_path, {}, None)
    assert "FAILURE SIGNATURE: few cue-conflict images are decided" in text and "say little: subnet 0.000." in text


def test_the_recipe_names_what_differs_from_the_papers() -> None:
    lines = {line[0]: list(line[1:]) for line in recipe_table(config(width=32, transfer_epochs=7)).rows}
    assert lines["network"][0] == "ResNet-18, width 32" and lines["image size"] == ["64 px", "224 px"]
    assert lines["images"] == ["generated scenes", "photographs, ImageNet"]
    assert lines["transfer_epochs"] == ["7", "20"] and lines["transfer_batch"][1] == "128"
    paper = {
        name: lines[name][1] for name in ("discovery_epochs", "discovery_batch", "discovery_lr", "lam", "beta_end")
    }
    assert paper == {
        "discovery_epochs": "100", "discovery_batch": "32", "discovery_lr": "0.001", "lam": "1e-08", "beta_end": "100.0"
    }  # fmt: skip
    assert lines["transfer_lr"][1] == "0.001" and lines["norms"][1] == "frozen" and lines["inherit"][1] == "unmasked"
    vit = {line[0]: list(line[1:]) for line in recipe_table(config(architecture="vit", width=64)).rows}
    assert vit["transfer_epochs"][1] == "40" and vit["network"][0] == "ViT, width 64"


def test_the_report_of_photographs_says_what_they_can_and_can_not_show(tmp_path: Path) -> None:
    folder = str(tmp_path)
    for changes, words, source in (
        ({"conflict": folder}, "it can&#x27;t show how well such networks see", "cue-conflict photographs alone"),
        ({"conflict": folder, "images": folder}, "Our images are photographs too", "photographs"),
    ):
        settings = config(**changes)
        write_report(results(), settings, tmp_path, {}, None)
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert words in page and "generated" not in page
        lines = {line[0]: line[1] for line in recipe_table(settings).rows}
        assert (lines["images"], lines["segments"]) == (source, "scikit-image")
