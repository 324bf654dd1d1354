"""The folder of a subnet: what is written, what is read back, and a card that takes hostile text as text."""

import re

import pytest
import torch
from subnets import Subnet
from subnets.subnet_folder import card
from torch import nn


def make() -> tuple[Subnet, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    known = {"base_model": "org/small", "task": "ab mod 7", "lam": 1e-7, "metrics": {"accuracy": 0.75}}
    scores = {name: torch.randn(p.shape) for name, p in net.named_parameters() if p.ndim == 2}
    return Subnet({name: s > 0 for name, s in scores.items()}, known).with_ranks(scores), net


def test_a_folder_gives_back_the_subnet_with_values_and_ranks(tmp_path):
    subnet, net = make()
    subnet.save_pretrained(tmp_path / "a" / "b", weights=net)
    loaded = Subnet.from_pretrained(tmp_path / "a" / "b")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["README.md", "subnet.safetensors"]
    assert loaded.provenance == subnet.provenance and loaded.base_hash == subnet.with_weights(net).base_hash
    for name, mask in subnet.masks.items():
        assert torch.equal(loaded.masks[name], mask) and torch.equal(loaded.ranks[name], subnet.ranks[name])
        assert torch.equal(loaded.weights[name], net.get_parameter(name)[mask])


def test_the_card_says_model_size_metrics_and_how_to_load(tmp_path):
    subnet, net = make()
    subnet.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    kept, density = subnet.num_kept(), subnet.density()
    assert text.startswith('---\nlibrary_name: subnet-kernels\ntags: [subnet, pruning]\nbase_model: "org/small"\n---\n')
    assert f"{kept} of 36 weights in 2 parameters: density {density:.4f}. Task: ab mod 7." in text
    assert "| accuracy | 0.75 |" in text and f"| 1.weight | {subnet.density(per_layer=True)['1.weight']:.4f} |" in text
    assert "8-bit ranks" in text and "kept values" not in text and '"lam": 1e-07' in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1).replace("path/to/this/folder", str(tmp_path))
    other = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    exec(code, {"model": net, "other": other})
    for name, mask in subnet.masks.items():
        assert torch.equal(other.get_parameter(name)[mask], net.get_parameter(name)[mask])


def test_saving_again_replaces_the_card_unless_it_was_made_ones_own(tmp_path):
    subnet, _ = make()
    subnet.save_pretrained(tmp_path)
    (~subnet).save_pretrained(tmp_path)
    assert f"{(~subnet).num_kept()} of 36" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "notes").write_text("also mine")
    subnet.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and (tmp_path / "notes").read_text() == "also mine"
    assert Subnet.from_pretrained(tmp_path).num_kept() == subnet.num_kept()


def test_text_from_elsewhere_stays_text_in_the_card():
    hostile = '"\n---\n# big\n```\n<script>alert(1)</script> | [x](javascript:1) \u2028 \ud800'
    subnet = Subnet(
        {hostile: torch.ones(2).bool()},
        {"base_model": hostile, "task": hostile, "metrics": {hostile: hostile}, "architecture": hostile},
    )
    text = card(subnet)
    assert text.encode()
    front, _, rest = text.removeprefix("---\n").partition("\n---\n")
    assert len(front.splitlines()) == 3 and front.splitlines()[2].startswith('base_model: "\\"\\n---')
    before_json, _, block = rest.partition("```json\n")
    assert "<script>" not in before_json and "](javascript" not in before_json.replace("\\]", "")
    assert [line for line in rest.splitlines() if line.startswith(("---", "# "))] == [
        line for line in rest.splitlines() if line.startswith("# A subnetwork of")
    ]
    assert block.count("\n```") == 1 and block.endswith("\n```\n")
    rows = [line for line in before_json.splitlines() if line.startswith("| ") and "script" in line]
    assert len(rows) == 2 and all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    odd = Subnet({"a": torch.ones(1).bool()}, {"base_model": 3, "metrics": [1], "task": None})
    assert "# A subnetwork of a network" in card(odd)


def test_what_is_no_such_folder_is_refused_in_words(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; nothing is downloaded here"):
        Subnet.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no subnet.safetensors"):
        Subnet.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"is a file; use Subnet.load"):
        Subnet.from_pretrained(tmp_path / "file")
    (tmp_path / "subnet.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="Subnet.load: cannot load"):
        Subnet.from_pretrained(tmp_path)
    subnet, net = make()
    with torch.no_grad():
        net[0].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="must be finite"):
        subnet.save_pretrained(tmp_path / "new", weights=net)
    assert not (tmp_path / "new").exists()
