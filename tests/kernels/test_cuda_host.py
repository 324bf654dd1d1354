"""The CUDA C++ kernels and their bindings as host functions, against fp64: indices, tails, tables, sums and arithmetic.
What only a GPU shows (alignment faults, races, its own exp) is in test_gpu.py."""

import ctypes

import pytest
import torch

from benchmarks import gpu_cuda, gpu_masks, gpu_sampled
from benchmarks.cases import LayerCase
from subnet_kernels import dispatch, masked_linear
from subnet_kernels.backends.base import AdamW
from subnet_kernels.masks import Bernoulli, Gumbel, as_kind
from subnet_kernels.rounding import round_to_bf16, rounding_bits
from tests.kernels import cuda_on_host

if cuda_on_host.compiler() is None:
    pytest.skip("there is no C++ compiler", allow_module_level=True)
pytest.importorskip("subnet_kernels._C", reason="the extension is not built")
from tests.kernels.native_inputs import DTYPES, ROUNDOFF, assert_within, nan_like, randn
from tests.kernels.test_native_mask_adamw import BETA, NEXT_BETA, SETTINGS, State, expected, slope_of
from tests.kernels.test_random import PUBLISHED

U = 2.0**-24
SIGMOID, HARD = as_kind("sigmoid"), as_kind("hard")
LAM = torch.tensor(0.37)
BLOCK = 4096  # elements per thread block
SIZES = [(1,), (7,), (8, 1), (63,), (2047,), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (3, 5, 7, 11), (97, 131), (0, 5)]


@pytest.fixture(scope="module")
def cuda():
    return cuda_on_host.OnHost()


@pytest.fixture(scope="module")
def functions():
    return ctypes.CDLL(str(cuda_on_host.build(cuda_on_host.FOLDER / "functions.cpp")))


