"""The report on stability: the numbers in its tables, its figures, and what one seed or no evaluate leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from subnets import Discoveries, Discovery, Subnet
from subnets.report.page import page
from subnets.report.stability import agreement, agreement_table, keep_counts, layer_table, path_table, stability_parts


def found(score: float | None = 0.5, seeds: int = 3) -> Discoveries:
    """Two penalties; of 10 weights in layer a and 5 in layer b, seed i keeps what is written."""
    kept = {
        0: ([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0]),
        1: ([1, 1, 1, 0, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0]),
        2: ([1, 1, 0, 1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0]),
    }
    runs = []
    for seed in range(seeds):
        for lam in (1e-7, 1e-6):
            a, b = (torch.tensor(part).bool() for part in kept[seed])
            masks = {"a.weight": a.view(2, 5) if lam == 1e-7 else torch.zeros(2, 5).bool(), "b.weight": b.view(1, 5)}
            provenance = {"config": {"seed": seed, "lam": lam, "score_init": -0.1}}
            subnet = Subnet(masks, provenance)
            best = {"density": subnet.density(), "score": None if score is None else score + 0.1 * seed}
            runs.append(Discovery(subnet, [best], best))
    shared = [] if score is None else [{"lam": 1e-7, "score_init": -0.1, "core": 0.125, "union": 0.875}]
    return Discoveries(runs, None, shared)


def test_agreement_counts_what_seeds_share_and_what_random_subnets_would():
    row = agreement(found())[0]
    assert row["lam"] == 1e-7 and row["seeds"] == 3
    assert row["density"] == pytest.approx((5 + 5 + 6) / 45)
    ious = [4 / 6, 3 / 8, 3 / 8]  # 0-1: 4 of 6; 0-2 and 1-2: 3 of 8
    assert row["iou"] == pytest.approx(sum(ious) / 3)
    at_random = []  # expected intersections: k_a k_b / n per layer
    for a, b, c, d in ((4, 4, 1, 1), (4, 5, 1, 1), (4, 5, 1, 1)):
        both = a * b / 10 + c * d / 5
        at_random.append(both / (a + b + c + d - both))
    assert row["expected_iou"] == pytest.approx(sum(at_random) / 3)
    assert row["core"] == pytest.approx(2 / 15) and row["union"] == pytest.approx(8 / 15)
    assert row["shared"] == pytest.approx((2 / 15) / (16 / 45))
    assert row["expected_core"] == pytest.approx((10 * 0.4 * 0.4 * 0.5 + 5 * 0.2**3) / 15)
    assert (row["core_score"], row["union_score"], row["score"]) == (0.125, 0.875, pytest.approx(0.6))
    assert row["score_std"] == pytest.approx(0.1)


def test_keep_counts_are_shares_of_weights_and_sum_to_one_beside_those_of_independent_draws():
    observed, expected = keep_counts(found(), 1e-7)
    assert observed.tolist() == pytest.approx([7 / 15, 2 / 15, 4 / 15, 2 / 15])
    a_none, b_none = 0.6 * 0.6 * 0.5, 0.8**3
    assert expected[0].item() == pytest.approx((10 * a_none + 5 * b_none) / 15)
    assert expected[3].item() == pytest.approx(agreement(found())[0]["expected_core"])
    assert observed.sum().item() == pytest.approx(1) and expected.sum().item() == pytest.approx(1)


def test_tables_say_these_numbers_and_a_dash_where_nothing_is_known():
    text = path_table(found()).text()
    assert "0.3556 ± 0.0385" in text and "0.6000 ± 0.1000" in text
    assert "0.4722" in agreement_table(found()).text() and "0.8750" in agreement_table(found()).text()
    alone = agreement(found(None, seeds=1))[0]
    assert alone["iou"] is None and alone["score"] is None and alone["core_score"] is None
    assert alone["shared"] == 1 and alone["density_std"] == 0
    assert agreement_table(found(None, seeds=1)).rows[0][2] == "-"
    rows = layer_table(found(), 1e-7).rows
    assert rows[0] == ["a.weight", "0.4333", "0.2000", "0.0800"]
    assert rows[1] == ["b.weight", "0.2000", "0.0000", "0.0080"]


@pytest.mark.parametrize("result", [found(), found(None), found(seeds=1)])
def test_the_parts_make_one_page_with_its_figures_embedded(tmp_path: Path, result: Discoveries):
    text = page("Stability", stability_parts(result, tmp_path / "figures"))
    names = {"path.png", "keep_frequency.png", "keep_maps.png", "iou.png"}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == names
    assert text.count("data:image/png;base64,") == 4 and text.count("<table>") == 3
    assert all((tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG") for name in names)
