"""The report's numbers against the published curves and by hand, and the page it makes."""

from __future__ import annotations

import pytest
from subnets.experiments.arithmetic.comparison import difference_table, published_mean, reasons
from subnets.experiments.arithmetic.config import PRESETS, ArithmeticConfig, make_config
from subnets.experiments.arithmetic.report import accuracy_table, samples_table, write_report
from subnets.experiments.arithmetic.results import (
    DepthResults,
    beats,
    failure_signatures,
    group_runs,
    published_curve,
    verdict,
)
from subnets.experiments.arithmetic.timing import StageTime
from subnets.report.curves import (
    OVER_REPLICATES,
    OVER_TRANSFER,
    Difference,
    Spread,
    data_reduction,
    format_reduction,
    format_samples,
    mean_curve,
    samples_to_reach,
)

TIMES = {
    4: {"base": StageTime(1, 1, 1, 60.0), "discovery": StageTime(1, 1, 1, 30.0), "transfer": StageTime(9, 9, 9, 9)}
}


def test_published_means_over_depths_are_those_of_the_paper() -> None:
    for condition, expected in {
        "subnet": [0.617, 0.817, 0.946, 0.984],
        "full_model": [0.576, 0.723, 0.902, 0.967],
        "sampled_as_published": [0.419, 0.450, 0.572, 0.694],
        "random_init": [0.384, 0.442, 0.474, 0.513],
    }.items():
        curve = published_curve("mean", condition)
        assert [curve[n] for n in (100, 250, 640, 1000)] == expected
    assert published_curve(4, "subnet")[400] == 0.885
    assert published_curve(2, "subnet")[640] == 0.825
    assert published_curve(3, "subnet") == {} and published_curve(4, "sampled") == {}


def test_samples_for_90_percent_on_the_published_means() -> None:
    assert samples_to_reach(published_curve("mean", "subnet"), 0.9) == pytest.approx(420, rel=0.01)
    assert samples_to_reach(published_curve("mean", "full_model"), 0.9) == pytest.approx(632, rel=0.01)
    assert samples_to_reach(published_curve("mean", "sampled_as_published"), 0.9) == pytest.approx(2142, rel=0.01)
    assert samples_to_reach(published_curve("mean", "random_init"), 0.9) is None


def test_samples_are_interpolated_linearly_in_log_n() -> None:
    curve = {100: 0.5, 400: 0.9}
    assert samples_to_reach(curve, 0.7) == pytest.approx(200.0)
    assert samples_to_reach(curve, 0.4) == 100.0
    assert samples_to_reach(curve, 0.91) is None
    assert samples_to_reach({0: 0.2, 100: 0.8}, 0.5) == pytest.approx(10.0)
    assert (format_samples(420.4), format_samples(None)) == ("420", "not reached")


def test_data_reduction_is_a_ratio_of_samples_or_a_lower_bound() -> None:
    ours, slow, never = {100: 0.9}, {100: 0.5, 400: 0.9}, {400: 0.5}
    assert data_reduction(ours, slow, 0.7) == (pytest.approx(2.0), True)
    assert data_reduction(ours, never, 0.7) == (4.0, False)
    assert data_reduction(never, ours, 0.7) is None
    shown = [format_reduction(r) for r in ((2.0, True), (4.0, False), None)]
    assert shown == ["2.0x", "> 4.0x", "-"]


def test_spread_is_mean_and_population_standard_deviation() -> None:
    spread = Spread.of([0.5, 0.7, 0.9])
    assert (spread.mean, spread.low, spread.high, spread.count) == (pytest.approx(0.7), 0.5, 0.9, 3)
    assert spread.std == pytest.approx(0.163299, abs=1e-6)
    assert str(spread) == "0.700 ± 0.163" and str(Spread.of([0.5])) == "0.500"