def address(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def offset(tensor):
    """The same values, where no access of 16 bytes is aligned."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return memory[1:].view(tensor.shape).copy_(tensor)


def mask_error(scores, beta):
    """m in fp64 and what fp32 arithmetic may be off: z has two roundings, exp and quotient a few."""
    z = beta.double() * scores.double()
    m = torch.sigmoid(z)
    return m, 4 * U * m * (1 + z.abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_effective_weights_of_every_size_match_fp64(cuda, weight_dtype, dtype):
    weights = [randn(shape, i).to(weight_dtype) for i, shape in enumerate(SIZES)]
    scores = [randn(shape, 50 + i) for i, shape in enumerate(SIZES)]
    weights[4], scores[4], weights[9] = offset(weights[4]), offset(scores[4]), offset(weights[9])
    out = [nan_like(w, dtype) for w in weights]
    made, penalties = cuda.effective_weights(weights, scores, BETA, SIGMOID, [dtype] * len(weights), out)
    for weight, score, w_eff, penalty in zip(weights, scores, made, penalties, strict=True):
        m, error = mask_error(score, BETA)
        tiny = 2.0**-25 if dtype == torch.float16 else 0.0
        bound = weight.double().abs() * (error + 1.01 * ROUNDOFF[dtype] * m) + tiny
        assert_within(w_eff, weight.double() * m, bound)
        assert_within(penalty, m.sum(), error.sum() + 4 * U * m.sum())
    for weight, score, w_eff, penalty in zip(weights, scores, made, penalties, strict=True):
        one, sum_of_one = cuda.effective_weight(weight, score, BETA, SIGMOID, dtype)
        assert torch.equal(one, w_eff) and torch.equal(sum_of_one, penalty)


def test_hard_masks_keep_the_weight_to_the_bit_and_count(cuda):
    weight, scores = randn((67, 129), 0), randn((67, 129), 1)
    scores[3, :5] = 0.0
    (w_eff,), penalties = cuda.effective_weights([weight], [scores], BETA, HARD, [torch.float32])
    assert torch.equal(w_eff, torch.where(scores > 0, weight, 0.0))
    assert penalties.tolist() == [(scores > 0).sum().item()]


def test_more_layers_than_one_launch_holds_keep_their_places(cuda):
    weights = [randn((1 + i % 5, 3), i) for i in range(200)]
    scores = [randn((1 + i % 5, 3), 300 + i) for i in range(200)]
    made, penalties = cuda.effective_weights(weights, scores, BETA, SIGMOID, [torch.float32] * 200)
    for i in (0, 95, 96, 191, 192, 199):
        m, error = mask_error(scores[i], BETA)
        assert_within(made[i], weights[i] * m, weights[i].abs() * error + U * m)
        assert penalties[i].item() == pytest.approx(m.sum().item(), rel=1e-6)
    grads = [randn(w.shape, 600 + i) for i, w in enumerate(weights)]
    lams = [LAM if i % 3 else None for i in range(200)]
    given = [g.clone() for g in grads]
    for i, ds in enumerate(cuda.grad_scores_of_many(given, lams, weights, scores, BETA, SIGMOID)):
        truth, bound = true_grad_scores(grads[i], weights[i], scores[i], lams[i])
        assert_within(ds, truth, bound)


def true_grad_scores(grad, weight, scores, grad_penalty):
    """(value, bound): four roundings of the slope, z's two, those of product, sum and result."""
    slope = slope_of(scores.double(), BETA.double())
    lam = 0.0 if grad_penalty is None else grad_penalty.double()
    product = torch.zeros(()) if grad is None else grad.double() * weight.double()
    return (product + lam) * slope, 8 * U * (product.abs() + lam) * slope * (1 + (BETA * scores).abs().double())


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_score_gradients_and_weight_gradients_of_every_size_match_fp64(cuda, grad_dtype, weight_dtype):
    for i, shape in enumerate(SIZES):
        weight, scores = randn(shape, i).to(weight_dtype), randn(shape, 20 + i)
        grad = randn(shape, 40 + i).to(grad_dtype)
        if i % 3 == 1:
            weight, scores, grad = offset(weight), offset(scores), offset(grad)
        ds, dw = cuda.grad_scores(grad, LAM, weight, scores, BETA, SIGMOID, True, True)
        assert_within(ds, *true_grad_scores(grad, weight, scores, LAM))
        m, error = mask_error(scores, BETA)
        tiny = 2.0**-25 if weight_dtype == torch.float16 else 0.0
        g = grad.double()
        assert_within(dw, g * m, g.abs() * (error + 1.01 * ROUNDOFF[weight_dtype] * m) + tiny)
        in_place, none = cuda.grad_scores(grad, LAM, weight, scores, BETA, SIGMOID, True, False, may_overwrite=True)
        assert torch.equal(in_place, ds) and none is None
        assert (in_place is grad) == (grad_dtype == torch.float32)


def test_the_penalty_alone_and_hard_masks_have_their_gradients(cuda):
    weight, scores, grad = (randn((67, 129), i) for i in range(3))
    ds, none = cuda.grad_scores(None, LAM, weight, scores, BETA, SIGMOID, True, True)
    assert_within(ds, *true_grad_scores(None, weight, scores, LAM))
    assert none is None
    none, dw = cuda.grad_scores(grad, LAM, weight, scores, BETA, HARD, True, True)
    assert none is None and torch.equal(dw, torch.where(scores > 0, grad, 0.0))


def test_transposed_and_channels_last_tensors_are_served_as_they_lie(cuda):
    for shape, order in [((67, 129), (1, 0)), ((6, 5, 3, 7), (0, 2, 3, 1))]:
        weight, scores, grad = (randn(shape, i, order) for i in range(3))
        w_eff, _ = cuda.effective_weight(weight, scores, BETA, SIGMOID, torch.float32)
        m, error = mask_error(scores, BETA)
        assert w_eff.stride() == weight.stride()
        assert_within(w_eff, weight * m, weight.abs() * (error + U * m) * 1.01)
        for other in (scores, scores.contiguous()):
            ds, _ = cuda.grad_scores(grad.contiguous(), LAM, weight, other, BETA, SIGMOID, True, False)
            assert ds.stride() == other.stride()
            assert_within(ds, *true_grad_scores(grad, weight, scores, LAM))
            (ds,) = cuda.grad_scores_of_many([grad.contiguous()], [LAM], [weight], [other], BETA, SIGMOID)
            assert ds.stride() == other.stride()
            assert_within(ds, *true_grad_scores(grad, weight, scores, LAM))


@pytest.mark.parametrize("lam", [0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)], ids=repr)
def test_the_penalty_is_added_to_gradients_in_place_as_in_fp64(cuda, lam):
    scores = [randn((67, 129), 0), randn((5, 1), 1), randn((6, 35), 2, (1, 0)), torch.empty(0, 3)]
    scores += [randn((9, 8), 3)[:, ::2], offset(randn((BLOCK + 1,), 4))]
    counts = [1, 40, 7, 3, 2, 5]
    grads = [randn(tuple(s.shape), 9 + i) for i, s in enumerate(scores)]
    before = [grad.double() for grad in grads]
    cuda.add_penalty_grad_(grads, scores, counts, BETA, lam, SIGMOID)
    for grad, old, s, count in zip(grads, before, scores, counts, strict=True):
        added = 0.25 * count * slope_of(s.double(), BETA.double())
        assert_within(grad, old + added, 8 * U * (old.abs() + added * (1 + (BETA * s).abs())))
    before = [grad.clone() for grad in grads]
    cuda.add_penalty_grad_(grads, scores, counts, BETA, lam, HARD)
    assert all(torch.equal(grad, old) for grad, old in zip(grads, before, strict=True))


