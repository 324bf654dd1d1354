"""The Triton backend against fp64: in Triton's interpreter where there is no GPU, compiled where there is one.

Interpreted and compiled kernels can't share a process: without a GPU this file needs `TRITON_INTERPRET=1 pytest
tests/kernels/test_triton.py`, as `make test` does. The interpreter has no bf16 product: there the kernels use fp32.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import subnet_kernels as sk
from benchmarks import gpu_masks
from subnet_kernels import rounding, testing
from subnet_kernels.backends.base import AdamW
from subnet_kernels.backends.triton import TritonBackend, load_error
from subnet_kernels.masks import as_kind
from subnet_kernels.testing import (
    Stepped,
    adamw_in_fp64,
    conv_case,
    grad_of_step,
    linear_case,
    linear_grad_of_step,
    ours,
    run,
    stepped,
    worst_errors,
    worst_step_errors,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if load_error() is not None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if DEVICE == "cpu" and not TritonBackend._is_interpreted():
    pytest.skip("no GPU: `make test` runs this file interpreted, in a process of its own", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from subnet_kernels.backends.triton import configs, launch, products, rules  # noqa: E402
from subnet_kernels.backends.triton import rounding as triton_rounding  # noqa: E402

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


@pytest.fixture(autouse=True)
def vendor_in_fp32_and_deterministic():
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    """Fused kernels whatever the dtype, in small tiles."""

    def parts(m, n, k, on):
        tiles = -(-n // SMALL_TILES.rows) * -(-k // SMALL_TILES.columns)
        return SMALL_TILES, rules.split(tiles, -(-m // SMALL_TILES.depth), on.num_processors)

    monkeypatch.setattr(rules, "score_gradient", lambda dtype, m, n, k, is_plain, on: parts(m, n, k, on))
    monkeypatch.setattr(rules, "fastest_score_gradient", lambda dtype, m, n, k, is_plain, on: parts(m, n, k, on))
    monkeypatch.setattr(rules, "linear_step", lambda dtype, m, n, k, is_plain, on: parts(m, n, k, on))
    for name in ("score_gradients_of_masks", "fastest_score_gradients_of_masks"):
        monkeypatch.setattr(rules, name, lambda *args: SMALL_TILES)
    monkeypatch.setattr(rules, "masked_product", lambda *args: SMALL_TILES)
    monkeypatch.setattr(rules, "masked_conv", lambda *args: SMALL_TILES)
    monkeypatch.setattr(rules, "CONV_SCORE_GRADIENT", {2: SMALL_TILES, 4: SMALL_TILES})


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
    monkeypatch.setattr(rules, "chip", lambda device: replace(rules.H200, num_processors=num_processors))
    check(linear_case(333, 17, 35, dtype, device=DEVICE))


def test_parts_depend_on_sizes_and_device_alone_and_keep_four_steps():
    assert rules.split(num_tiles=144, num_steps=160, num_processors=132) == 1
    assert rules.split(num_tiles=4, num_steps=160, num_processors=132) == 33
    assert rules.split(num_tiles=4, num_steps=16, num_processors=132) == 4
    assert rules.split(num_tiles=1, num_steps=7, num_processors=132) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit", ["row", "column", "block", "one score", "transposed row", "same sums in parts"])
def test_coarse_scores_are_within_the_error_bound(unit, dtype, monkeypatch):
    if unit == "same sums in parts":
        monkeypatch.setattr(rules, "score_parts", lambda *args: (3, 100))
    shape = {"row": (12, 1), "column": (1, 20), "block": (3, 5), "one score": (1, 1)}.get(unit, (12, 1))
    if unit == "same sums in parts":
        shape = (1, 1)
    is_transposed = unit == "transposed row"
    check(linear_case(7, 12, 20, dtype, scores_shape=shape, is_transposed=is_transposed, device=DEVICE))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(12, 1), (1, 20), (3, 5), (1, 1)], ids=size_id)
def test_fused_products_with_coarse_scores_are_within_the_error_bound(shape, dtype):
    for is_transposed in (False, True):
        case = linear_case(7, 12, 20, dtype, scores_shape=shape, is_transposed=is_transposed, device=DEVICE)
        check(case, plan="fused")


# weight, then the input's channels, height and width, then the geometry
CONVS = {
    "3x3 padded": ((6, 4, 3, 3), (4, 6, 5), {"padding": 1}),
    "strided": ((5, 3, 3, 1), (3, 7, 6), {"stride": (2, 1), "padding": (1, 0)}),
    "stride beyond the kernel": ((5, 3, 2, 2), (3, 9, 8), {"stride": 3}),
    "dilated": ((4, 2, 2, 3), (2, 8, 9), {"dilation": (2, 3), "padding": (0, 2)}),
    "groups": ((6, 2, 3, 3), (4, 6, 5), {"groups": 2, "padding": 1, "stride": 2}),
    "one input a group": ((6, 1, 3, 3), (3, 5, 5), {"groups": 3}),
    "1x1": ((7, 5, 1, 1), (5, 3, 4), {}),
    "1x1 strided": ((7, 5, 1, 1), (5, 5, 4), {"stride": 2}),
    "many tiles": ((35, 40, 2, 2), (40, 7, 8), {"padding": 1}),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CONVS)
def test_fused_convolution_is_within_the_error_bound(name, is_channels_last, dtype):
    weight, x, conv = CONVS[name]
    check(conv_case((2, *x), weight, dtype, is_channels_last=is_channels_last, device=DEVICE, **conv), plan="fused")


def test_fused_convolution_in_the_shipped_tiles_hard_or_with_one_gradient_wanted_is_within_the_error_bound():
    for dtype in DTYPES:
        check(conv_case((2, 3, 9, 8), (10, 3, 3, 3), dtype, padding=1, device=DEVICE), plan="fused")
    case = conv_case((2, 3, 9, 8), (10, 3, 3, 3), kind="hard", bias=False, device=DEVICE)
    check(case, plan="fused")
    for wanted in ("grad_x", "grad_weight", "grad_scores"):
        check(replace(case, kind="sigmoid", wanted=(wanted,)), plan="fused")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("num_processors", [1, 8, 132])
def test_a_sum_over_pixels_in_any_number_of_parts_is_within_the_error_bound(num_processors, monkeypatch):
    monkeypatch.setattr(rules, "chip", lambda device: replace(rules.H200, num_processors=num_processors))
    check(conv_case((3, 3, 11, 12), (17, 3, 2, 2), torch.float16, device=DEVICE), plan="fused")


FILTER_UNITS = [(6, 1, 1, 1), (1, 4, 1, 1), (6, 4, 1, 1), (1, 1, 3, 3), (2, 2, 3, 1)]


@pytest.mark.parametrize("scores_shape", FILTER_UNITS, ids=size_id)
@pytest.mark.parametrize("is_channels_last", [False, True])
def test_coarse_scores_of_filters_are_within_the_error_bound(scores_shape, is_channels_last):
    for plan in ("cached", "fused"):
        check(conv_case(
            (2, 4, 6, 5), (6, 4, 3, 3), torch.float32, scores_shape=scores_shape, padding=1,
            is_channels_last=is_channels_last, device=DEVICE,
        ), plan=plan)  # fmt: skip


def test_scores_shared_across_the_groups_of_a_convolution_are_within_the_error_bound():
    for plan in ("cached", "fused"):
        for scores_shape in ((3, 1, 1, 1), (3, 2, 3, 1), (1, 1, 1, 1)):  # 2 outputs a score, 3 outputs a group
            check(conv_case(
                (2, 4, 6, 5), (6, 2, 3, 3), torch.float32, scores_shape=scores_shape, padding=1, groups=2,
                device=DEVICE,
            ), plan=plan)  # fmt: skip


def test_the_weights_of_a_score_are_added_in_parts_that_fill_the_chip():
    assert rules.score_parts(num_scores=1, per_score=1_000_000, num_processors=132) == (244, 4099)
    assert rules.score_parts(num_scores=768, per_score=3072, num_processors=132) == (1, 3072)


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
    many = products.TritonKernels._launch_many
    monkeypatch.setattr(products.TritonKernels, "_launch_many", lambda *a: (calls.append(len(a[1])), many(*a))[1])
    kind, dtypes = sk.masks.Sigmoid(), [w.dtype for w in weights]
    w_effs, penalties = products.TritonKernels().effective_weights(weights, scores, BETA, kind, dtypes)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_score_gradients_of_many_tensors_are_those_of_each(dtype):
    shapes = [(6, 4, 3, 3), (1, 1, 1, 1), (40, 30, 1, 2), (0, 4, 1, 1), (5, 4, 3, 3)]
    weights = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
    grads = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
    weights[2] = weights[2].contiguous(memory_format=torch.channels_last)  # its gradient is not
    scores = [torch.randn_like(w, dtype=torch.float32) for w in weights]
    scores[4] = torch.randn(5, 1, 1, 1, device=DEVICE)
    lam = torch.tensor(0.3, device=DEVICE)
    penalties = [lam, None, lam, lam, lam]
    kernels, kind = launch.TritonElementwise(), sk.masks.Sigmoid()
    many = kernels.grad_scores_of_many([g.clone() for g in grads], penalties, weights, scores, BETA, kind)
    for g, p, w, s, made in zip(grads, penalties, weights, scores, many, strict=True):
        assert made.shape == s.shape and made.stride() == s.stride() and made.dtype == torch.float32
        assert torch.equal(made, kernels.grad_scores(g.clone(), p, w, s, BETA, kind, True, False)[0])
        z = 3 * s.double()
        slope = 3 * torch.sigmoid(z) * torch.sigmoid(-z)
        of_penalty = 0.0 if p is None else 0.3 * w.numel() / max(s.numel(), 1)
        total = (g.double() * w.double()).sum_to_size(s.shape) + of_penalty
        size = (g.double() * w.double()).abs().sum_to_size(s.shape) + of_penalty
        relative = 2.0**-21 * (1 + z.abs() / 4)  # exp of an argument that was rounded
        assert ((made.double() - total * slope).abs() <= relative * size * slope).all()


@pytest.mark.parametrize("part", ["effective_weights", "grad_scores", "step", "training"])
def test_several_masks_over_one_weight_are_right_and_to_the_bit_those_of_one_call_a_mask(part):
    shapes = ((33, 65), (0, 5))
    given = () if part == "training" else (shapes,)
    checks = list(getattr(gpu_masks, f"{part}_checks")(DEVICE, 0, launch.TritonElementwise(), *given))
    assert {name: ratio for name, ratio in checks if not ratio <= 1} == {}
    assert max(ratio for name, ratio in checks if "to the bit" not in name) > 0.1  # it does measure


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("groups", "dtype"), [((1, 3), "fp32"), ((8,), "fp16"), ((3,), "bf16")])
def test_score_gradients_of_masks_inside_their_products_are_right_and_those_of_one_mask_at_a_time(groups, dtype):
    checks = list(gpu_masks.product_checks(DEVICE, 0, products.TritonKernels(), ((20, 17, 35),), groups, (dtype,)))
    assert {name: ratio for name, ratio in checks if not ratio <= 1} == {}
    assert max(ratio for name, ratio in checks if "to the bit" not in name) > 0.01  # it does measure


def test_products_of_masks_that_the_kernel_does_not_serve_or_that_the_rules_give_to_the_vendor_are_left():
    kernels, kind = products.TritonKernels(), as_kind("sigmoid")

    def made(num_masks, m, n, k, dtype=torch.bfloat16, kind=kind, scores_shape=None):
        grad_out, x = torch.ones(num_masks, m, n, device=DEVICE).to(dtype), torch.ones(m, k, device=DEVICE).to(dtype)
        weight, scores = x.new_ones(n, k), torch.ones(num_masks, *(scores_shape or (n, k)), device=DEVICE)
        return kernels.linear_grad_scores_of_masks(grad_out, x, None, weight, scores, BETA, kind)

    assert made(2, 20, 64, 64) is not None
    assert made(2, 20, 64, 64, torch.float32) is None  # to the vendor
    assert made(2, 20, 64, 64, kind=as_kind("hard")) is None
    assert made(2, 20, 64, 64, scores_shape=(64, 1)) is None
    assert made(2, 0, 64, 64) is None


@pytest.mark.parametrize("form", ["one", "numbers", "tensors", "mixed"])
def test_numbers_of_entries_are_those_of_one_call_an_entry_in_a_capture_too(form, monkeypatch):
    monkeypatch.setattr(launch, "memory_number", lambda tensor: 1)
    states = [stepped((5, 7), 3, dtype=torch.float32, seed=i, device=DEVICE) for i in range(4)]
    grads = [grad_like(s, seed=i) for i, s in enumerate(states)]
    numbers, true = gpu_masks.numbers_of(4, form, DEVICE)
    runs = [gpu_masks.stepped(products.TritonKernels(), states, grads, None, given, [range(4)])
            for given in (numbers, true)]  # fmt: skip
    for state, grad, one, new, by_floats in zip(states, grads, true, *runs, strict=True):
        assert max(worst_step_errors(state, new, grad.double(), 0.0, one).values()) <= 1
        assert all(torch.equal(a, b) for a, b in zip(new.written(), by_floats.written(), strict=True))


class Vendor(TorchDispatchMode):
    """Names the vendor products, convolutions and effective weights that run inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "matmul", "linear", "convolution", "convolution_backward", "conv2d"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_plan_fused_calls_no_vendor_product_and_makes_no_effective_weight(monkeypatch):
    monkeypatch.setattr(products.TritonKernels, "effective_weight", None)
    image = (2, 4, 6, 5)
    cases = [
        linear_case(9, 10, 12, device=DEVICE), linear_case(9, 10, 12, is_transposed=True, device=DEVICE),
        conv_case(image, (6, 4, 3, 3), padding=1, device=DEVICE), conv_case(image, (6, 4, 1, 1), device=DEVICE),
        conv_case(image, (6, 4, 1, 1), is_channels_last=True, device=DEVICE),
    ]  # fmt: skip
    for case in cases:
        with Vendor() as vendor:
            run(case, lambda c: ours(c, backend="triton", plan="fused"))
        assert vendor.seen == []
    rows = linear_case(9, 10, 12, scores_shape=(10, 1), device=DEVICE)
    x, scores = rows.x.requires_grad_(), rows.scores.requires_grad_()
    with Vendor() as vendor:
        out, _ = sk.masked_linear(x, rows.weight, scores, 3.0, backend="triton", plan="fused")
        out.backward(rows.grad_out)
    assert vendor.seen == ["mm"]  # the weight gradient, whose rows are then added


