"""effective_weight in C++: every instruction set, dtype, unit and layout against fp64."""

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
    nan_like,
    ops,
    randn,
    spread,
)

BETA = torch.tensor(3.5)
SIZES = [(1,), (7,), (16,), (17,), (31, 1), (1, 63), (64,), (65,), (127, 131), (16384,), (16385,), (3, 5, 7, 11)]


def run(weight, scores, out_dtype=None, beta=BETA, kind=0):
    w_eff = nan_like(weight, out_dtype)
    penalty = torch.tensor(float("nan"))
    ops.effective_weight(weight, scores, beta, kind, w_eff, penalty)
    return w_eff, penalty


def check(weight, scores, out_dtype=None):
    """Both outputs within the project's bound: 2*E + 4*u*A, E being eager PyTorch's own largest error."""
    out_dtype = out_dtype or weight.dtype
    w_eff, penalty = run(weight, scores, out_dtype)
    mask = spread(torch.sigmoid(BETA.double() * scores.double()), weight.shape)
    truth = weight.double() * mask
    eager_mask = spread(torch.sigmoid(BETA * scores), weight.shape)
    eager_error = ((weight.float() * eager_mask).to(out_dtype).double() - truth).abs().max()
    assert w_eff.stride() == weight.stride()
    assert_within(w_eff, truth, 2 * eager_error + 4 * ROUNDOFF[out_dtype] * truth.abs(), "w_eff")
    assert_within(penalty, mask.sum(), 4 * 2.0**-24 * mask.sum(), "penalty")


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_every_size_matches_fp64(name, shape):
    with capability(name):
        check(randn(shape, 0), 2 * randn(shape, 1))


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_mix_of_dtypes_matches_fp64(name, dtype, out_dtype):
    with capability(name):
        check(randn((67, 129), 0).to(dtype), randn((67, 129), 1), out_dtype)


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("unit", COARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coarser_scores_of_any_unit_and_layout_match_fp64(name, unit, dtype):
    shape, scores_shape, order = COARSE[unit]
    with capability(name):
        check(randn(shape, 0, order).to(dtype), randn(scores_shape, 1))


@pytest.mark.parametrize("order", [(1, 0), (0, 2, 3, 1), (3, 1, 0, 2)], ids=str)
def test_same_strides_in_any_order_of_dimensions_match_fp64(order):
    shape = (6, 35) if len(order) == 2 else (6, 5, 3, 7)
    check(randn(shape, 0, order), randn(shape, 1, order))


@pytest.mark.parametrize("name", CAPABILITIES)
def test_scores_of_other_strides_than_weight_match_fp64(name):
    with capability(name):
        check(randn((70, 90), 0), randn((70, 90), 1, (1, 0)))
        check(randn((70, 90), 0, (1, 0)), randn((70, 90), 1))
        check(randn((70, 90), 0), randn((140, 180), 1)[::2, ::2])
        check(randn((70, 90), 0), randn((70, 1), 1).expand(70, 90))


@pytest.mark.parametrize("name", CAPABILITIES)
def test_every_score_of_a_grid_is_within_three_units_of_roundoff(name):
    scores = torch.linspace(-69, 69, 400_001)  # beyond, a mask below 2^-100 is 0
    with capability(name):
        mask, _ = run(torch.ones_like(scores), scores, beta=torch.tensor(1.0))
    truth = torch.sigmoid(scores.double())
    assert_within(mask, truth, 3 * 2.0**-24 * truth)


@pytest.mark.parametrize("name", CAPABILITIES)
def test_extreme_scores_saturate_exactly_and_nan_stays_nan(name):
    scores = torch.tensor([1e30, -1e30, float("inf"), -float("inf"), 110.0, -110.0, 0.0, -0.0, float("nan")])
    with capability(name):
        for repeat in (1, 8):  # the remainder of a register, and whole ones
            mask, penalty = run(torch.ones(9 * repeat), scores.repeat(repeat), beta=torch.tensor(200.0))
            assert mask.view(repeat, 9)[:, :8].tolist() == [[1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.5, 0.5]] * repeat
            assert mask.view(repeat, 9)[:, 8].isnan().all() and penalty.isnan()


@pytest.mark.parametrize("name", CAPABILITIES)
def test_small_masks_keep_their_value_and_are_zero_below_two_to_the_minus_100(name):
    scores = torch.linspace(-104, -60, 4001)
    with capability(name):
        mask, _ = run(torch.ones_like(scores), scores, beta=torch.tensor(1.0))
    truth = torch.sigmoid(scores.double())
    is_kept = truth > 2.0**-100
    assert 3000 > is_kept.sum() > 500 and not mask[~is_kept].any()
    assert_within(mask[is_kept], truth[is_kept], 3 * 2.0**-24 * truth[is_kept])


@pytest.mark.parametrize("name", CAPABILITIES)
def test_a_hard_mask_keeps_positive_scores_only(name):
    scores = torch.tensor([-1.0, -0.0, 0.0, 1e-38, 2.0] * 13)
    with capability(name):
        w_eff, penalty = run(torch.full((65,), 3.0), scores, kind=1)
        coarse, coarse_penalty = run(torch.full((5, 4), 3.0), scores[:5].view(5, 1), kind=1)
    assert w_eff.tolist() == [0.0, 0.0, 0.0, 3.0, 3.0] * 13 and penalty.item() == 26
    assert coarse.sum(1).tolist() == [0.0, 0.0, 0.0, 12.0, 12.0] and coarse_penalty.item() == 8


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_weight_is_read_and_rounded_as_pytorch_does(name, dtype):
    weight = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    scores = torch.full((65536,), 1.0)
    with capability(name):
        copied, _ = run(weight, scores, torch.float32, kind=1)
        for scale in (0.5, 1.0 + 2.0**-9, 1.0 + 2.0**-12, 3e-5):  # ties, carries and subnormal results
            w_eff, _ = run(copied * scale, scores, dtype, kind=1)
            expected = (weight.float() * scale).to(dtype)
            assert torch.equal(w_eff.nan_to_num(0.0), expected.nan_to_num(0.0)) and w_eff.isnan().equal(weight.isnan())
    torch.testing.assert_close(copied, weight.float(), rtol=0, atol=0, equal_nan=True)


def test_large_values_round_to_infinity_in_fp16_from_65520_on():
    weight = torch.tensor([65504.0, 65519.996, 65520.0, 1e20, float("inf"), -65520.0])
    for name in CAPABILITIES:
        with capability(name):
            w_eff, _ = run(weight, torch.ones(6), torch.float16, kind=1)
        assert w_eff.tolist() == [65504.0, 65504.0] + [float("inf")] * 3 + [-float("inf")]


def test_the_sum_of_equal_masks_does_not_drift():
    scores = torch.full((1_000_003,), -0.1)
    _, penalty = run(torch.ones_like(scores), scores, beta=torch.tensor(1.0))
    truth = torch.sigmoid(torch.tensor(-0.1, dtype=torch.float32).double()) * 1_000_003
    assert abs(penalty.double() / truth - 1) < 2.0**-22.5


@pytest.mark.parametrize("scores_shape", [(700, 431), (700, 1), (1, 431)])
def test_results_are_bit_identical_in_every_run_and_for_every_number_of_threads(scores_shape):
    weight, scores = randn((700, 431), 0), randn(scores_shape, 1)
    results = []
    threads = torch.get_num_threads()
    for num_threads in (1, 2, 2, 1):
        torch.set_num_threads(num_threads)
        results.append(run(weight, scores))
    torch.set_num_threads(threads)
    for w_eff, penalty in results[1:]:
        assert torch.equal(w_eff, results[0][0]) and torch.equal(penalty, results[0][1])


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0, 3)], ids=str)
def test_an_empty_weight_has_penalty_zero(shape):
    assert run(torch.empty(shape), torch.empty(shape))[1].item() == 0.0


def test_effective_weights_equals_one_call_per_layer():
    shapes = [(64, 33), (5,), (0, 3), (8, 4, 3, 3), (200, 500)]
    weights = [randn(shape, i) for i, shape in enumerate(shapes)]
    scores = [randn(shape, 9 + i) for i, shape in enumerate(shapes)]
    scores[4] = scores[4][:, :1].contiguous()
    w_eff = [nan_like(weight) for weight in weights]
    penalties = torch.full((5,), float("nan"))
    ops.effective_weights(weights, scores, BETA, 0, w_eff, penalties)
    for i, weight in enumerate(weights):
        expected, penalty = run(weight, scores[i])
        assert torch.equal(w_eff[i], expected) and torch.equal(penalties[i], penalty)
    ops.effective_weights([], [], BETA, 0, [], torch.empty(0))
