"""The small subcommands of `subnets`."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from subnets import Discoveries, Discovery, mask_model
from subnets.cli import main
from subnets.report.comparison import Comparison
from subnets.report.subnet_pages import subnet_parts, subnet_tables
from subnets.subnet import Subnet
from transformers import GPT2Config, GPT2LMHeadModel


@pytest.fixture
def files(tmp_path):
    a = torch.tensor([[True, True, False, False]])
    b = torch.tensor([[True, False, True, False]])
    Subnet({"0.weight": a}, {"task": "ab"}).save(tmp_path / "a.safetensors")
    Subnet({"0.weight": b}).save(tmp_path / "b.safetensors")
    return str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")


def test_inspect_prints_size_density_and_provenance(files, capsys):
    assert main(["inspect", files[0]]) == 0
    printed = capsys.readouterr().out
    assert "2 of 4 weights, density 0.5000" in printed and '{"task": "ab"}' in printed
    assert main(["inspect", files[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["kept"] == 2
    assert main(["inspect", *files, "--json"]) == 0
    assert [one["kept"] for one in json.loads(capsys.readouterr().out)] == [2, 2]


@pytest.fixture
def transformer(tmp_path):
    """A subnet of two layers: 2 heads of 2 units, everything of head 1 of layer 1's value, a quarter of c_fc."""
    value = torch.zeros(4, 12, dtype=torch.bool)
    value[:, 10:] = True
    quarter = torch.zeros(4, 16, dtype=torch.bool)
    quarter[0] = True
    masks = {
        "h.0.attn.c_attn.weight": torch.zeros(4, 12, dtype=torch.bool), "h.1.attn.c_attn.weight": value,
        "h.0.mlp.c_fc.weight": quarter, "h.1.mlp.c_fc.weight": quarter, "classifier.weight": quarter[:, :4],
    }  # fmt: skip
    Subnet(masks).save(tmp_path / "t.safetensors")
    return tmp_path / "t.safetensors", masks


def lines_with(printed: str, start: str) -> list[list[str]]:
    return [line.split() for line in printed.splitlines() if line.startswith(start)]


def test_inspect_says_density_by_role_depth_and_head(transformer, capsys):
    file, _ = transformer
    assert main(["inspect", str(file)]) == 0
    printed = capsys.readouterr().out
    assert lines_with(printed, "attn.c_attn ") == [
        ["attn.c_attn", "2", "8", "0.0833", "0.0000", "(0)", "0.1667", "(1)"]
    ]
    assert lines_with(printed, "classifier ") == [["classifier", "1", "4", "0.2500", *["0.2500", "(-)"] * 2]]
    assert "pass --heads N" in printed and "By head" not in printed and "no ranks of the scores" in printed
    assert main(["inspect", str(file), "--heads", "2"]) == 0
    printed = capsys.readouterr().out
    assert lines_with(printed, "attn.c_attn v") == [
        ["attn.c_attn", "v", "4", "0.2500", "0.0000", "(0.0)", "1.0000", "(1.1)"]
    ]
    assert "pass --heads" not in printed
    assert main(["inspect", str(file), "--heads", "3"]) == 2
    assert "heads must divide the width of h.0.attn.c_attn.weight, 4, got 3" in capsys.readouterr().err


def test_the_number_of_heads_may_be_in_the_file(transformer, tmp_path, capsys):
    _, masks = transformer
    Subnet(masks, {"num_heads": 2}).save(tmp_path / "h.safetensors")
    assert main(["inspect", str(tmp_path / "h.safetensors"), "--json"]) == 0
    heads = json.loads(capsys.readouterr().out)["heads"]
    assert heads["attn.c_attn v"] == {"0": [0.0, 0.0], "1": [0.0, 1.0]}
    for odd in (3, 0, -2, 10**30, True, "2", [2]):  # a file may say anything
        Subnet(masks, {"num_heads": odd}).save(tmp_path / "h.safetensors")
        assert main(["inspect", str(tmp_path / "h.safetensors")]) == 0
        assert "pass --heads N" in capsys.readouterr().out