# --- optimizer -------------------------------------------------------------------------------------------------------


def step(cuda, states, has_tensors=False, grad_penalties=None, **settings):
    numbers = {**SETTINGS, **settings}
    beta1, beta2 = numbers.pop("betas")
    if has_tensors:  # as a captured step has them
        numbers["lr"] = torch.tensor(numbers["lr"], dtype=torch.float64)
        numbers["lam"] = torch.tensor(numbers["lam"], dtype=torch.float64)
    cuda.mask_adamw_(
        [s.scores for s in states], [s.grad for s in states], [s.exp_avg for s in states],
        [s.exp_avg_sq for s in states], [torch.tensor(s.step) for s in states], [s.weight for s in states],
        [s.slot for s in states], BETA, NEXT_BETA, SIGMOID, AdamW(beta1=beta1, beta2=beta2, **numbers), grad_penalties,
    )  # fmt: skip


def check(cuda, before, after, lr_error=0.0, **settings):
    """Scores and moments within their bounds; w_eff and penalty to the bit those of effective_weight."""
    truth = expected(before, **{**SETTINGS, **settings})
    for name, (value, bound) in truth.items():
        change = (value - getattr(before, name).double()).abs()
        assert_within(getattr(after, name), value, bound + lr_error * change, name)
    if after.slot is not None:
        w_eff, penalty = after.slot
        made, total = cuda.effective_weight(after.weight, after.scores, NEXT_BETA, SIGMOID, w_eff.dtype)
        assert torch.equal(w_eff, made) and torch.equal(penalty, total)


@pytest.mark.parametrize("has_tensors", [False, True])
def test_each_of_several_tensors_steps_as_in_fp64(cuda, has_tensors):
    shapes = [*SIZES, (64, 33), (5,), (8, 4, 3, 3), (300, 200)]
    dtypes = [torch.float32, None, torch.bfloat16, torch.float16]
    states = [State(shape, 1.0 + i, DTYPES[i % 3], dtypes[i % 4], seed=i) for i, shape in enumerate(shapes)]
    states[-1] = State(shapes[-1], 10_000.0, seed=99, order=(1, 0))
    states[4].scores, states[8].exp_avg = offset(states[4].scores), offset(states[8].exp_avg)
    after = [state.clone() for state in states]
    step(cuda, after, has_tensors)
    for old, new in zip(states, after, strict=True):
        check(cuda, old, new, lr_error=U if has_tensors else 0.0)
    step(cuda, [])


def test_without_lam_the_slope_is_not_looked_at(cuda):
    state = State((70,), dtype=None)
    state.scores[3] = float("inf")  # its slope would be 0 * inf
    after = state.clone()
    step(cuda, [after], lam=0.0)
    assert after.exp_avg[3].isfinite()