def test_no_table_is_copied_to_the_device_while_addresses_stay():
    weights = [torch.randn(5, 7, device=DEVICE) for _ in range(3)]
    scores = [torch.randn(5, 7, device=DEVICE) for _ in range(3)]
    out = [torch.empty(5, 7, device=DEVICE) for _ in range(3)]
    kernels, kind = products.TritonKernels(), sk.masks.Sigmoid()
    for step in range(3):
        before = launch._addresses.cache_info()
        kernels.effective_weights(weights, scores, BETA, kind, [torch.float32] * 3, out)
        assert launch._addresses.cache_info().misses == before.misses + (step == 0)
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


@pytest.mark.parametrize("lam", [0.25, torch.tensor(0.25, device=DEVICE), torch.tensor(0.25, device=DEVICE).double()])
def test_add_penalty_grad_adds_lam_times_count_times_slope(lam):
    scores = [torch.randn(shape, device=DEVICE) for shape in ((70, 33), (1, 1), (5, 7))]
    scores[2] = scores[2].t()
    grads = [torch.randn_like(s) for s in scores]
    expected = [
        g.double() + 0.25 * count * 3 * torch.sigmoid(3 * s.double()) * torch.sigmoid(-3 * s.double())
        for g, s, count in zip(grads, scores, (1, 7, 40), strict=True)
    ]
    launch.TritonElementwise().add_penalty_grad_(grads, scores, [1, 7, 40], BETA, lam, as_kind("sigmoid"))
    for grad, true in zip(grads, expected, strict=True):
        assert ((grad - true).abs() <= 2.0**-21 * (true.abs() + 10)).all()


