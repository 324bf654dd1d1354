"""The odd-one-out objective of Break It Down, against logits by hand and against cosines in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from subnets import DiscoveryConfig, discover
from subnets.objectives import odd_one_out, odd_one_out_logits
from torch import nn
from torch.nn import functional as F


def test_three_equal_vectors_and_an_orthogonal_one_have_logits_minus_three_and_minus_one():
    z = torch.tensor([[2.0, 0, 0], [0.5, 0, 0], [0, 0, 7], [1, 0, 0]], dtype=torch.float64)  # lengths play no role
    assert odd_one_out_logits(z).tolist() == [-3, -3, -1, -3]
    # p(odd) = e^2 / (e^2 + 3)
    loss = odd_one_out(nn.Identity(), (z[None], torch.tensor([2])))
    assert loss.item() == pytest.approx(-math.log(math.e**2 / (math.e**2 + 3)), abs=1e-15)
    assert odd_one_out(nn.Identity(), (z[None], torch.tensor([0]))).item() == pytest.approx(2 + loss.item(), abs=1e-15)


def test_logits_are_minus_the_sum_of_cosines_with_the_item_itself():
    z = torch.randn(3, 5, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cosines = F.cosine_similarity(z.unsqueeze(-2), z.unsqueeze(-3), dim=-1)
    torch.testing.assert_close(odd_one_out_logits(z), -cosines.sum(-1), rtol=0, atol=1e-14)
    # without j = i every logit is larger by one, so no probability changes
    others = -(cosines - torch.eye(4, dtype=torch.float64)).sum(-1)
    torch.testing.assert_close(odd_one_out_logits(z).softmax(-1), others.softmax(-1), rtol=0, atol=1e-14)
    assert odd_one_out_logits(z.bfloat16()).dtype == torch.float32


def test_a_zero_embedding_is_not_like_anything_and_has_a_finite_gradient():
    z = torch.tensor([[1.0, 0], [1, 0], [0, 0], [1, 0]], requires_grad=True)
    assert odd_one_out_logits(z).tolist() == [-3, -3, 0, -3]
    odd_one_out(nn.Identity(), (z[None], torch.tensor([2]))).backward()
    assert z.grad is not None and bool(z.grad.isfinite().all())


def test_a_mask_is_found_that_looks_at_the_feature_that_makes_items_odd():
    # Three of four items share feature A (first 4 inputs); feature B (last 4) is different in all. The embedding copies
    # both, so the full network is at a loss; the mask has to drop B.
    g = torch.Generator().manual_seed(0)
    kinds = torch.eye(4)

    def draw(count):
        common, odd = torch.randint(4, (2, count), generator=g)
        a = kinds[common][:, None].repeat(1, 4, 1)
        a[torch.arange(count), odd] = kinds[(common + 1) % 4]
        return torch.cat([a, 3 * torch.randn(count, 4, 4, generator=g)], -1), odd

    model = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(8))
    x, odd = draw(512)

    def accuracy(model):
        return (odd_one_out_logits(model(x)).argmax(-1) == odd).float().mean().item()

    before = accuracy(model)
    config = DiscoveryConfig(epochs=15, lr=0.05, score_init=0.05, beta_end=200.0)
    found = discover(model, [draw(128) for _ in range(4)], odd_one_out, config, evaluate=accuracy)
    kept = found.subnet.masks["weight"].diagonal()
    assert before < 0.5 and kept.tolist() == [True] * 4 + [False] * 4
    with found.subnet.applied(model):
        assert accuracy(model) == 1.0


def test_bad_batches_are_refused():
    z = torch.randn(2, 4, 3)
    with pytest.raises(TypeError, match=r"batch must be a pair \(items, odd\)"):
        odd_one_out(nn.Identity(), z)
    with pytest.raises(ValueError, match=r"got \[2, 4, 3\] and \[4\]"):
        odd_one_out(nn.Identity(), (z, torch.zeros(4).long()))
    with pytest.raises(ValueError, match=r"B >= 1, got \[0, 4, 3\]"):
        odd_one_out(nn.Identity(), (z[:0], torch.zeros(0).long()))
    with pytest.raises(TypeError, match=r"an embedding \[width\] of each of the items, got \[24\]"):
        odd_one_out(nn.Flatten(0), (z, torch.zeros(2).long()))
    with pytest.raises(ValueError, match="two or more items"):
        odd_one_out_logits(z[:, :1])
