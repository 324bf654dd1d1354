"""The small subcommands of `subnets`."""

from __future__ import annotations

import json

import pytest
import torch
from subnets.cli import main
from subnets.subnet import Subnet


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


def test_diff_prints_the_intersection_over_union(files, capsys):
    assert main(["diff", *files]) == 0
    assert "intersection over union in all: 0.3333" in capsys.readouterr().out


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