@pytest.mark.parametrize("lam", [1e-3, torch.tensor(1e-3, device=DEVICE)], ids=["float", "tensor"])
def test_a_masked_model_trains_as_on_the_reference_backend(lam):
    from subnets import mask_model

    def trained(backend):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(9, 20), torch.nn.ReLU(), torch.nn.Linear(20, 3)).to(DEVICE)
        masks = mask_model(model)
        optimizer = masks.adamw(lr=0.1, lam=lam)
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


def test_what_is_not_built_is_refused_in_words():
    with pytest.raises(sk.BackendRefused, match=r"torch.float64 weight computed in torch.float64 is not among its"):
        ours(linear_case(4, 6, 8, torch.float64, device=DEVICE), backend="triton")


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
            assert products.dot_options(torch.float32)["PRECISION"] == precision
            assert products.dot_options(torch.bfloat16)["PRECISION"] == "ieee"
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("small_tiles")
def test_tuning_runs_every_tile_through_the_call_and_writes_a_table_that_is_then_used(tmp_path, monkeypatch):
    from benchmarks import tune
    from benchmarks.cases import LayerCase

    monkeypatch.undo()  # the ordinary rules
    monkeypatch.setattr(rules, "TABLES", tmp_path)
    rules.forget()
    seen = []

    def times(functions):
        for function in functions.values():
            function()
        seen.append(list(functions))
        return {name: 50.0 if name == "other" else 10.0 + len(name) for name in functions}

    tiles = [(16, 32, 16, 4, 2), (32, 32, 16, 4, 2)]
    case = LayerCase((32, 48), (40, 48), "bf16")
    entries = [tune.tune_case(case, kernel, DEVICE, times, tiles, lambda text: None)
               for kernel in ("score_gradient", "masked_product")]  # fmt: skip
    assert [len(names) for names in seen] == [3, 3] and all(names[0] == "other" for names in seen)
    assert rules.table("NVIDIA H200") == {}  # as it was
    env = {"device": "NVIDIA H200", "torch": "t", "triton": "t", "commit": "c"}
    tune.write_table(rules.table_path("NVIDIA H200"), entries, env)
    tune.write_table(rules.table_path("NVIDIA H200"), entries[:1], env)
    rules.forget()
    on = rules.H200
    assert len(rules.table(on.name)) == 2
    assert rules.score_gradient(torch.bfloat16, 40, 32, 48, True, on)[0] == replace(
        configs.Gemm(*tiles[0], reason="measured")
    )
    assert rules.fuses_product(torch.bfloat16, 40, 32, 48, on)
    used = []
    product = products.TritonKernels._masked_product
    monkeypatch.setattr(products.TritonKernels, "_masked_product", lambda *a: (used.append(1), product(*a))[1])
    monkeypatch.setattr(rules, "chip", lambda device: on)
    built = case.build(DEVICE)
    assert "backend triton, plan fused" in sk.explain(
        "masked_linear", built.x, built.weight, built.scores, 3.0, backend="triton"
    )
    out, _ = sk.masked_linear(built.x, built.weight, built.scores, 3.0, built.bias, backend="triton")
    cached, _ = sk.masked_linear(built.x, built.weight, built.scores, 3.0, built.bias, backend="triton", plan="cached")
    assert used == [1] and torch.allclose(out, cached, rtol=0.02, atol=0.02)
    check(built)
    assert used == [1]  # a backward pass would make the mask again: with gradients an open plan is "cached"
    rules.forget()


