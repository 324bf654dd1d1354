"""What needs a GPU: the CUDA kernels, and layers, masks and anchors that follow their model there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import subnet_kernels as sk
from subnet_kernels.backends import native
from subnet_kernels.testing import conv_case, linear_case, ours, worst_errors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch can use no GPU here")]
needs_cuda_kernels = pytest.mark.skipif(not native.has_cuda_kernels(), reason="the extension has no CUDA kernels")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@needs_cuda_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_effective_weights_of_odd_sizes_are_within_the_error_bound_and_repeat_bit_for_bit(dtype):
    torch.manual_seed(0)
    shapes = [(1, 1), (3, 5), (127, 129), (64, 3, 3, 3), (0, 4), (1024, 1023)]
    weights = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    scores = [torch.randn(shape, device="cuda") for shape in shapes]
    with sk.use_backend("cuda"):
        first, penalty = sk.effective_weights(weights, scores, 3.0)
        second, penalty_again = sk.effective_weights(weights, scores, 3.0)
    assert torch.equal(penalty, penalty_again)
    exact = [w.double() * torch.sigmoid(3 * s.double()) for w, s in zip(weights, scores, strict=True)]
    u = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for a, b, true in zip(first, second, exact, strict=True):
        assert torch.equal(a, b)
        assert ((a.double() - true).abs() <= 1.001 * u * true.abs() + 6e-8).all()
    total = sum(torch.sigmoid(3 * s.double()).sum().item() for s in scores)
    assert penalty.item() == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_and_conv_on_the_gpu_are_within_the_error_bound(dtype):
    for case in (
        linear_case(33, 65, 129, dtype, device="cuda"),
        linear_case(7, 24, 36, dtype, scores_shape=(24, 1), is_transposed=True, device="cuda"),
        conv_case((2, 4, 9, 7), (6, 2, 3, 3), dtype, groups=2, padding=1, device="cuda"),
    ):
        worst = worst_errors(case, ours)
        assert max(worst.values()) <= 1, worst


def test_scores_beta_and_planted_weights_follow_the_model_and_hold_there():
    from subnets import mask_model, transfer

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    masks = mask_model(model)
    model.cuda()
    assert model[0].scores.is_cuda and model[0].beta.is_cuda
    optimizer = masks.adamw(lr=0.1, lam=1e-3)
    masks.anneal(to=100, steps=10)
    for _ in range(10):
        model(torch.randn(8, 16, device="cuda")).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.check_fresh()
    assert masks.beta == pytest.approx(100)
    subnet = masks.subnet()
    masks.unmask()
    fresh = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).cuda()
    transfer(subnet, model, fresh)
    optimizer = torch.optim.AdamW(fresh.parameters(), 0.1, fused=True)
    for _ in range(5):
        fresh(torch.randn(8, 16, device="cuda")).pow(2).mean().backward()
        optimizer.step()
    kept = subnet.masks["0.weight"].cuda()
    assert torch.equal(fresh[0].weight[kept], model[0].weight[kept])
