"""mask_adamw in C++: AdamW, penalty gradient and the next effective weight in one pass, against fp64."""

import platform

import pytest
import torch

pytest.importorskip("subnet_kernels._C", reason="the extension is not built")
from subnet_kernels.backends.base import AdamW
from subnet_kernels.backends.native import NativeBackend
from subnet_kernels.masks import as_kind
from tests.kernels.native_inputs import CAPABILITIES, DTYPES, ROUNDOFF, assert_within, capability, nan_like, ops, randn

U = 2.0**-24
BETA, NEXT_BETA = torch.tensor(3.5), torch.tensor(4.25)
SETTINGS = dict(lr=0.03, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.7, lam=0.11)  # so that each of them is seen
SIZES = [(1,), (7,), (63,), (64,), (65,), (4095,), (4096,), (4097,), (70, 60), (16384,), (16385,), (3, 5, 7, 11)]


class State:
    """One entry: scores, gradient, moments, weight and, unless dtype is None, w_eff of that dtype and penalty."""

    def __init__(self, shape, step=3.0, weight_dtype=torch.float32, dtype=torch.float32, seed=0, order=None):
        draw = iter(randn(tuple(shape), 10 * seed + i, order) for i in range(5))
        self.scores, self.grad, self.exp_avg, self.weight = (next(draw) for _ in range(4))
        self.exp_avg_sq = next(draw).square() + 0.1
        self.weight = self.weight.to(weight_dtype)
        self.step = step
        self.slot = None if dtype is None else (nan_like(self.weight, dtype), torch.tensor(float("nan")))

    def clone(self):
        other = object.__new__(State)
        keep = {name: value.clone() for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        slot = self.slot and (nan_like(self.slot[0]), nan_like(self.slot[1]))
        vars(other).update(keep, step=self.step, slot=slot)
        return other

    def written(self):
        return [self.scores, self.exp_avg, self.exp_avg_sq, *(self.slot or ())]


def run(states, beta=BETA, next_beta=NEXT_BETA, **settings):
    numbers = {**SETTINGS, **settings}
    beta1, beta2 = numbers.pop("betas")
    NativeBackend("cpu").mask_adamw_(
        [s.scores for s in states], [s.grad for s in states], [s.exp_avg for s in states],
        [s.exp_avg_sq for s in states], [torch.tensor(s.step) for s in states], [s.weight for s in states],
        [s.slot for s in states], beta, next_beta, as_kind("sigmoid"), AdamW(beta1=beta1, beta2=beta2, **numbers),
    )  # fmt: skip


def slope_of(scores, beta):
    return beta * torch.sigmoid(beta * scores) * torch.sigmoid(-beta * scores)


def expected(state, lr, betas, eps, weight_decay, lam):
    """The formula in fp64, and for each result the bound that fp32 arithmetic must keep: first-order propagation of a
    few roundings per operation (add_penalty_grad's own bound for g; its constants have one rounding each)."""
    s, m, v = state.scores.double(), state.exp_avg.double(), state.exp_avg_sq.double()
    (b1, b2), t = betas, state.step
    pushed = lam * slope_of(s, BETA.double())
    g, g_error = state.grad.double() + pushed, 8 * U * (state.grad.double().abs() + pushed)
    m_size = m.abs() + (1 - b1) * (g.abs() + m.abs())
    m = m + (1 - b1) * (g - m)
    m_error = (1 - b1) * g_error + 4 * U * m_size
    v = b2 * v + (1 - b2) * g * g
    v_error = (1 - b2) * 2 * g.abs() * g_error + 6 * U * v
    root_scale = (1 - b2**t) ** -0.5
    denominator = v.sqrt() * root_scale + eps
    denominator_error = v_error / (2 * v.sqrt()) * root_scale + 4 * U * denominator
    update = lr / (1 - b1**t) * m / denominator
    update_error = lr / (1 - b1**t) * (m_error + m.abs() * denominator_error / denominator) / denominator
    s_size = s.abs() * (1 + lr * weight_decay) + update.abs()
    s = s - lr * weight_decay * s - update
    return {"exp_avg": (m, m_error), "exp_avg_sq": (v, v_error), "scores": (s, update_error + 4 * U * s_size)}


def check(before, after, **settings):
    """Everything against the formula; w_eff and penalty also, to the bit, against effective_weight."""
    truth = expected(before, **{**SETTINGS, **settings})
    for name, (value, bound) in truth.items():
        assert_within(getattr(after, name), value, bound, name)
    assert torch.equal(after.grad, before.grad) and torch.equal(after.weight, before.weight)
    if after.slot is None:
        return
    (w_eff, penalty), (s, s_error), beta = after.slot, truth["scores"], NEXT_BETA.double()
    mask, mask_error = torch.sigmoid(beta * s), slope_of(s, beta) * s_error
    mask_error = mask_error + 4 * U * mask * (1 + (beta * s).abs())
    weight, dtype = before.weight.double(), w_eff.dtype
    tiny = 2.0**-25 if dtype == torch.float16 else 0.0
    bound = weight.abs() * mask_error + ROUNDOFF[dtype] * (weight * mask).abs() * 1.01 + tiny
    assert_within(w_eff, weight * mask, bound, "w_eff")
    assert_within(penalty, mask.sum(), mask_error.sum() + 4 * U * mask.sum(), "penalty")
    again, sum_again = nan_like(w_eff), torch.tensor(float("nan"))
    ops.effective_weight(after.weight, after.scores, NEXT_BETA, 0, again, sum_again)
    assert torch.equal(w_eff, again) and torch.equal(penalty, sum_again)


def check_all(before, **settings):
    after = [state.clone() for state in before]
    run(after, **settings)
    for old, new in zip(before, after, strict=True):
        check(old, new, **settings)


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_every_size_matches_fp64(name, shape):
    with capability(name):
        check_all([State(shape)])
        check_all([State(shape, dtype=None)])


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_every_mix_of_dtypes_matches_fp64(name, weight_dtype, dtype):
    with capability(name):
        check_all([State((67, 129), weight_dtype=weight_dtype, dtype=dtype)])


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("lam", [0.0, 0.11])
@pytest.mark.parametrize("weight_decay", [0.0, 0.7])
@pytest.mark.parametrize("step", [1.0, 2.0, 10_000.0])
def test_lam_weight_decay_and_the_number_of_the_step_match_fp64(name, lam, weight_decay, step):
    with capability(name):
        check_all([State((33, 65), step)], lam=lam, weight_decay=weight_decay)


@pytest.mark.parametrize("name", CAPABILITIES)
def test_each_of_several_tensors_has_its_own_step_dtypes_and_slot(name):
    shapes = [(64, 33), (5,), (0, 3), (40_000,), (8, 4, 3, 3), (1,), (300, 200)]
    dtypes = [torch.float32, None, torch.float32, torch.bfloat16, torch.float16, None, torch.float32]
    states = [State(shape, 1.0 + i, DTYPES[i % 3], dtypes[i], seed=i) for i, shape in enumerate(shapes)]
    states[6] = State(shapes[6], 7.0, seed=6, order=(1, 0))
    with capability(name):
        check_all(states)
        run([])


@pytest.mark.parametrize("order", [(1, 0), (0, 2, 3, 1), (3, 1, 0, 2)], ids=str)
def test_same_strides_in_any_order_of_dimensions_match_fp64(order):
    check_all([State((6, 35) if len(order) == 2 else (6, 5, 3, 7), order=order)])


def test_without_lam_the_slope_is_not_looked_at():
    state = State((70,))
    state.slot = None
    other = state.clone()
    run([state], lam=0.0)
    run([other], beta=torch.tensor(float("nan")), lam=0.0)
    assert torch.equal(state.scores, other.scores) and not state.scores.isnan().any()


@pytest.mark.parametrize("name", CAPABILITIES)
def test_an_empty_weight_has_penalty_zero(name):
    state = State((0, 5))
    with capability(name):
        run([state])
    assert state.slot[1].item() == 0.0


@pytest.mark.parametrize("name", CAPABILITIES)
def test_roots_and_quotients_are_exact(name):
    """Without gradient, with both betas 1/2, step 1, lr 1/2 and eps 0, a score of 0 becomes
    -(m/2) / (sqrt(v/2) * sqrt(2)), in which only the root, the product and the quotient round, each to the nearest."""
    state = State((100_003,), 1.0, dtype=None)
    state.scores.zero_()
    state.grad.zero_()
    m, v = state.exp_avg / 2, state.exp_avg_sq / 2
    with capability(name):
        run([state], lr=0.5, betas=(0.5, 0.5), eps=0.0, weight_decay=0.0, lam=0.0)
    assert torch.equal(state.exp_avg, m) and torch.equal(state.exp_avg_sq, v)
    denominator = v.double().sqrt().float() * 2.0**0.5
    assert torch.equal(state.scores, -(m.double() / denominator.double()).float())


@pytest.mark.parametrize("name", CAPABILITIES)
def test_the_quotient_is_within_4_units_in_the_last_place_over_all_magnitudes(name):
    """eps is at its usual size, so that AVX-512 makes root and quotient without the processor's own."""
    state = State((100_003,), 1.0, dtype=None)
    exponents = torch.linspace(-120, 120, 100_003).round()
    state.exp_avg_sq = 2**exponents * (1 + torch.rand(100_003, generator=torch.Generator().manual_seed(0)))
    state.exp_avg = state.exp_avg * 2 ** (exponents / 2)
    state.scores.zero_()
    state.grad.zero_()
    m, v = state.exp_avg.double() / 2, state.exp_avg_sq.double() / 2
    with capability(name):
        run([state], lr=0.5, betas=(0.5, 0.5), eps=1e-8, weight_decay=0.0, lam=0.0)
    truth = -m / (v.sqrt() * 2.0**0.5 + 1e-8)
    assert_within(state.scores, truth, 4 * 2 * U * truth.abs())


@pytest.mark.parametrize("name", CAPABILITIES)
def test_an_infinite_second_moment_stops_the_score_and_0_over_0_moves_nothing(name):
    state = State((4,), dtype=None)
    state.grad.zero_()
    state.scores.fill_(1.0)
    state.exp_avg_sq = torch.tensor([float("inf"), 0.0, 3e38, float("inf")])
    state.exp_avg = torch.tensor([3e38, 0.0, 1.0, float("inf")])
    with capability(name):
        run([state], eps=1e-8, weight_decay=0.0, lam=0.0)
    assert state.scores[:3].tolist() == [1.0, 1.0, 1.0] and state.scores[3].isnan()  # as torch: inf/inf is NaN


@pytest.mark.parametrize("name", CAPABILITIES)
def test_a_nan_gradient_stays_in_its_element(name):
    state = State((130,))
    state.grad[[3, 129]] = float("nan")
    with capability(name):
        run([state])
    for tensor in (state.scores, state.exp_avg, state.exp_avg_sq, state.slot[0]):
        assert tensor.isnan().nonzero().flatten().tolist() == [3, 129]
    assert state.slot[1].isnan()


@pytest.mark.parametrize("name", CAPABILITIES)
def test_subnormal_moments_count_as_zero_and_change_neither_scores_nor_w_eff_nor_other_arithmetic(name):
    state = State((100_003,))
    state.grad.zero_()
    state.exp_avg.mul_(1e-39)
    state.exp_avg_sq.mul_(1e-40)
    state.weight.mul_(1e-38)
    before, is_x86 = state.clone(), platform.machine() in ("x86_64", "AMD64")
    with capability(name):
        run([state], eps=1e-8, lam=0.0)
        again = nan_like(state.slot[0])
        ops.effective_weight(state.weight, state.scores, NEXT_BETA, 0, again, torch.tensor(0.0))
    if is_x86:
        assert not state.exp_avg.any() and not state.exp_avg_sq.any()
    truth = before.scores.double() * (1 - 0.03 * 0.7)
    assert_within(state.scores, truth, 4 * U * truth.abs())
    assert torch.equal(again, state.slot[0]) and (state.slot[0].abs() < 2.0**-126).sum() > (state.slot[0] == 0).sum()
    assert (torch.full((100_003,), 1e-39) * 0.5).gt(0).all()


@pytest.mark.parametrize("name", CAPABILITIES)
def test_a_subnormal_second_moment_counts_where_eps_is_tiny(name):
    state = State((333,), dtype=None)
    state.scores.zero_()
    state.grad.zero_()
    state.exp_avg.fill_(1e-20)
    state.exp_avg_sq.fill_(1e-39)
    truth, _ = expected(state, **(settings := {**SETTINGS, "eps": 1e-20, "lam": 0.0}))["scores"]
    with capability(name):
        run([state], **settings)
    assert_within(state.scores, truth, 1e-5 * truth.abs())  # 1e-39 has 20 bits


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("size", [1, 5, 16, 63, 64, 65, 333])
def test_nothing_outside_the_tensors_is_read_into_them_or_written(name, size):
    """Every tensor lies between NaNs, at addresses that no register is aligned to."""
    plain = State((size,), dtype=torch.bfloat16, weight_dtype=torch.float16)
    guarded, memory = plain.clone(), []

    def guard(tensor):
        memory.append(torch.full((size + 65,), float("nan"), dtype=tensor.dtype))
        return memory[-1][33 : 33 + size].copy_(tensor)

    for attribute in ("scores", "grad", "exp_avg", "exp_avg_sq", "weight"):
        setattr(guarded, attribute, guard(getattr(guarded, attribute)))
    guarded.slot = guard(guarded.slot[0]), guarded.slot[1]
    with capability(name):
        run([plain])
        run([guarded])
    assert all(torch.equal(a, b) for a, b in zip(plain.written(), guarded.written(), strict=True))
    assert all(m[:33].isnan().all() and m[33 + size :].isnan().all() for m in memory)


@pytest.mark.parametrize("name", CAPABILITIES)
def test_50_steps_equal_torch_adamw_on_the_penalised_loss(name):
    """The loss's gradient is linear in the scores and of changing sign. Truth is torch's AdamW in fp64; the error of
    a score may be at most twice the largest of torch's AdamW in fp32, plus four roundings: the bound of testing.py."""
    settings = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    lam, targets = 1e-2, [randn((70, 60), 100 + i) for i in range(50)]
    start = 0.05 + 0.2 * randn((70, 60), 1)

    def torchs(dtype):
        scores = start.to(dtype).clone().requires_grad_()
        optimizer = torch.optim.AdamW([scores], **settings)
        for target in targets:
            optimizer.zero_grad()
            loss = (scores - target.to(dtype)).pow(2).sum() / 2
            (loss + lam * torch.sigmoid(BETA.to(dtype) * scores).sum()).backward()
            optimizer.step()
        return scores.detach().double()

    state = State((70, 60))
    state.scores = start.clone()
    for moment in (state.exp_avg, state.exp_avg_sq):
        moment.zero_()
    with capability(name):
        for i, target in enumerate(targets):
            state.grad, state.step = state.scores - target, i + 1.0
            run([state], beta=BETA, **settings, lam=lam)
    truth, error_of_torch = torchs(torch.float64), (torchs(torch.float32) - torchs(torch.float64)).abs().max()
    assert (truth - start).abs().mean() > 0.02  # it did move
    assert (state.scores.double() - truth).abs().max() <= 2 * error_of_torch + 4 * U * truth.abs().max()


@pytest.mark.parametrize("name", CAPABILITIES)
def test_results_are_bit_identical_in_every_run_and_for_every_number_of_threads(name):
    before = [State((700, 431), seed=1), State((5,), seed=2), State((100_000,), dtype=None, seed=3), State((257, 129))]
    results, threads = [], torch.get_num_threads()
    with capability(name):
        for num_threads in (1, 2, 3, 2, 1):
            torch.set_num_threads(num_threads)
            after = [state.clone() for state in before]
            run(after)
            results.append([tensor for state in after for tensor in state.written()])
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_list_gives_the_bits_of_one_call_per_tensor():
    together = [State((40_000,), seed=i) for i in range(3)]
    alone = [state.clone() for state in together]
    run(together)
    for one, other in zip(together, alone, strict=True):
        run([other])
        assert all(torch.equal(a, b) for a, b in zip(one.written(), other.written(), strict=True))


def test_versions_of_what_was_written_change_and_no_others():
    states = [State((5,)), State((5,), dtype=None)]
    kept = [BETA, NEXT_BETA, *(tensor for state in states for tensor in (state.grad, state.weight))]
    written = [tensor for state in states for tensor in state.written()]
    versions = [tensor._version for tensor in kept + written]
    run(states)
    assert [tensor._version for tensor in kept] == versions[: len(kept)]
    assert all(tensor._version > old for tensor, old in zip(written, versions[len(kept) :], strict=True))


ORDER = ("scores", "grads", "exp_avgs", "exp_avg_sqs", "weights", "w_effs", "penalties")


def raw(kind=0, lr=0.1, beta1=0.9, beta2=0.99, beta=BETA, next_beta=BETA, steps=(1.0,), **bad):
    given = {name: torch.ones(4, 6) for name in ORDER[:-1]} | {"penalties": torch.ones(())} | bad
    lists = [tensor if isinstance(tensor, list) else [tensor] for tensor in (given[name] for name in ORDER)]
    num = len(lists[0])
    none, firsts = [torch.empty(0)] * num, [0] * num
    lrs, lams = [lr] * num, [0.1] * num
    ops.mask_adamw(
        *lists, list(steps), beta, next_beta, kind, lrs, beta1, beta2, 1e-8, 0.0, lams, False, none, firsts
    )


SHARED = torch.ones(48)


@pytest.mark.parametrize(
    ("message", "bad"),
    [
        (r"all lists must be as long as scores \(1\), got one of 2", {"grads": [torch.ones(4, 6)] * 2}),
        (r"all lists must be as long as scores \(1\), got one of 0", {"steps": ()}),
        ("scores must be float32", {"scores": torch.ones(4, 6).double()}),
        ("exp_avgs and exp_avg_sqs must be float32 or bfloat16, both alike", {"exp_avgs": torch.ones(4, 6).bfloat16()}),
        ("exp_avgs and exp_avg_sqs must be float32 or bfloat16, both alike", {"exp_avgs": torch.ones(4, 6).half()}),
        (r"scores must have the shape of weights, \[4, 6\], got \[4, 1\]", {"scores": torch.ones(4, 1)}),
        ("grads must have weight's strides", {"grads": torch.ones(6, 4).t()}),
        ("exp_avg_sqs must have weight's strides", {"exp_avg_sqs": torch.ones(4, 1).expand(4, 6)}),
        ("weights must be dense", {"weights": torch.ones(4, 12)[:, ::2]}),
        ("weights must be float32, bfloat16 or float16", {"weights": torch.ones(4, 6).double()}),
        ("w_effs must have weight's strides", {"w_effs": torch.ones(6, 4).t()}),
        (r"w_effs must have the shape of weights, \[4, 6\], got \[0\]", {"w_effs": torch.ones(0)}),
        (r"w_effs without penalty must have 0 elements, got shape \[4, 6\]", {"penalties": torch.ones(0)}),
        ("penalties must be 0-d", {"penalties": torch.ones(2)}),
        ("beta must be 0-d", {"beta": torch.ones(1)}),
        ("next_beta must be float32", {"next_beta": BETA.double()}),
        ("kind must be 0 .sigmoid., a hard mask has no slope", {"kind": 1}),
        ("kind must be 0 .sigmoid. or 1 .hard., got 2", {"kind": 2}),
        ("steps count from 1, got 0", {"steps": (0.0,)}),
        ("steps count from 1, got nan", {"steps": (float("nan"),)}),
        (r"beta1 and beta2 must be in \[0, 1\), got 0.9.* and 1", {"beta2": 1.0}),
        (r"beta1 and beta2 must be in \[0, 1\), got -0.5", {"beta1": -0.5}),
        (
            "scores must not share memory with exp_avgs|exp_avgs must not share memory with scores",
            {"scores": SHARED[:24].view(4, 6), "exp_avgs": SHARED[20:44].view(4, 6)},
        ),
        (
            "w_effs must not share memory with weights",
            {"weights": SHARED[:24].view(4, 6), "w_effs": SHARED[:24].view(4, 6)},
        ),
        (
            "scores must not share memory with grads",
            {"grads": SHARED[:24].view(4, 6), "scores": SHARED[23:47].view(4, 6)},
        ),
    ],
)
def test_bad_input_is_refused_in_words_and_changes_nothing(message, bad):
    before = {name: value.clone() for name, value in bad.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(RuntimeError, match="mask_adamw: (" + message + ")"):
        raw(**bad)
    assert all(torch.equal(bad[name], value) for name, value in before.items())


def test_two_entries_may_share_a_weight_but_nothing_that_is_written():
    weight, scores = torch.ones(4, 6), torch.ones(4, 6)
    fresh = {name: [torch.ones(4, 6), torch.ones(4, 6)] for name in ORDER[:-1]}
    fresh |= {"penalties": [torch.ones(()), torch.ones(())], "weights": [weight, weight]}
    raw(steps=(1.0, 1.0), **fresh)
    with pytest.raises(RuntimeError, match="scores must not share memory with scores"):
        raw(steps=(1.0, 1.0), **(fresh | {"scores": [scores, scores]}))


def test_good_input_is_not_refused():
    raw()
    raw(w_effs=torch.ones(0), penalties=torch.ones(0))
