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
from subnet_kernels.backends.base import AdamW
from subnet_kernels.backends.triton import TritonBackend, load_error
from subnet_kernels.masks import as_kind
from subnet_kernels.testing import conv_case, linear_case, ours, run, worst_errors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if load_error() is not None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if DEVICE == "cpu" and not TritonBackend._is_interpreted():
    pytest.skip("no GPU: `make test` runs this file interpreted, in a process of its own", allow_module_level=True)

from subnet_kernels.backends.triton import configs, launch, products, rules  # noqa: E402

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


def adamw_in_fp64(s, g, m1, m2, t, beta, lr, beta1, beta2, eps, weight_decay, lam):
    """(scores, moments) after one step, by the formula."""
    z = beta * s
    g = g + lam * beta * torch.sigmoid(z) * torch.sigmoid(-z)
    s = s - lr * weight_decay * s
    m1, m2 = beta1 * m1 + (1 - beta1) * g, beta2 * m2 + (1 - beta2) * g * g
    return s - lr / (1 - beta1**t) * m1 / ((m2 / (1 - beta2**t)).sqrt() + eps), m1, m2


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
    for i, t in enumerate(times):
        s, g, m1, m2 = (group[i] for group in before)
        expected = adamw_in_fp64(s, g, m1, m2, t, 3.0, 0.01, 0.9, 0.999, 1e-8, 0.01, 0.05)
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