def test_beta1_and_beta2_may_be_zero(cuda):
    state = State((70,), 2.0, dtype=None)
    after = state.clone()
    step(cuda, [after], betas=(0.0, 0.0))
    check(cuda, state, after, betas=(0.0, 0.0))


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_gradients_of_effective_weights_step_as_in_fp64(cuda, weight_dtype, grad_dtype):
    """Products of gradient and weight that are positive: nothing cancels, so the bound of State's gradients holds."""
    states, truths, lams = [], [], [LAM, None]
    for i, lam in enumerate(lams):
        state = State((97, 131), weight_dtype=weight_dtype, dtype=torch.bfloat16 if i else None, seed=i)
        state.grad = (state.grad.abs() * state.weight.sign()).to(grad_dtype)
        truth = state.clone()
        truth.grad = true_grad_scores(state.grad, state.weight, state.scores, lam)[0]
        states.append(state)
        truths.append(truth)
    step(cuda, states, grad_penalties=lams)
    for state, truth in zip(states, truths, strict=True):
        check(cuda, truth, state)


@pytest.mark.parametrize("is_of_w_eff", [False, True])
def test_moments_in_bf16_are_those_in_fp32_rounded_by_the_hash(cuda, is_of_w_eff):
    for number in (1.0, 7.0, 70_000.0):
        states = [State(shape, number, DTYPES[i % 3], seed=i) for i, shape in enumerate(SIZES)]
        states.append(State((67, 129), number, order=(1, 0)))
        for state in states:
            state.exp_avg = state.exp_avg.to(torch.bfloat16).float()
            state.exp_avg_sq = state.exp_avg_sq.to(torch.bfloat16).float()
        wide, narrow = [state.clone() for state in states], [state.clone() for state in states]
        for state in narrow:
            state.exp_avg = state.exp_avg.to(torch.bfloat16)
            state.exp_avg_sq = state.exp_avg_sq.to(torch.bfloat16)
        lams = [LAM] * len(states) if is_of_w_eff else None
        step(cuda, wide, grad_penalties=lams)
        step(cuda, narrow, grad_penalties=lams)
        for a, b in zip(wide, narrow, strict=True):
            assert torch.equal(a.scores, b.scores)
            random = rounding_bits(a.scores.numel(), int(number))
            for name, half in (("exp_avg", random & 0xFFFF), ("exp_avg_sq", random >> 16)):
                stored = getattr(a, name) if a.scores.is_contiguous() else getattr(a, name).t()
                made = getattr(b, name) if a.scores.is_contiguous() else getattr(b, name).t()
                assert torch.equal(made.flatten(), round_to_bf16(stored.flatten(), half))


def test_a_model_of_more_layers_than_one_launch_holds_steps_as_in_fp64(cuda):
    states = [State((1 + i % 4, 9), 1.0 + i, seed=i) for i in range(130)]
    after = [state.clone() for state in states]
    step(cuda, after)
    for i in (0, 1, 127, 128, 129):
        check(cuda, states[i], after[i])


def test_what_is_refused_changes_nothing(cuda):
    state = State((70,))
    kept = state.clone()
    state.exp_avg_sq = state.exp_avg_sq.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="exp_avgs and exp_avg_sqs must all be float32 or all be bfloat16"):
        step(cuda, [state])
    state.exp_avg_sq = state.scores
    with pytest.raises(RuntimeError, match="must not share memory with"):
        step(cuda, [state])
    assert torch.equal(state.scores, kept.scores)
    with pytest.raises(RuntimeError, match=r"must have weights's strides \[1\], got \[2\]"):
        state = State((70,))
        state.grad = randn((140,), 1)[::2]
        step(cuda, [state])
    with pytest.raises(RuntimeError, match=r"beta1 and beta2 must be in \[0, 1\)"):
        step(cuda, [State((70,))], betas=(1.0, 0.9))