def test_inspect_writes_a_page_figures_and_rows(transformer, files, tmp_path, capsys):
    file, masks = transformer
    assert main(["inspect", str(file), "--heads", "2", "--out", str(tmp_path / "one")]) == 0
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "density.png", "heads.png", "layers.csv", "report.html"
    ]  # fmt: skip
    page = (tmp_path / "one" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and all(name in page for name in masks)
    rows = list(csv.DictReader((tmp_path / "one" / "layers.csv").open()))
    assert [(row["name"], row["role"], row["depth"], row["kept"]) for row in rows] == [
        ("h.0.attn.c_attn.weight", "attn.c_attn", "0", "0"), ("h.1.attn.c_attn.weight", "attn.c_attn", "1", "8"),
        ("h.0.mlp.c_fc.weight", "mlp.c_fc", "0", "16"), ("h.1.mlp.c_fc.weight", "mlp.c_fc", "1", "16"),
        ("classifier.weight", "classifier", "", "4"),
    ]  # fmt: skip
    assert main(["inspect", str(file), files[0], "--out", str(tmp_path / "two")]) == 0
    assert {"1-density.png", "2-density.png"} <= {path.name for path in (tmp_path / "two").iterdir()}


def test_scores_are_shown_where_a_subnet_has_ranks(transformer, tmp_path):
    _, masks = transformer
    subnet = Subnet(masks)
    low, high = torch.tensor([0] * 8, dtype=torch.uint8), torch.tensor([128] * 15 + [255], dtype=torch.uint8)
    subnet.ranks = {
        "h.0.attn.c_attn.weight": low[:0], "h.1.attn.c_attn.weight": low, "h.0.mlp.c_fc.weight": high,
        "h.1.mlp.c_fc.weight": high, "classifier.weight": low[:4],
    }  # fmt: skip
    table = subnet_tables(subnet, None)[-1]
    assert table.rows == [
        ["attn.c_attn", "8", "0.000", "0.000"], ["mlp.c_fc", "32", "0.531", "0.062"],
        ["classifier", "4", "0.000", "0.000"],
    ]  # fmt: skip
    subnet_parts(subnet, None, tmp_path / "out")
    assert (tmp_path / "out" / "scores.png").stat().st_size > 1000


def test_the_number_of_heads_and_the_ranks_come_with_the_model_and_a_folder_is_read_too(tmp_path, capsys):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=4, n_embd=8, n_layer=1, n_head=2))
    masks = mask_model(model, init=lambda name, weight: torch.linspace(-1, 1, weight.numel()).view_as(weight))
    masks.subnet(ranks=True).save_pretrained(tmp_path / "folder")
    assert main(["inspect", str(tmp_path / "folder"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    (query,) = lines_with(printed, "attn.c_attn q")
    assert query[2:4] == ["2", "0.5000"]
    assert "By score" in printed and (tmp_path / "out" / "scores.png").exists()
    assert main(["diff", str(tmp_path / "folder"), str(tmp_path / "folder" / "subnet.safetensors")]) == 0
    assert "intersection over union in all: 1.0000" in capsys.readouterr().out


def test_an_empty_subnet_is_drawn_too(tmp_path):
    masks = {"h.0.attn.W_Q": torch.zeros(2, 3, 4, dtype=torch.bool), "odd": torch.zeros(0, 3, dtype=torch.bool)}
    parts = subnet_parts(Subnet(masks), None, tmp_path)
    assert "0 of 24 weights, density 0.0000" in parts[0]
    both = Comparison.of(Subnet(masks), Subnet(masks))
    assert both.total().iou() == both.total().iou_by_chance() == 1.0
    both.figure()


def test_diff_prints_the_intersection_over_union(files, tmp_path, capsys):
    assert main(["diff", *files, "--out", str(tmp_path / "diff")]) == 0
    printed = capsys.readouterr().out
    assert "intersection over union in all: 0.3333" in printed
    assert lines_with(printed, "0.weight") == [["0.weight", "2", "2", "1", "0.3333", "0.3333"]]
    page = (tmp_path / "diff" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "intersection over union in all: 0.3333" in page


def test_diff_compares_what_both_mask_and_names_the_rest(transformer, tmp_path, capsys):
    file, _ = transformer
    kept = torch.zeros(4, 16, dtype=torch.bool)
    kept[0, :4] = kept[1, :12] = True  # shares 4 of 16 with c_fc's first row
    other = {"h.0.mlp.c_fc.weight": kept, "score.weight": kept, "classifier.weight": kept}
    Subnet(other).save(tmp_path / "other.safetensors")
    assert main(["diff", str(file), str(tmp_path / "other.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert lines_with(printed, "h.0.mlp.c_fc") == [["h.0.mlp.c_fc.weight", "16", "16", "4", "0.1429", "0.1429"]]
    assert "only in first: h.0.attn.c_attn.weight, h.1.attn.c_attn.weight, h.1.mlp.c_fc.weight\n" in printed
    assert "only in second: score.weight\n" in printed and "other shape: classifier.weight\n" in printed
    assert "intersection over union of what both mask: 0.1429" in printed
    Subnet({"alien": kept}).save(tmp_path / "alien.safetensors")
    assert main(["diff", str(file), str(tmp_path / "alien.safetensors")]) == 2
    assert "at least one parameter of the same name and shape" in capsys.readouterr().err


def test_diff_says_whether_the_base_is_the_same(tmp_path, capsys):
    mask = torch.tensor([[True, False]])

    def said(first: str | None, second: str | None, name: str = "0.weight") -> str:
        Subnet({"0.weight": mask}, base_hash=first).save(tmp_path / "1.safetensors")
        Subnet({"0.weight": mask, name: mask}, base_hash=second).save(tmp_path / "2.safetensors")
        assert main(["diff", str(tmp_path / "1.safetensors"), str(tmp_path / "2.safetensors")]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("base: "))

    assert said("a" * 64, "a" * 64).startswith("base: the same network")
    assert said("a" * 64, "b" * 64).startswith("base: different networks")
    assert "can't be told" in said("a" * 64, None)
    assert "can't be told" in said("a" * 64, "b" * 64, "1.weight")  # hashes are over what is masked


def test_diff_means_by_iou_and_chance_what_discoveries_mean():
    generator = torch.Generator().manual_seed(0)
    subnets = [
        Subnet({n: torch.rand(9, 7, generator=generator) < p for n, p in zip("ab", densities, strict=True)})
        for densities in ((0.2, 0.7), (0.5, 0.1))
    ]
    found = Discoveries([Discovery(subnet, [], {}) for subnet in subnets])
    total = Comparison.of(*subnets).total()
    assert total.iou() == pytest.approx(subnets[0].iou(subnets[1]), abs=1e-15)
    assert total.iou() == pytest.approx(float(found.iou()[0, 1]), abs=1e-12)
    assert total.iou_by_chance() == pytest.approx(float(found.expected_iou()[0, 1]), abs=1e-12)


def test_doctor_names_every_backend_and_its_reason(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for backend in ("reference  usable", "cpu ", "triton     not used: ", "cuda "):
        assert backend in printed
    assert torch.__version__.split("+")[0] in printed


def test_a_wrong_subcommand_or_file_is_one_sentence_and_status_2(tmp_path, capsys):
    assert main(["find"]) == 2
    assert "the subcommand must be one of" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "none.safetensors")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("subnets inspect: ") and error.count("\n") == 1
