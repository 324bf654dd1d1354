"""What a subnet remembers of where it comes from, and its ranks where a mask set or a discovery makes it."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from subnets import DiscoveryConfig, discover, mask_model
from subnets.provenance import NAMED
from torch import nn


def regression() -> tuple[nn.Module, list, object]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(32, 6)
    return model, [(x, x[:, :2])], lambda model, batch: F.mse_loss(model(batch[0]), batch[1])


def test_a_mask_set_and_a_discovery_give_ranks_when_asked():
    model, batches, loss = regression()
    config = DiscoveryConfig(epochs=3, lr=0.1, score_init=0.1, keep_ranks=True, targets="all-linear")
    seen = []
    found = discover(
        model, batches, loss, config,
        callbacks=[lambda row, masks: seen.append({n: la.scores.detach().clone() for n, la in masks.layers.items()})],
    )  # fmt: skip
    expected = found.subnet.with_ranks(seen[-1])
    assert all(torch.equal(found.subnet.ranks[n], expected.ranks[n]) for n in expected.masks)
    assert len(set(torch.cat(list(expected.ranks.values())).tolist())) > 20
    masks = mask_model(model, targets="all-linear", init=seen[-1])
    assert masks.subnet().ranks is None
    assert all(torch.equal(its, expected.ranks[n]) for n, its in masks.subnet(ranks=True).ranks.items())


def test_a_discovery_that_goes_on_from_a_checkpoint_has_the_same_ranks(tmp_path):
    def found(checkpoint, scores, keep_ranks=True, killed_after=None):
        model, batches, loss = regression()
        config = DiscoveryConfig(
            epochs=4, lr=0.1, score_init=0.1, targets="all-linear", checkpoint=checkpoint, keep_ranks=keep_ranks
        )

        def kill(row, masks):
            if row["epoch"] == killed_after:
                raise KeyboardInterrupt

        scores = iter(scores)
        return discover(model, batches, loss, config, evaluate=lambda model: next(scores), callbacks=[kill])

    alone = found(tmp_path / "alone", (0.1, 0.9, 0.2, 0.3))
    with pytest.raises(KeyboardInterrupt):
        found(tmp_path / "killed", (0.1, 0.9, 0.2), killed_after=2)
    with pytest.raises(ValueError, match="keep_ranks"):
        found(tmp_path / "killed", (), keep_ranks=False)
    again = found(tmp_path / "killed", (0.2, 0.3))
    assert again.best["epoch"] == alone.best["epoch"] == 1
    assert all(torch.equal(its, alone.subnet.ranks[name]) for name, its in again.subnet.ranks.items())


def test_discover_fills_in_what_it_knows():
    model, batches, loss = regression()
    config = DiscoveryConfig(epochs=2, seed=5, lam=1e-3, targets="all-linear")
    found = discover(model, batches, loss, config, evaluate=lambda m: 0.5)
    known = found.subnet.provenance
    assert (known["method"], known["architecture"], known["seed"], known["lam"]) == ("discover", "Sequential", 5, 1e-3)
    assert known["beta"] == found.best["beta"] == pytest.approx(10) and known["metrics"]["score"] == 0.5
    assert known["versions"]["torch"] == str(torch.__version__) and "transformers" not in known["versions"]
    assert "base_model" not in known and found.subnet.ranks is None
    assert "keep_ranks" not in known["config"]


def test_the_guide_explains_every_named_entry():
    page = (Path(__file__).resolve().parents[2] / "docs" / "subnets.md").read_text()
    table = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert all(f"`{name}`" in table for name in NAMED)


def test_a_mask_set_names_the_base_model_of_a_transformers_model():
    shape = dict(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=11)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, name_or_path="gpt2-tiny"))
    masks = mask_model(model)
    masks.beta = 3.0
    known = masks.subnet(task="t", lam=0.5).provenance
    versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
    assert known["versions"].items() >= versions.items()
    del known["versions"]
    assert known == {
        "base_model": "gpt2-tiny", "architecture": "GPT2LMHeadModel", "num_heads": 2, "beta": 3.0, "task": "t",
        "lam": 0.5, "undecided": 1.0,
    }  # fmt: skip
    assert json.dumps(known)
    assert mask_model(nn.Linear(2, 2)).subnet().provenance["architecture"] == "Linear"
