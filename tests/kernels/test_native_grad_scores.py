"""grad_scores in C++: (grad_w_eff*weight + grad_penalty)*slope and its sums per score, against fp64."""

import pytest
import torch

pytest.importorskip("subnet_kernels._C", reason="the extension is not built")
from tests.kernels.native_inputs import (
    CAPABILITIES,
    COARSE,
    DTYPES,
    ROUNDOFF,
    assert_within,
    capability,
    gather,
    nan_like,
    ops,
    randn,
    spread,
)

BETA = torch.tensor(3.5)
PENALTY = torch.tensor(0.37)
SIZES = [(1,), (7,), (16,), (17,), (31, 1), (1, 63), (64,), (65,), (127, 131), (65537,), (3, 5, 7, 11)]


def run(grad, weight, scores, penalty=PENALTY, kind=0, wants_weight=True, beta=BETA):
    grad_scores = nan_like(scores)
    grad_weight = nan_like(weight) if wants_weight and grad is not None else None
    ops.grad_scores(grad, penalty, weight, scores, beta, kind, grad_scores, grad_weight)
    return grad_scores, grad_weight


def expected(grad, weight, scores, penalty, dtype):
    """(grad_scores, grad_weight) by the formula, and with absolute values, computed in `dtype`."""
    s, beta = scores.to(dtype), BETA.to(dtype)
    m = torch.sigmoid(beta * s)
    slope = beta * m * torch.sigmoid(-beta * s)
    per_weight = torch.zeros(weight.shape, dtype=dtype) if grad is None else grad.to(dtype) * weight.to(dtype)
    if penalty is not None:
        per_weight = per_weight + penalty.to(dtype)
    grad_weight = None if grad is None else grad.to(dtype) * spread(m, weight.shape)
    return gather(per_weight, scores.shape) * slope, grad_weight, slope