def test_offsets_beyond_32_bits_are_addressed(tmp_path):
    if DEVICE == "cuda":
        far = torch.zeros(2**31 + 4096, dtype=torch.float16, device=DEVICE)
    else:  # a sparse file: pages that are not touched need no memory
        far = torch.from_file(str(tmp_path / "far"), shared=True, size=2**31 + 4096, dtype=torch.float16)
    small = linear_case(3, 20, 24, torch.float16, device=DEVICE)
    rows = far.as_strided((3, 24), (2**30 + 8, 1)).copy_(small.x)
    image = conv_case((3, 4, 5, 3), (6, 4, 3, 3), torch.float16, padding=1, device=DEVICE)
    images = far[1024:].as_strided(image.x.shape, (2**30 + 8, 15, 3, 1)).copy_(image.x)
    for case, x in ((small, rows), (image, images)):
        for plan in ("cached", "fused"):
            near = run(case, lambda c, plan=plan: ours(c, backend="triton", plan=plan))
            beyond = run(replace(case, x=x), lambda c, plan=plan: ours(c, backend="triton", plan=plan))
            assert all(torch.equal(near[name], beyond[name]) for name in near)


FORMATS = {
    "contiguous": lambda t: t, "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced channels_last": lambda t: t.repeat(1, 2, 1, 1).contiguous(memory_format=torch.channels_last)[
        :, : t.shape[1]
    ],
}  # fmt: skip