@pytest.mark.parametrize("options", [{}, {"moment_dtype": torch.bfloat16}, {"in_backward": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_trains_through_dispatch_as_on_the_cpu_backend(cuda, monkeypatch, dtype, options):
    from subnets import mask_model

    steps = []
    step = cuda_on_host.OnHost.mask_adamw_

    def counted(self, scores, *rest):
        steps.append(len(scores))
        return step(self, scores, *rest)

    monkeypatch.setattr(cuda_on_host.OnHost, "mask_adamw_", counted)

    def trained(backend):
        monkeypatch.setitem(dispatch._ORDER, "cpu", (backend, dispatch.BACKENDS["reference"]))
        dispatch.forget_choices()
        torch.manual_seed(0)
        conv, linear = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 5)
        model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), linear)
        masks = mask_model(model.to(dtype))
        optimizer = masks.adamw(lr=0.02, lam=1e-3, **options)
        masks.anneal(to=20, steps=8)
        for i in range(8):
            (model(randn((4, 3, 7, 7), i).to(dtype)).float() - 3).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            masks.check_fresh()
        return [scores.detach().clone() for scores in masks.scores().values()]

    try:
        on_cpu, on_host = trained(dispatch.BACKENDS["cpu"]), trained(cuda)
    finally:
        monkeypatch.undo()
        dispatch.forget_choices()
    assert sum(steps) == 16
    far = 1e-3 if options.get("moment_dtype") or dtype == torch.bfloat16 else 1e-5  # a bf16 may round the other way
    for a, b in zip(on_cpu, on_host, strict=True):
        assert a.max() - a.min() > 0.2  # it did train
        assert (a - b).abs().max() < far


# --- packed masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [0, 1, 7, 8, 9, 2047, 2048, 2049, 30011])
def test_packed_masks_are_those_of_the_python_definition(cuda, num):
    mask = torch.rand(num, generator=torch.Generator().manual_seed(num)) < 0.3
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, -num % 8)).view(-1, 8)
    wanted = (bits << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)
    for given in (mask, offset(mask)):
        packed = cuda.ops.pack_mask(given)
        assert torch.equal(packed, wanted)
        assert torch.equal(cuda.ops.unpack_mask(packed, num), mask)
    assert torch.equal(cuda.ops.unpack_mask(offset(wanted), num), mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num", [0, 1, 7, 8, 2049, 30011])
def test_packed_weights_are_the_weights_whose_bits_are_set(cuda, num, dtype):
    weight, mask = randn((num,), num), torch.rand(num, generator=torch.Generator().manual_seed(num)) < 0.3
    packed = cuda.ops.pack_mask(mask)
    for given in (weight, offset(weight)):
        memory = torch.full((num + 1,), float("nan"), dtype=dtype)
        for out in (memory[:num], memory[1:]):
            cuda.ops.packed_weight(given, packed, out)
            assert torch.equal(out, (weight * mask).to(dtype))


# --- what host and device share --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 3.5, 200.0])
def test_the_scalar_mask_and_its_slope_match_fp64_far_into_saturation(functions, beta):
    scores = torch.cat([torch.linspace(-90, 90, 40_001) / beta, torch.tensor([0.0, -0.0])])
    value, slope = torch.empty_like(scores), torch.empty_like(scores)
    for function, out in ((functions.mask_value, value), (functions.mask_slope, slope)):
        function(address(scores), ctypes.c_float(beta), address(out), ctypes.c_int64(len(scores)))
    z = beta * scores.double()
    bound = 8 * U * (1 + z.abs())
    edge = 1e-30  # beside 2^-100, where a value becomes 0
    true_value, true_slope = torch.sigmoid(z), slope_of(scores.double(), beta)
    assert_within(value, true_value, bound * true_value + edge)
    assert_within(slope, true_slope, 2 * bound * true_slope + beta * edge)
    assert (value[z < -70] == 0).all() and (slope[z.abs() > 70] == 0).all() and (slope[z.abs() < 69] > 0).all()
    nan = torch.tensor([float("nan")])
    functions.mask_value(address(nan), ctypes.c_float(beta), address(nan), ctypes.c_int64(1))
    assert nan.isnan().all()


def test_the_scalar_hard_mask_leaves_zero_out(functions):
    scores, out = torch.tensor([-1.0, -0.0, 0.0, 1e-40, 1.0]), torch.empty(5)
    functions.hard_value(address(scores), address(out), ctypes.c_int64(5))
    assert out.tolist() == [0, 0, 0, 1, 1]


def test_the_c_functions_of_rounding_are_those_of_the_definition(functions):
    num = 100_003
    values = torch.randn(num, generator=torch.Generator().manual_seed(1)) * torch.logspace(-40, 38, num)
    values[:4] = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0])
    bits = values.view(torch.int32)
    for step in (0, 1, 12_345, 2**24):
        random, made = torch.empty(num, dtype=torch.int32), torch.empty(num, dtype=torch.int32)
        functions.rounding_bits(ctypes.c_uint32(step), address(random), ctypes.c_int64(num))
        wanted = rounding_bits(num, step)
        assert torch.equal(random.to(torch.int64) & 0xFFFFFFFF, wanted)
        for half in (wanted & 0xFFFF, wanted >> 16):
            given = half.to(torch.int32)
            functions.round_to_bf16_bits(address(bits), address(given), address(made), ctypes.c_int64(num))
            rounded = round_to_bf16(values, half)
            assert torch.equal(made.to(torch.int16).view(torch.bfloat16).nan_to_num(7), rounded.nan_to_num(7))
            assert rounded[2].isnan() and made[2] & 0x7F != 0