def depth(
    s1: float = 0.99,
    complement: float = 0.3,
    subnet: float = 0.9,
    random: float = 0.5,
    base: float = 1.0,
    layers: int = 4,
) -> DepthResults:
    table = {
        "full": {"S1": 0.3, "T1": 1.0},
        "subnet": {"S1": s1, "T1": 0.3},
        "complement": {"S1": complement, "T1": 0.3},
    }
    history = [{"epoch": 1, "score": 0.5, "density": 0.4, "undecided": 0.2}, {"epoch": 2, "score": s1, "density": 0.2}]
    discovery = {"table": table, "density": 0.2, "density_per_layer": {"h.0.mlp.c_fc.weight": 0.25}, "history": history}
    runs = {}
    for condition, value in (("subnet", subnet), ("random_init", random), ("full_model", 0.8)):
        runs |= {(condition, n): {(0, 0): value - 0.01, (0, 1): value + 0.01} for n in (640, 1000)}
    curves = [
        {"condition": c, "n_disambiguation": n, "seed": 0, "curve": [{"epoch": 1, "validation_accuracy": 0.5}]}
        for c, n in runs
    ]
    return DepthResults(layers, {0: {"test_accuracy": base}}, {0: discovery}, runs, [], curves)


@pytest.mark.parametrize(
    ("changes", "signatures"),
    [
        ({}, []),
        ({"s1": 0.6}, ["the subnet is bad at S1 (accuracy 0.600, below 0.9)"]),
        ({"complement": 0.8}, ["the complement is still good at S1 (accuracy 0.800, above 0.5)"]),
        ({"base": 0.4}, ["the base network has not learned T1 (accuracy 0.400)"]),
        ({"subnet": 0.505}, ["the subnet is no better than random_init at any n"]),
    ],
)
def test_each_failure_signature_is_named_when_it_holds_and_only_then(changes: dict, signatures: list[str]) -> None:
    found = failure_signatures(depth(**changes))
    assert len(found) == len(signatures)
    assert all(text.startswith(sign) for text, sign in zip(found, signatures, strict=True))
    assert ("FAILURE SIGNATURE" in verdict(depth(**changes))) == bool(signatures)


def test_the_report_is_one_file_that_starts_with_the_verdict_and_shows_ours_beside_published(tmp_path) -> None:
    config = make_config("standard", {"sizes": "640,1000", "transfer_seeds": "2"})
    text = write_report([depth(s1=0.6)], config, TIMES, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    body = page.split("</h1>")[1]
    assert body.strip().startswith('<p class="verdict bad">4 layers: FAILURE SIGNATURE: the subnet is bad at S1')
    assert page.count("data:image/png;base64,") == 3 and 'src="http' not in page and "href=" not in page
    assert page.count("inherit=&#x27;unmasked&#x27;") >= 5 and "does not beat it below n" in page
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".png", ".svg"}
    assert text.splitlines()[0].startswith("4 layers: FAILURE SIGNATURE") and "0.900 ± 0.010" in text
    rows = {row[0]: list(row[1:]) for row in accuracy_table(depth(), "unmasked").rows if row[0] != "  published"}
    assert rows["random_init"] == ["0.500 ± 0.010", "0.500 ± 0.010"]
    assert [row[1:] for row in samples_table(depth()).rows if row[0] == "full_model"] == [
        ["640", "not reached", "not reached"]
    ]


def test_rows_of_results_csv_are_grouped_by_condition_n_and_seeds() -> None:
    rows = [
        {"condition": "subnet", "n_disambiguation": "640", "seed": "0", "base_seed": "0", "test_accuracy": "0.5"},
        {"condition": "subnet", "n_disambiguation": "640", "seed": "1", "base_seed": "1", "test_accuracy": "0.7"},
        {"condition": "subnet", "n_disambiguation": "640", "seed": "1", "test_accuracy": "0.6"},  # an older file's
    ]
    assert group_runs(rows) == {("subnet", 640): {(0, 0): 0.5, (1, 1): 0.7, (0, 1): 0.6}}