@pytest.mark.parametrize(("channels", "size", "is_channels_last"), [
    (1, 1, "001"), (1, 3, "001"), (4, 1, "011"), (4, 3, "011"),
])  # fmt: skip
def test_a_fused_convolution_lies_in_memory_as_torchs_own_does_on_a_gpu(channels, size, is_channels_last):
    """What PyTorch's CUDA builds say for F.conv2d (fake tensors, 2.11): by format of x; a channels_last weight that is
    not contiguous as well makes the result channels_last, too."""
    for (name, x_format), is_last in zip(FORMATS.items(), is_channels_last, strict=True):
        for weight_format in ("contiguous", "channels_last"):
            x = x_format(torch.randn(2, channels, 5, 4, device=DEVICE))
            weight = FORMATS[weight_format](torch.randn(6, channels, size, size, device=DEVICE))
            out, _ = sk.masked_conv2d(x, weight, torch.zeros_like(weight), 3.0, backend="triton", plan="fused")
            decides = weight_format == "channels_last" and (channels, size) == (4, 3)
            expected = torch.channels_last if is_last == "1" or decides else torch.contiguous_format
            assert out.stride() == torch.empty(out.shape).contiguous(memory_format=expected).stride(), name


def test_an_image_too_large_for_32_bit_offsets_goes_to_the_vendor(monkeypatch):
    monkeypatch.setattr(products, "LARGEST_IMAGE", 20)
    case = conv_case((2, 4, 6, 5), (6, 4, 3, 3), padding=1, device=DEVICE)
    with Vendor() as vendor:
        check(case, plan="fused")
    assert "convolution" in vendor.seen and "convolution_backward" in vendor.seen


@pytest.mark.parametrize("is_captured", [False, True], ids=["one launch", "one by one"])
@pytest.mark.parametrize("has_tensors", [False, True], ids=["numbers", "tensors"])
def test_one_pass_of_the_optimizer_is_adamw_and_writes_the_effective_weights_of_the_next_beta(
    has_tensors, is_captured, monkeypatch
):
    monkeypatch.setattr(launch, "memory_number", lambda tensor: int(is_captured))
    torch.manual_seed(0)
    shapes = [(1, 1), (3, 5), (40, 60), (8, 3, 3, 3), (0, 4), (33, 31)]
    weights = [torch.randn(shape, device=DEVICE) for shape in shapes]
    weights[1], weights[3] = weights[1].half(), weights[3].contiguous(memory_format=torch.channels_last)

    def like(weight, scale=1.0):
        return torch.randn(weight.shape, device=DEVICE).mul_(scale).as_strided(weight.shape, weight.stride())

    scores, grads, firsts = ([like(w, scale) for w in weights] for scale in (1.0, 0.1, 0.01))
    seconds = [like(w, 0.1).square_() for w in weights]
    slots = [(torch.full_like(w, float("nan"), dtype=torch.float16 if i < 3 else w.dtype), torch.tensor(float("nan")))
             for i, w in enumerate(weights)]  # fmt: skip
    slots = [(w_eff, penalty.to(DEVICE)) for w_eff, penalty in slots]
    slots[2] = None
    times = [1, 2, 1000, 3, 1, 1]
    steps = [torch.tensor(float(t), device=DEVICE) for t in times]
    lr, lam = (torch.tensor(v, device=DEVICE) if has_tensors else v for v in (0.01, 0.05))
    next_beta = torch.tensor(7.0, device=DEVICE)
    before = [[t.double() for t in group] for group in (scores, grads, firsts, seconds)]
    numbers = AdamW(lr, 0.9, 0.999, 1e-8, 0.01, lam)
    kernels, kind = launch.TritonElementwise(), sk.masks.Sigmoid()
    kernels.mask_adamw_(scores, grads, firsts, seconds, steps, weights, slots, BETA, next_beta, kind, numbers)
    for i in range(len(times)):
        s, g, m1, m2 = (group[i] for group in before)
        found = Stepped(s, m1, m2, steps[i], weights[i], None)
        expected = adamw_in_fp64(found, g, 3.0, AdamW(0.01, 0.9, 0.999, 1e-8, 0.01, 0.05))
        assert torch.equal(grads[i].double(), g)
        for new, true, old in zip((scores[i], firsts[i], seconds[i]), expected, (s, m1, m2), strict=True):
            assert ((new.double() - true).abs() <= 2.0**-21 * (true.abs() + old.abs() + 0.05)).all()
        if slots[i] is not None and scores[i].numel():
            m = torch.sigmoid(7 * scores[i].double())
            w_eff, penalty = slots[i]
            true = weights[i].double() * m
            roundoff = {torch.float32: 2.0**-21, torch.float16: 2.0**-10}[w_eff.dtype]
            assert ((w_eff.double() - true).abs() <= roundoff * true.abs() + 6e-8).all()
            assert penalty.item() == pytest.approx(m.sum().item(), rel=1e-6)
    assert slots[4][1].item() == 0.0