def test_the_c_function_of_philox_gives_the_published_words(functions):
    for counter, key, result in PUBLISHED:
        given = [torch.tensor(words, dtype=torch.int64).to(torch.int32) for words in (counter, key)]
        out = torch.empty(4, dtype=torch.int32)
        functions.philox(address(given[0]), address(given[1]), address(out))
        assert [int(word) & 0xFFFFFFFF for word in out] == list(result)


@pytest.mark.parametrize("number", [1.0, 3.0, 10_000.0])
def test_the_scalar_adamw_step_matches_fp64(functions, number):
    before = State((70_001,), number, dtype=None)
    after = before.clone()
    settings = {**SETTINGS, "lam": 0.0}
    numbers = [SETTINGS["lr"], *SETTINGS["betas"], SETTINGS["eps"], SETTINGS["weight_decay"], number]
    given = torch.tensor(numbers, dtype=torch.float64)
    tensors = after.scores, after.grad, after.exp_avg, after.exp_avg_sq
    functions.adamw(address(given), *(address(t) for t in tensors), ctypes.c_int64(70_001))
    for name, (value, bound) in expected(before, **settings).items():
        assert_within(getattr(after, name), value, bound, name)


# --- the checks of gpu_check -----------------------------------------------------------------------------------------


def test_the_checks_that_run_on_a_gpu_pass_on_the_host_functions(cuda, monkeypatch):
    monkeypatch.setattr(gpu_cuda, "SHAPES", tuple((40, 41) if s == (257, 389) else s for s in gpu_cuda.SHAPES))
    checks = [*gpu_cuda.grad_scores_checks("cpu", 0, cuda), *gpu_cuda.step_checks("cpu", 0, cuda)]
    checks += gpu_cuda.bit_checks("cpu", 0)  # of the CPU's own kernels here
    assert len(checks) == 10 + 24 + 19
    assert {name: ratio for name, ratio in checks if not ratio <= 1} == {}
    assert max(ratio for name, ratio in checks if "step" in name) > 0.01  # it does measure


def test_several_masks_over_one_weight_are_right_and_to_the_bit_those_of_one_call_a_mask(cuda):
    checks = list(gpu_masks.checks("cpu", 0, cuda))
    assert len(checks) == 36 + 18 + 30 + 3
    assert {name: ratio for name, ratio in checks if not ratio <= 1} == {}
    assert max(ratio for name, ratio in checks if "to the bit" not in name) > 0.1  # it does measure


def test_runs_of_masks_longer_than_a_launch_and_weights_of_many_blocks_keep_their_places(cuda):
    weights = [randn((3, 5), 0)] * 150 + [randn((2 * BLOCK + 3,), 1)] * 3 + [randn((2 * BLOCK + 3,), 2)] * 2
    scores = [randn(w.shape, 10 + i) for i, w in enumerate(weights)]
    made, penalties = cuda.effective_weights(weights, scores, BETA, SIGMOID, [torch.float32] * len(weights))
    for w, s, w_eff, penalty in zip(weights, scores, made, penalties, strict=True):
        one, total = cuda.effective_weight(w, s, BETA, SIGMOID, torch.float32)
        assert torch.equal(w_eff, one) and torch.equal(penalty, total)