def check(grad, weight, scores, penalty=PENALTY):
    """Within 3*E + 8*u*A, E being eager PyTorch's own largest error in fp32, A the op on absolute values."""
    grad_scores, grad_weight = run(grad, weight, scores, penalty)
    truth, truth_weight, _ = expected(grad, weight, scores, penalty, torch.float64)
    eager, eager_weight, _ = expected(grad, weight, scores, penalty, torch.float32)
    size = expected(None if grad is None else grad.abs(), weight.abs(), scores, penalty, torch.float64)[0]
    worst = (eager.double() - truth).abs().max()
    assert_within(grad_scores, truth, 3 * worst + 8 * 2.0**-24 * size, "grad_scores")
    if grad is not None:
        worst = (eager_weight.to(weight.dtype).double() - truth_weight).abs().max()
        bound = 3 * worst + 8 * ROUNDOFF[weight.dtype] * truth_weight.abs()
        assert_within(grad_weight, truth_weight, bound, "grad_weight")


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_every_size_matches_fp64(name, shape):
    with capability(name):
        check(randn(shape, 2), randn(shape, 0), randn(shape, 1))


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_mix_of_dtypes_matches_fp64(name, dtype, grad_dtype):
    with capability(name):
        check(randn((67, 129), 2).to(grad_dtype), randn((67, 129), 0).to(dtype), randn((67, 129), 1))
        check(randn((67, 129), 2).to(grad_dtype), randn((67, 129), 0).to(dtype), randn((67, 1), 1))


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("unit", COARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coarser_scores_of_any_unit_and_layout_match_fp64(name, unit, dtype):
    shape, scores_shape, order = COARSE[unit]
    with capability(name):
        check(randn(shape, 2, order).to(dtype), randn(shape, 0, order).to(dtype), randn(scores_shape, 1))


@pytest.mark.parametrize("name", CAPABILITIES)
def test_each_gradient_alone_matches_fp64(name):
    weight, scores, grad = randn((45, 67), 0), randn((45, 67), 1), randn((45, 67), 2)
    with capability(name):
        for s in (scores, scores[:, :1].contiguous(), scores.t().contiguous().t()):
            check(grad, weight, s, penalty=None)
            check(None, weight, s)
            assert run(None, weight, s, penalty=None)[0].eq(0).all()
            assert torch.equal(run(grad, weight, s, wants_weight=False)[0], run(grad, weight, s)[0])


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_writing_over_grad_w_eff_gives_the_same_bits(name, order):
    weight, scores, grad = (randn((131, 67), i, order) for i in range(3))
    with capability(name):
        out_of_place, grad_weight = run(grad, weight, scores)
        again = nan_like(weight)
        ops.grad_scores(grad, PENALTY, weight, scores, BETA, 0, grad, again)
    assert torch.equal(grad, out_of_place) and torch.equal(again, grad_weight)


@pytest.mark.parametrize("order", [(1, 0), (0, 2, 3, 1), (3, 1, 0, 2)], ids=str)
def test_same_strides_in_any_order_of_dimensions_match_fp64(order):
    shape = (6, 35) if len(order) == 2 else (6, 5, 3, 7)
    check(randn(shape, 2, order), randn(shape, 0, order), randn(shape, 1, order))


def test_scores_and_their_gradient_may_have_any_strides():
    weight, grad = randn((70, 90), 0), randn((70, 90), 2)
    check(grad, weight, randn((70, 90), 1, (1, 0)))
    check(grad, weight, randn((140, 180), 1)[::2, ::2])
    check(grad, weight, randn((35, 60), 1, (1, 0))[:, ::2])
    scores = randn((70, 90), 1)
    large = torch.full((140, 180), 5.0)
    ops.grad_scores(grad, PENALTY, weight, scores, BETA, 0, large[::2, ::2], None)
    truth = expected(grad, weight, scores, PENALTY, torch.float64)[0]
    size = expected(grad.abs(), weight.abs(), scores, PENALTY, torch.float64)[0]
    assert_within(large[::2, ::2], truth, 16 * 2.0**-24 * size)
    assert large[1::2].eq(5).all() and large[:, 1::2].eq(5).all()


@pytest.mark.parametrize("name", CAPABILITIES)
def test_slopes_keep_their_relative_accuracy_into_saturation(name):
    scores = torch.linspace(-80, 80, 400_001)
    with capability(name):
        slope, _ = run(None, torch.ones_like(scores), scores, torch.tensor(1.0), beta=torch.tensor(1.0))
    s = scores.double()
    is_kept = s.abs() < 69.3  # beyond, a sigmoid below 2^-100 is 0
    truth = torch.where(is_kept, torch.sigmoid(s) * torch.sigmoid(-s), 0.0)
    assert_within(slope[s.abs() < 69.3], truth[is_kept], 5 * 2.0**-24 * truth[is_kept])
    assert not slope[s.abs() > 69.4].any()


@pytest.mark.parametrize("name", CAPABILITIES)
def test_extreme_scores_have_slope_zero_and_nan_stays_nan(name):
    scores = torch.tensor([1e30, -1e30, float("inf"), -float("inf"), 110.0, -110.0, 0.0, float("nan")])
    with capability(name):
        for repeat in (1, 8):
            s = scores.repeat(repeat)
            slope, _ = run(None, torch.ones_like(s), s, torch.tensor(1.0), beta=torch.tensor(8.0))
            assert slope.view(repeat, 8)[:, :7].tolist() == [[0.0] * 6 + [2.0]] * repeat
            assert slope.view(repeat, 8)[:, 7].isnan().all()


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("scores_shape", [(33, 17), (33, 1)], ids=str)
def test_a_hard_mask_gives_scores_no_gradient_and_weights_theirs(name, scores_shape):
    weight, grad, scores = randn((33, 17), 0), randn((33, 17), 2), randn(scores_shape, 1)
    grad[0, 0] = float("inf")
    with capability(name):
        grad_scores, grad_weight = run(grad, weight, scores.abs(), kind=1)
        assert grad_scores.eq(0).all() and torch.equal(grad_weight, grad)
        grad_scores, grad_weight = run(grad.nan_to_num(1.0), weight, scores, kind=1)
    assert grad_scores.eq(0).all() and torch.equal(grad_weight, grad.nan_to_num(1.0) * (scores > 0))


@pytest.mark.parametrize("scores_shape", [(700, 431), (700, 1), (1, 431), (1, 1), (70, 431)], ids=str)
def test_results_are_bit_identical_in_every_run_and_for_every_number_of_threads(scores_shape):
    weight, grad, scores = randn((700, 431), 0), randn((700, 431), 2), randn(scores_shape, 1)
    results = []
    threads = torch.get_num_threads()
    for num_threads in (1, 2, 2, 1):
        torch.set_num_threads(num_threads)
        results.append(run(grad, weight, scores))
    torch.set_num_threads(threads)
    for grad_scores, grad_weight in results[1:]:
        assert torch.equal(grad_scores, results[0][0]) and torch.equal(grad_weight, results[0][1])


@pytest.mark.parametrize("shapes", [((0,), (0,)), ((0, 5), (1, 5)), ((5, 0, 3), (5, 0, 1))], ids=str)
def test_scores_that_govern_no_weight_get_zero(shapes):
    weight, scores = torch.empty(shapes[0]), torch.ones(shapes[1])
    assert run(torch.empty(shapes[0]), weight, scores)[0].eq(0).all()


@pytest.mark.parametrize("shape", [(1, 2_000_003), (2_000_003, 1)], ids=str)
def test_a_long_sum_per_score_does_not_lose_digits(shape):
    total, _ = run(torch.full(shape, 0.1), torch.ones(shape), torch.zeros(1, 1), wants_weight=False)
    truth = (torch.tensor(0.1).double() + PENALTY.double()) * 2_000_003 * 3.5 / 4
    assert abs(total.item() / truth.item() - 1) < 2.0**-22