@triton.jit
def rounding_kernel(values, step, bits, low, high, num, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    random = triton_rounding.rounding_bits(at, tl.load(step).to(tl.int64))
    value = tl.load(values + at, mask=inside, other=0.0)
    tl.store(bits + at, random.to(tl.int64), mask=inside)
    tl.store(low + at, triton_rounding.round_to_bf16(value, random & 0xFFFF), mask=inside)
    tl.store(high + at, triton_rounding.round_to_bf16(value, random >> 16), mask=inside)


@pytest.mark.parametrize("step", [1, 2, 1000, 2**24])
def test_rounding_to_bf16_is_that_of_the_definition_to_the_bit(step):
    torch.manual_seed(0)
    num = 100_003
    values = torch.randn(num, device=DEVICE) * 10.0 ** torch.randint(-44, 39, (num,), device=DEVICE)
    special = [0.0, -0.0, 3.4028235e38, -3.4028235e38, 1e-45, 1.0, float("inf"), float("-inf"), float("nan")]
    values[: len(special)] = torch.tensor(special, device=DEVICE)
    bits = torch.empty(num, dtype=torch.int64, device=DEVICE)
    halves = [torch.empty(num, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    rounding_kernel[(triton.cdiv(num, 1024),)](
        values, torch.tensor(float(step), device=DEVICE), bits, *halves, num, 1024
    )
    expected = rounding.rounding_bits(num, step, DEVICE)
    assert torch.equal(bits, expected)
    is_nan = values.isnan()
    for half, random in zip(halves, (expected & 0xFFFF, expected >> 16), strict=True):
        true = rounding.round_to_bf16(values, random)
        assert torch.equal(half.isnan(), is_nan) and torch.equal(true.isnan(), is_nan)
        assert torch.equal(half[~is_nan].view(torch.int16), true[~is_nan].view(torch.int16))


NEXT_BETA = torch.tensor(testing.NEXT_BETA, device=DEVICE)


def check_step(before, after, grad, grad_error):
    worst = worst_step_errors(before, after, grad, grad_error)
    assert max(worst.values()) <= 1, worst
    if after.slot is not None:
        kernels, (w_eff, _) = products.TritonKernels(), after.slot
        again, _ = kernels.effective_weight(after.weight, after.scores, NEXT_BETA, as_kind("sigmoid"), w_eff.dtype)
        assert torch.equal(w_eff, again)


def numbers_of_step(has_tensors):
    if not has_tensors:
        return testing.STEP
    return testing.STEP._replace(**{k: torch.tensor(getattr(testing.STEP, k), device=DEVICE) for k in ("lr", "lam")})


def grad_like(state, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.empty_like(state.weight, dtype=dtype).copy_(torch.randn(state.weight.shape, generator=generator))


def mask_adamw(states, grads, grad_penalties=None, has_tensors=False):
    products.TritonKernels().mask_adamw_(
        [s.scores for s in states], grads, [s.exp_avg for s in states], [s.exp_avg_sq for s in states],
        [s.step for s in states], [s.weight for s in states], [s.slot for s in states], BETA, NEXT_BETA,
        as_kind("sigmoid"), numbers_of_step(has_tensors), grad_penalties,
    )  # fmt: skip


@pytest.mark.parametrize("is_captured", [False, True], ids=["one launch", "one by one"])
@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_a_step_makes_the_scores_gradients_of_the_effective_weights_in_passing(
    grad_dtype, moment_dtype, is_captured, monkeypatch
):
    monkeypatch.setattr(launch, "memory_number", lambda tensor: int(is_captured))
    shapes, dtypes = [(1, 1), (3, 5), (0, 4), (40, 60), (33, 31), (2, 1024)], [None, *DTYPES, None, torch.bfloat16]
    states = [stepped(shape, 1 + 99 * i, DTYPES[i % 3], moment_dtype, dtype, i, DEVICE)
              for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))]  # fmt: skip
    states[3] = states[3].map(lambda t: t.t())
    grads = [grad_like(s, grad_dtype, i) for i, s in enumerate(states)]
    lam = torch.tensor(0.3, device=DEVICE)
    penalties = [lam, None, lam, lam, None, lam]
    for given in ([0, 1, 2, 3, 4, 5], [3], [1]):  # a single one needs no table
        after = [states[i].map(lambda t: t) for i in given]
        mask_adamw(after, [grads[i] for i in given], [penalties[i] for i in given], has_tensors=is_captured)
        for i, new in zip(given, after, strict=True):
            penalty = 0.0 if penalties[i] is None else 0.3
            if new.scores.numel():
                check_step(states[i], new, *grad_of_step(states[i], grads[i], 0.0, penalty))
        assert 2 not in given or after[2].slot[1].item() == 0.0


@pytest.mark.parametrize("is_captured", [False, True], ids=["one launch", "one by one"])
@pytest.mark.parametrize("of_w_eff", [False, True], ids=["of scores", "of effective weights"])
def test_bf16_moments_are_fp32_moments_rounded_by_the_definition(of_w_eff, is_captured, monkeypatch):
    monkeypatch.setattr(launch, "memory_number", lambda tensor: int(is_captured))
    narrow = [stepped(shape, 5 + i, moment_dtype=torch.bfloat16, dtype=torch.float32, seed=i, device=DEVICE)
              for i, shape in enumerate([(33, 65), (1,), (40, 60)])]  # fmt: skip
    narrow[2] = narrow[2].map(lambda t: t.t())  # not the order of indices, that of memory
    wide = [s.map(lambda t: t) for s in narrow]
    for s in wide:
        s.exp_avg, s.exp_avg_sq = s.exp_avg.float(), s.exp_avg_sq.float()
    for states in (narrow, wide):
        mask_adamw(states, [grad_like(s) for s in states], [None] * 3 if of_w_eff else None)
    for a, b in zip(narrow, wide, strict=True):
        assert all(torch.equal(x, y) for x, y in zip((a.scores, *a.slot), (b.scores, *b.slot), strict=True))
        bits = rounding.rounding_bits(a.scores.numel(), int(a.step.item()), DEVICE)
        for got, exact, random in (
            (a.exp_avg, b.exp_avg, bits & 0xFFFF), (a.exp_avg_sq, b.exp_avg_sq, bits >> 16)
        ):  # fmt: skip
            flat = exact.t().flatten() if exact.dim() == 2 and exact.stride(0) < exact.stride(1) else exact.flatten()
            expected = rounding.round_to_bf16(flat, random)
            assert torch.equal(got.t().flatten() if got.stride() != got.contiguous().stride() else got.flatten(),
                               expected)  # fmt: skip
            assert flat.numel() == 1 or 0.1 < (expected != flat.bfloat16()).float().mean() < 0.4


def linear_step(state, grad_out, x, grad_penalty, has_tensors=False):
    TritonBackend().linear_step_(
        grad_out, x, grad_penalty, state.scores, state.exp_avg, state.exp_avg_sq, state.step, state.weight, state.slot,
        BETA, NEXT_BETA, as_kind("sigmoid"), numbers_of_step(has_tensors),
    )  # fmt: skip


def check_linear_step(m, n, k, dtype, *, weight_dtype=None, moment_dtype=torch.float32, has_slot=True, has_penalty=True,
                      is_transposed=False, has_tensors=False, product_roundoff=0.0):  # fmt: skip
    slot_dtype = dtype if has_slot else None
    state = stepped((n, k), 4, weight_dtype or dtype, moment_dtype, slot_dtype, m + n + k, DEVICE)
    if is_transposed:
        state = state.map(lambda t: t.t().contiguous().t())
    generator = torch.Generator().manual_seed(m)
    grad_out = torch.randn(m, n, generator=generator).to(DEVICE, dtype)
    x = torch.randn(m, k, generator=generator).to(DEVICE, dtype)
    after = state.map(lambda t: t)
    assert after.weight.stride() == state.weight.stride()
    linear_step(after, grad_out, x, torch.tensor(0.3, device=DEVICE) if has_penalty else None, has_tensors)
    penalty = 0.3 if has_penalty else 0.0
    check_step(state, after, *linear_grad_of_step(state, grad_out, x, penalty, product_roundoff))


class Noted:
    """A kernel whose launches are noted."""

    def __init__(self, kernel, name, names):
        self.kernel, self.name, self.names = kernel, name, names

    def __getitem__(self, grid):
        self.names.append(self.name)
        return self.kernel[grid]


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels of steps that ran."""
    names = []
    for module, name in (
        (products, "linear_step_kernel"), (products, "step_of_parts_kernel"), (launch, "mask_adamw_kernel")
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Noted(getattr(module, name), name, names))
    return names


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, (150, 16, 32), (40, 48, 70)], ids=size_id)
def test_a_linear_step_is_adamw_on_the_score_gradient_in_fp64(size, dtype, moment_dtype, launched):
    check_linear_step(*size, dtype, moment_dtype=moment_dtype)
    is_split = size[0] == 150
    assert launched == ["step_of_parts_kernel" if is_split else "linear_step_kernel"]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("m", [20, 150])  # in one piece, in parts
def test_a_linear_step_serves_every_mix_of_what_there_is(m, launched):
    for weight_dtype in DTYPES:
        check_linear_step(m, 17, 35, torch.float16, weight_dtype=weight_dtype, has_penalty=False)
        check_linear_step(m, 17, 35, torch.float32, weight_dtype=weight_dtype, has_slot=False, has_tensors=True)
        check_linear_step(m, 17, 35, torch.bfloat16, weight_dtype=weight_dtype, moment_dtype=torch.bfloat16,
                          is_transposed=True)  # fmt: skip
    assert launched == ["linear_step_kernel" if m == 20 else "step_of_parts_kernel"] * 9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(70, 48, 144), (33, 65, 129)], ids=size_id)
def test_a_linear_step_in_the_shipped_tiles_is_adamw_in_fp64(size, dtype, launched):
    check_linear_step(*size, dtype, moment_dtype=torch.bfloat16)
    assert launched == ["linear_step_kernel"]


def test_a_linear_step_that_the_kernels_do_not_serve_goes_to_the_vendor_and_one_pass(launched):
    check_linear_step(20, 17, 35, torch.float32)
    check_linear_step(20, 17, 35, torch.float32, is_transposed=True, moment_dtype=torch.bfloat16)
    check_linear_step(0, 5, 7, torch.bfloat16)
    check_linear_step(4, 0, 7, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "linear_step", lambda *args: None)
        check_linear_step(20, 17, 35, torch.bfloat16, product_roundoff=2.0**-8)
    assert launched == ["mask_adamw_kernel"] * 4


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [20, 150])
def test_20_linear_steps_are_20_of_score_gradient_and_optimizer(m, moment_dtype):
    """Within rounding; where bf16 moments are rounded, the last bit of a gradient may decide, but seldom does."""
    lam = torch.tensor(0.3, device=DEVICE)
    together = stepped((17, 35), 0, moment_dtype=moment_dtype, dtype=torch.float32, device=DEVICE)
    apart, kernels = together.map(lambda t: t), products.TritonKernels()
    start = together.scores.clone()
    for i in range(20):
        generator = torch.Generator().manual_seed(i)
        grad_out = torch.randn(m, 17, generator=generator).to(DEVICE) / m
        x = torch.randn(m, 35, generator=generator).to(DEVICE)
        for state in (together, apart):
            state.step = torch.tensor(1.0 + i, device=DEVICE)
        linear_step(together, grad_out, x, lam)
        grad, _ = kernels.linear_grad_scores(
            grad_out, x, lam, apart.weight, apart.scores, BETA, as_kind("sigmoid"), True, False
        )
        mask_adamw([apart], [grad])
    assert (together.scores - start).abs().mean() > 0.05  # it did move
    for a, b in zip(together.written(), apart.written(), strict=True):
        is_close = torch.isclose(a, b, rtol=2e-5, atol=2e-6).float().mean()
        assert is_close == 1 if moment_dtype == torch.float32 or not a.dim() else is_close > 0.99


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("m", [20, 150])
@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_steps_repeat_bit_for_bit_and_change_the_versions_of_what_they_write(moment_dtype, m, monkeypatch):
    new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *a, **k: new(t, *a, **k).fill_(float("nan")))
    state = stepped((17, 35), 4, torch.bfloat16, moment_dtype, torch.bfloat16, device=DEVICE)
    grad_out, x = torch.randn(m, 17, device=DEVICE).bfloat16(), torch.randn(m, 35, device=DEVICE).bfloat16()
    runs = [state.map(lambda t: t) for _ in range(3)]
    for run_ in runs:
        versions = [t._version for t in (*run_.written(), run_.weight)]
        linear_step(run_, grad_out, x, None)
        is_new = [t._version > old for t, old in zip((*run_.written(), run_.weight), versions, strict=True)]
        assert is_new == [True] * 5 + [False]
        assert all(torch.equal(a, b) and not a.isnan().any() for a, b in
                   zip(run_.written(), runs[0].written(), strict=True))  # fmt: skip


def test_what_benchmarks_time_as_a_step_in_the_backward_pass_is_that_step():
    from benchmarks import cases, contenders, kernels

    with sk.use_backend("triton"):
        problem = kernels.make_problem(cases.KernelCase("linear_step", ((48, 64),), "bf16", num_tokens=70), DEVICE)
        del problem.functions["compile"]
        worst = kernels.gate(problem)
        assert set(worst) == {"eager", "ours", "ours_bf16", "ours_flat", "ours_fused"} and max(worst.values()) <= 1
        case = cases.LayerCase((48, 64), (40, 64), "bf16")
        for in_backward, bound in ((contenders.OursInBackward, 1e-7), (contenders.OursLean, 3e-6)):
            ours, apart = in_backward(case.build(DEVICE)), contenders.Ours(case.build(DEVICE))
            for _ in range(3):
                ours.step()
                apart.step()
            assert torch.equal(ours.x.grad, apart.x.grad)
            assert (ours.trained - apart.trained).abs().max() <= bound
            assert (ours.trained - case.build(DEVICE).scores).abs().mean() > 1e-4