def test_the_two_kinds_of_spread_are_over_the_first_base_and_over_replicates() -> None:
    runs = {("subnet", 640): {(0, 0): 0.5, (0, 1): 0.6, (0, 2): 0.7, (1, 1): 0.8, (2, 2): 0.8}}
    results = DepthResults(4, {}, {}, runs, base_seeds=3)
    assert results.kind == OVER_REPLICATES
    assert results.spread("subnet", 640) == Spread.of([0.5, 0.8, 0.8])
    assert results.spread("subnet", 640, OVER_TRANSFER) == Spread.of([0.5, 0.6, 0.7])
    assert results.curve("subnet") == {640: pytest.approx(0.7)}
    rows = {row[0]: row[1] for row in accuracy_table(results, "none").rows}
    assert rows["subnet"] == "0.700 ± 0.141" and rows["  over transfer seeds"] == "0.600 ± 0.082"


def test_cells_of_an_unfinished_run_show_their_count_and_a_single_replicate_is_not_compared() -> None:
    three = {(0, 0): 0.5, (1, 1): 0.8, (2, 2): 0.8}
    runs = {("subnet", 640): three, ("subnet", 1000): {(0, 0): 0.9}}
    runs |= {("random_init", n): {(0, 0): 0.1, (1, 1): 0.1} for n in (640, 1000)}
    results = DepthResults(4, {}, {}, runs, base_seeds=3)
    table = accuracy_table(results, "none")
    assert {row[0]: row[1:] for row in table.rows}["subnet"] == ["0.700 ± 0.141", "0.900 [1]"]
    assert table.title.endswith("[k]: of k so far")
    assert [beats(results, "random_init", n) for n in (640, 1000)] == [True, None]


def test_mean_absolute_difference_is_over_the_sizes_that_both_curves_have() -> None:
    found = Difference.between({10: 0.5, 20: 0.7, 40: 0.9}, {10: 0.4, 20: 0.9, 80: 1.0})
    assert found is not None and found.count == 2
    assert found.absolute == pytest.approx(0.15) and found.signed == pytest.approx(-0.05)
    assert str(found) == "0.150 (-0.050, 2)"
    assert Difference.between({10: 0.5}, {20: 0.5}) is None
    assert mean_curve([{10: 0.2, 20: 0.4}, {10: 0.4, 40: 0.9}]) == {10: pytest.approx(0.3)}


def test_the_difference_table_compares_each_depth_and_their_mean_with_the_published_curves() -> None:
    table = difference_table([depth(subnet=0.9395, layers=2), depth(subnet=0.801, layers=4)])
    assert table.head[1:] == ["2 layers", "4 layers", "mean over depths"]
    rows = {row[0]: row[1:] for row in table.rows}
    published = {n: [published_curve(layers, "subnet")[n] for layers in (2, 4)] for n in (640, 1000)}
    assert published == {640: [0.825, 0.965], 1000: [0.932, 0.983]}
    # at 2 layers +.1145 and +.0075; at 4 layers -.164 and -.182; in the mean .87025 against .895 and .9575
    assert rows["subnet"] == ["0.061 (+0.061, 2)", "0.173 (-0.173, 2)", "0.056 (-0.056, 2)"]
    assert list(rows) == ["subnet", "full_model", "random_init"]


def test_published_means_are_those_of_the_depths_that_were_run() -> None:
    every = (2, 4, 6, 8, 10, 12)
    for condition in ("subnet", "full_model", "random_init", "sampled_as_published"):
        mean = published_curve("mean", condition)
        assert all(abs(published_mean(every, condition)[n] - mean[n]) < 0.001 for n in mean)
    assert published_mean((2, 4), "subnet")[640] == pytest.approx((0.825 + 0.965) / 2)
    assert published_mean((2, 4), "subnet_trainable") == {} == published_mean((2, 3), "subnet")
    assert published_mean(every, "subnet_trainable") == published_curve("mean", "subnet_trainable") != {}