@pytest.mark.parametrize("lengths", [(1, 2), (3, 1)], ids=str)
def test_numbers_that_do_not_fit_the_entries_are_refused_before_anything_changes(cuda, lengths):
    states = [State((7,), seed=i) for i in range(3)]
    before = [state.scores.clone() for state in states]
    numbers, num = [AdamW(0.1, 0.9, 0.99, 1e-8, 0.0, 0.1)] * lengths[1], lengths[0]
    with pytest.raises(RuntimeError, match="all lists must be of one length"):
        cuda.mask_adamw_(
            [s.scores for s in states][:num], [s.grad for s in states][:num], [s.exp_avg for s in states][:num],
            [s.exp_avg_sq for s in states][:num], [torch.tensor(1.0)] * num, [s.weight for s in states][:num],
            [None] * num, BETA, BETA, SIGMOID, numbers if num == 1 else [*numbers, *numbers],
        )  # fmt: skip
    assert all(torch.equal(state.scores, old) for state, old in zip(states, before, strict=True))


# --- sampled masks ---------------------------------------------------------------------------------------------------


def test_sampled_masks_are_plain_pytorchs_to_the_bit_and_their_gradients_within_the_bound(cuda):
    checks = list(gpu_sampled.checks("cpu", 3, cuda))
    assert len(checks) == 4 + 9 + 9
    assert {name: ratio for name, ratio in checks if not ratio <= 1} == {}
    assert min(ratio for name, ratio in checks if "gradients" in name) > 0.01  # it does measure


def test_sampled_weights_are_rounded_to_the_nearest(cuda):
    weight, kind = randn((5, 21), 0), Bernoulli(samples=2).at(torch.tensor([3, 4]))
    kept = torch.full(weight.shape, 65535, dtype=torch.int32).to(torch.uint16)
    for dtype in DTYPES:
        out = torch.full((2, 5, 21), float("nan"), dtype=dtype)
        cuda.sampled_weights(weight, weight, kept, BETA, kind, out)
        assert torch.equal(out, weight.to(dtype).expand(2, 5, 21))


def test_sampled_layers_on_the_backend_have_the_references_outputs_and_gradients(cuda, monkeypatch):
    x, weight, scores = (randn(shape, i).requires_grad_() for i, shape in enumerate(((8, 19), (5, 19), (5, 19))))
    key, kind, made = torch.tensor([4, 2]), Gumbel(0.5, samples=2), {}
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", cuda)
    for name in ("reference", "cuda"):
        out, penalty = masked_linear(x, weight, scores, 2.0, kind=kind, key=key, backend=name)
        made[name] = [out, penalty, *torch.autograd.grad((out * out).sum() + penalty, (x, weight, scores))]
    for ours, theirs in zip(made["cuda"], made["reference"], strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_sampled_calls_that_do_not_fit_are_refused_in_words(cuda):
    weight, kind = randn((4, 8), 0), Gumbel(samples=2).at(torch.tensor([3, 4]))
    thresholds = torch.zeros(4, 8, dtype=torch.int32).to(torch.uint16)
    for match, given in {
        "out must be contiguous with 64 elements, got shape .4, 8.": (thresholds, kind, torch.empty(4, 8)),
        "thresholds must be contiguous and of weight's shape": (thresholds.t(), kind, torch.empty(2, 4, 8)),
        "numbered below 2.32, got 2 from 4294967295": (thresholds, Gumbel(samples=2, sample=2**32 - 1).at(kind.key),
                                                         torch.empty(2, 4, 8)),
    }.items():  # fmt: skip
        with pytest.raises(RuntimeError, match=match):
            cuda.sampled_weights(weight, weight, given[0], BETA, *given[1:])


def test_the_check_of_the_timed_layer_sees_masks_of_another_step():
    layer = gpu_sampled.OursTogether(LayerCase((24, 40), (16, 40), "bf16").build())
    assert 0 < gpu_sampled.gate(layer, layer.kind) <= 1
    assert gpu_sampled.gate(layer, layer.kind.at(torch.tensor([1, 1]))) > 4
