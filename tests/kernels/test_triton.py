"""The Triton backend against fp64: in Triton's interpreter where there is no GPU, compiled where there is one.

Interpreted and compiled kernels can't share a process: without a GPU this file needs `TRITON_INTERPRET=1 pytest
tests/kernels/test_triton.py`, as `make test` does. The interpreter has no bf16 product: there the kernels use fp32.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import subnet_kernels as sk
from subnet_kernels.backends.triton import TritonBackend, load_error
from subnet_kernels.testing import conv_case, linear_case, ours, worst_errors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if load_error() is not None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if DEVICE == "cpu" and not TritonBackend._is_interpreted():
    pytest.skip("no GPU: `make test` runs this file interpreted, in a process of its own", allow_module_level=True)

from subnet_kernels.backends.triton import configs, launch  # noqa: E402

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# one element, less than a tile, odd sizes, several tiles, a depth of several steps
SIZES = [(1, 1, 1), (3, 5, 7), (33, 65, 129), (70, 40, 200)]
BETA = torch.tensor(3.0, device=DEVICE)
SMALL_TILES = configs.Gemm(16, 32, 16, 4, 2, "many tiles and steps of small inputs")


def size_id(size):
    return "x".join(map(str, size))


def check(case, **kwargs):
    worst = worst_errors(case, lambda c: ours(c, backend="triton", **kwargs))
    assert max(worst.values()) <= 1, worst


@pytest.fixture
def small_tiles(monkeypatch):
    """Fused kernels whatever the dtype, in small tiles."""
    monkeypatch.setattr(configs, "fuses_score_gradient", lambda m, dtype: True)
    monkeypatch.setattr(configs, "score_gradient", lambda dtype, is_plain: SMALL_TILES)
    monkeypatch.setattr(configs, "small_m", lambda m, dtype, weight_dtype: SMALL_TILES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", ["cached", "fused"])
@pytest.mark.parametrize("size", SIZES, ids=size_id)
def test_linear_is_within_the_error_bound(size, plan, dtype):
    check(linear_case(*size, dtype, device=DEVICE), plan=plan)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", ["cached", "fused"])
def test_linear_in_many_tiles_and_steps_is_within_the_error_bound(plan, dtype):
    check(linear_case(50, 37, 70, dtype, device=DEVICE), plan=plan)
    check(replace(linear_case(50, 37, 70, dtype, device=DEVICE), wanted=("grad_scores",)), plan=plan)
    check(linear_case(50, 37, 70, dtype, bias=False, kind="hard", device=DEVICE), plan=plan)
    check(linear_case(20, 37, 70, dtype, is_transposed=True, device=DEVICE), plan=plan)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("num_processors", [1, 4, 132])
def test_a_sum_over_tokens_in_any_number_of_parts_is_within_the_error_bound(num_processors, dtype, monkeypatch):
    monkeypatch.setattr(configs, "num_processors", lambda device: num_processors)
    check(linear_case(333, 17, 35, dtype, device=DEVICE))


def test_parts_depend_on_sizes_and_device_alone_and_keep_four_steps():
    assert configs.split(num_tiles=144, num_steps=160, num_processors=132) == 1
    assert configs.split(num_tiles=4, num_steps=160, num_processors=132) == 33
    assert configs.split(num_tiles=4, num_steps=16, num_processors=132) == 4
    assert configs.split(num_tiles=1, num_steps=7, num_processors=132) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit", ["row", "column", "block", "one score", "transposed row", "same sums in parts"])
def test_coarse_scores_are_within_the_error_bound(unit, dtype, monkeypatch):
    if unit == "same sums in parts":
        monkeypatch.setattr(configs, "score_parts", lambda *args: (3, 100))
    shape = {"row": (12, 1), "column": (1, 20), "block": (3, 5), "one score": (1, 1)}.get(unit, (12, 1))
    if unit == "same sums in parts":
        shape = (1, 1)
    is_transposed = unit == "transposed row"
    check(linear_case(7, 12, 20, dtype, scores_shape=shape, is_transposed=is_transposed, device=DEVICE))


FILTER_UNITS = [(6, 1, 1, 1), (1, 4, 1, 1), (6, 4, 1, 1), (1, 1, 3, 3), (2, 2, 3, 1)]


@pytest.mark.parametrize("scores_shape", FILTER_UNITS, ids=size_id)
@pytest.mark.parametrize("is_channels_last", [False, True])
def test_coarse_scores_of_filters_are_within_the_error_bound(scores_shape, is_channels_last):
    check(conv_case(
        (2, 4, 6, 5), (6, 4, 3, 3), torch.float32, scores_shape=scores_shape, padding=1,
        is_channels_last=is_channels_last, device=DEVICE,
    ))  # fmt: skip


def test_the_weights_of_a_score_are_added_in_parts_that_fill_the_chip():
    assert configs.score_parts(num_scores=1, per_score=1_000_000, num_processors=132) == (244, 4099)
    assert configs.score_parts(num_scores=768, per_score=3072, num_processors=132) == (1, 3072)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_is_within_the_error_bound_in_both_memory_formats(dtype):
    for case in (
        conv_case((2, 4, 6, 5), (6, 2, 3, 3), dtype, groups=2, padding=1, device=DEVICE),
        conv_case((2, 3, 6, 5), (5, 3, 3, 1), dtype, stride=2, is_channels_last=True, device=DEVICE),
    ):
        check(case)


@pytest.mark.usefixtures("small_tiles")
def test_results_repeat_bit_for_bit_and_no_element_is_left_unwritten(monkeypatch):
    new, like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *a, **k: new(t, *a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda t, **k: like(t, **k).fill_(float("nan")))
    case = linear_case(200, 37, 70, torch.float32, device=DEVICE)

    def results(plan):
        x, scores = case.x.clone().requires_grad_(), case.scores.clone().requires_grad_()
        out, penalty = sk.masked_linear(x, case.weight, scores, BETA, case.bias, plan=plan, backend="triton")
        torch.autograd.backward((out, penalty), (case.grad_out, BETA))
        return out, penalty, x.grad, scores.grad

    for plan in ("cached", "fused"):
        first, second = results(plan), results(plan)
        assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_effective_weights_of_many_tensors_are_those_of_each(dtype, monkeypatch):
    shapes = [(1, 1), (3, 5), (127, 129), (8, 3, 3, 3), (0, 4), (70, 60)]
    weights = [torch.randn(shape, device=DEVICE) for shape in shapes]
    weights[1::2] = [w.to(dtype) for w in weights[1::2]]
    weights[3] = weights[3].contiguous(memory_format=torch.channels_last)
    weights[5] = weights[5].t()
    scores = [torch.randn(w.shape, device=DEVICE) for w in weights]
    calls = []
    many = launch.TritonKernels._launch_many
    monkeypatch.setattr(launch.TritonKernels, "_launch_many", lambda *a: (calls.append(len(a[1])), many(*a))[1])
    kind, dtypes = sk.masks.Sigmoid(), [w.dtype for w in weights]
    w_effs, penalties = launch.TritonKernels().effective_weights(weights, scores, BETA, kind, dtypes)
    assert sum(calls) == 5 and len(calls) == len(set(dtypes))  # one launch a dtype; the empty one needs none
    with sk.use_backend("triton"):
        alone = [sk.effective_weight(w, s, 3.0) for w, s in zip(weights, scores, strict=True)]
    for w, s, w_eff, (one, _) in zip(weights, scores, w_effs, alone, strict=True):
        assert w_eff.dtype == w.dtype and w_eff.stride() == w.stride() and torch.equal(w_eff, one)
        truth = w.double() * torch.sigmoid(3 * s.double())
        roundoff = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}[w.dtype]
        assert ((w_eff.double() - truth).abs() <= roundoff * truth.abs() + 6e-8).all()
    total = sum(torch.sigmoid(3 * s.double()).sum().item() for s in scores)
    assert penalties.sum().item() == pytest.approx(total, rel=1e-6)
    assert penalties.tolist() == pytest.approx([p.item() for _, p in alone], rel=1e-6)


def test_no_table_is_copied_to_the_device_while_addresses_stay():
    weights = [torch.randn(5, 7, device=DEVICE) for _ in range(3)]
    scores = [torch.randn(5, 7, device=DEVICE) for _ in range(3)]
    out = [torch.empty(5, 7, device=DEVICE) for _ in range(3)]
    kernels, kind = launch.TritonKernels(), sk.masks.Sigmoid()
    for step in range(3):
        before = launch._table.cache_info()
        kernels.effective_weights(weights, scores, BETA, kind, [torch.float32] * 3, out)
        assert launch._table.cache_info().misses == before.misses + (step == 0)
        scores[0].add_(1.0)
    assert torch.allclose(out[0], weights[0] * torch.sigmoid(3 * (scores[0] - 1)), atol=1e-6)


def test_saturated_masks_are_exactly_zero_and_one_and_nan_stays():
    scores = torch.tensor([[-24.0, 24.0, 0.0, float("nan"), -23.0, float("inf"), float("-inf")]], device=DEVICE)
    weight = torch.ones_like(scores)
    for backend in ("triton", "reference"):
        with sk.use_backend(backend):
            w_eff, _ = sk.effective_weight(weight, scores, 3.0)
        assert w_eff[0, :3].tolist() == [0.0, 1.0, 0.5] and w_eff[0, 3].isnan() and 0 < w_eff[0, 4] < 1e-29
        assert w_eff[0, 5:].tolist() == [1.0, 0.0]


def test_a_masked_model_trains_as_on_the_reference_backend():
    from subnets import mask_model

    def trained(backend):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(9, 20), torch.nn.ReLU(), torch.nn.Linear(20, 3)).to(DEVICE)
        masks = mask_model(model)
        optimizer = masks.adamw(lr=0.1, lam=1e-3)
        masks.anneal(to=100, steps=5)
        x = torch.randn(30, 9, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        with sk.use_backend(backend):
            for _ in range(5):
                optimizer.zero_grad()
                with masks.collect_penalty() as penalty:
                    loss = model(x).square().mean()
                (loss + 1e-3 * penalty()).backward()
                optimizer.step()
        return [layer.scores.detach() for layer in masks.layers.values()]

    for a, b in zip(trained("triton"), trained("reference"), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kwargs", "conv", "reason"), [
    ({"scores_shape": (6, 1), "plan": "fused"}, False, "not built in Triton yet for scores coarser than weight"),
    ({"dtype": torch.float64}, False, "torch.float64 weight computed in torch.float64 is not among its dtypes"),
    ({"plan": "fused"}, True, "plan 'fused' is not built in Triton yet for convolutions"),
])  # fmt: skip
def test_what_is_not_built_is_refused_in_words(kwargs, conv, reason):
    plan = kwargs.pop("plan", None)
    kwargs["device"] = DEVICE
    case = conv_case((1, 2, 4, 4), (3, 2, 3, 3), **kwargs) if conv else linear_case(4, 6, 8, **kwargs)
    with pytest.raises(sk.BackendRefused, match=reason):
        ours(case, backend="triton", plan=plan)


def test_empty_batches_and_weights_are_served():
    for size in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        for plan in ("cached", "fused"):
            check(linear_case(*size, device=DEVICE), plan=plan)
    check(linear_case(1000, 0, 4, torch.float16, device=DEVICE))


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_either_of_torchs_switches_for_tf32_is_heeded(precision, monkeypatch):
    for set_it in (
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", precision == "tf32"),
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", precision),
    ):
        before = torch.backends.cuda.matmul.fp32_precision
        try:
            set_it()
            assert launch._dot_options(torch.float32)["PRECISION"] == precision
            assert launch._dot_options(torch.bfloat16)["PRECISION"] == "ieee"
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