def test_reasons_name_what_differs_from_the_papers_recipe_and_the_inverted_controls() -> None:
    quick, paper = (" ".join(reasons(make_config(preset))) for preset in ("quick", "paper"))
    assert "transfer_epochs 15 (paper 100)" in quick and "dropout 0.0 (paper 0.1)" in quick
    assert "Another recipe" not in paper and "a mean over 5" in paper and "So does ours" in quick
    assert all("published sampled controls are inverted" in text for text in (quick, paper))


def test_the_paper_preset_is_the_exact_recipe() -> None:
    config = make_config("paper")
    assert config.layers == (2, 4, 6, 8, 10, 12) and config.inherit == "unmasked"
    assert (config.base_pairs, config.base_epochs, config.base_batch, config.base_lr) == (200_000, 50, 50, 5e-4)
    assert (config.base_decay, config.base_warmup, config.base_patience, config.dropout) == (True, 0, 10, 0.1)
    assert (config.base_stop_at, config.base_weight_decay, config.base_beta2) == (1.0, 0.0, 0.999)
    assert (config.discovery_pairs, config.discovery_epochs, config.discovery_batch) == (50_000, 50, 500)
    assert [config.discovery_rate(n) for n in (2, 4, 8, 12)] == [1e-3, 1e-3, 2e-3, 1e-3]
    assert (config.lam, config.score_init, config.beta_end) == (1e-7, -0.1, 100.0)
    assert (config.transfer_epochs, config.transfer_batch, config.transfer_lr) == (100, 50, 2e-4)
    assert config.num_ambiguous == config.num_held_out == 1000 and len(config.sizes) == 17
    assert len(config.conditions) == 7 and "sampled_complement" not in config.conditions
    assert (config.base_seeds, config.transfer_seeds, config.transfer_seeds_at) == (5, 5, (2, 12))
    replicates = sum(base == seed for layers in config.layers for base, seed in config.seed_pairs(layers))
    assert replicates * len(config.sizes) * len(config.conditions) == 3570  # the figure with five of everything


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_json(preset: str) -> None:
    config = make_config(preset)
    assert ArithmeticConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"epoch": "3"}, "--set key must be one of seed, base_seeds"),
        ({"layers": "two"}, "layers must be int, got 'two'"),
        ({"layers": "2,2"}, "layers must list different values"),
        ({"lam": "much"}, "lam must be float, got 'much'"),
        ({"inherit": "all"}, "inherit must be 'unmasked' or 'none', got 'all'"),
        ({"conditions": "subnet,none"}, r"conditions must be among .*, got \['none'\]"),
        ({"sizes": "-1"}, "sizes must be at least 0"),
        ({"transfer_epochs": "0"}, "transfer_epochs must be at least 1, got 0"),
        ({"base_stop_at": "0"}, r"base_stop_at must be in \(0, 1\], got 0.0"),
        ({"base_decay": "yes"}, "base_decay must be true or false, got 'yes'"),
        ({"discovery_lr": "-1"}, "discovery_lr must be positive or None, got -1.0"),
        ({"device": "tpu"}, "device must be 'cpu', 'cuda' or None, got 'tpu'"),
        ({"transfer_seeds_at": "0"}, r"transfer_seeds_at must be at least 1, got \(0,\)"),
        ({"heads": "3"}, "width must be a multiple of heads=3, got 128"),
    ],
)
def test_bad_overrides_are_refused_in_words(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config("paper", overrides)


def test_overrides_are_parsed_by_the_type_of_their_key() -> None:
    config = make_config("paper", {"layers": "2,4", "discovery_lr": "none", "base_dropout": "0", "base_decay": "False"})
    assert (config.layers, config.discovery_lr, config.base_dropout, config.base_decay) == ((2, 4), None, 0.0, False)
    seeds = [make_config("paper", {"transfer_seeds_at": text}).transfer_seeds_at for text in ("none", "2,4", "")]
    assert seeds == [None, (2, 4), ()]
