"""masked_linear and linear_grad_scores in C++ (few rows of x, fp32), against fp64; their use by the cpu backend."""

import pytest
import torch

pytest.importorskip("subnet_kernels._C", reason="the extension is not built")
import subnet_kernels as sk
from subnet_kernels.backends.native import fused_linear_rows
from tests.kernels.native_inputs import CAPABILITIES, assert_within, capability, nan_like, ops, randn

BETA = torch.tensor(3.5)
PENALTY = torch.tensor(0.37)
MOST_ROWS = 96
# rows of x, weight: one register, tiles with every remainder, several blocks, sums of more than one part
SIZES = [(1, 1, 1), (1, 48, 16), (3, 7, 5), (8, 8, 8), (16, 49, 17), (31, 95, 64), (64, 96, 130), (65, 50, 33),
         (80, 101, 200), (96, 193, 67), (5, 6, 1601), (96, 13, 513)]  # fmt: skip
U = 2.0**-24


def size_id(size):
    return "x".join(map(str, size))


def inputs(size):
    m, n, k = size
    return randn((m, k), 0), randn((n, k), 1), randn((n, k), 2), randn((n,), 3), randn((m, n), 4)


def forward(x, weight, scores, bias):
    w_eff, penalty = nan_like(weight), torch.tensor(float("nan"))
    out = torch.full((x.shape[0], weight.shape[0]), float("nan"))
    ops.masked_linear(x, weight, scores, BETA, bias, w_eff, penalty, out)
    return out, penalty, w_eff


def grad_scores(grad_out, x, weight, scores, penalty=PENALTY):
    out = nan_like(scores)
    ops.linear_grad_scores(grad_out, penalty, x, weight, scores, BETA, out)
    return out


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("size", SIZES, ids=size_id)
def test_forward_matches_fp64_and_the_effective_weight_op(name, size):
    x, weight, scores, bias, _ = inputs(size)
    mask = torch.sigmoid(BETA.double() * scores.double())
    product = torch.nn.functional.linear(x.double(), weight.double() * mask)
    absolute = torch.nn.functional.linear(x.double().abs(), weight.double().abs() * mask) + bias.double().abs()
    eager = torch.nn.functional.linear(x, weight * torch.sigmoid(BETA * scores)).double()
    with capability(name):
        for b in (bias, None):
            out, penalty, w_eff = forward(x, weight, scores, b)
            again = nan_like(out)
            ops.linear(x, w_eff, b, again)
            assert torch.equal(out, again)
            truth = product if b is None else product + b.double()
            assert_within(out, truth, 2 * (eager - product).abs().max() + 4 * U * absolute, "out")
        assert penalty.item() == pytest.approx(mask.sum().item(), rel=1e-6)
        alone = nan_like(weight)
        ops.effective_weight(weight, scores, BETA, 0, alone, torch.empty(()))
    assert torch.equal(w_eff, alone)


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("size", SIZES, ids=size_id)
def test_score_gradients_match_fp64(name, size):
    x, weight, scores, _, grad_out = inputs(size)

    def expected(g, x, w, s, penalty):
        m = torch.sigmoid(BETA.to(s.dtype) * s)
        return ((g.t() @ x) * w + penalty) * (BETA.to(s.dtype) * m * torch.sigmoid(-BETA.to(s.dtype) * s))

    double = [t.double() for t in (grad_out, x, weight)]
    with capability(name):
        for penalty in (PENALTY, None):
            p = 0.0 if penalty is None else penalty.item()
            truth = expected(*double, scores.double(), p)
            absolute = expected(*(t.abs() for t in double), scores.double(), abs(p))
            worst = (expected(grad_out, x, weight, scores, p).double() - truth).abs().max()
            actual = grad_scores(grad_out, x, weight, scores, penalty)
            assert_within(actual, truth, 3 * worst + 8 * U * absolute, "grad_scores")


def test_long_sums_of_one_sign_keep_their_accuracy():
    """A single running sum over 20,000 values near 1 is off by some 1e-5; sums of parts are not."""
    x, weight, scores = torch.rand(4, 20_000) + 0.5, torch.rand(7, 20_000) + 0.5, randn((7, 20_000), 2)
    out, _, w_eff = forward(x, weight, scores, None)
    truth = x.double() @ w_eff.double().t()
    assert ((out.double() - truth) / truth).abs().max() < 2e-6


def test_results_do_not_depend_on_the_number_of_threads():
    x, weight, scores, bias, grad_out = inputs((64, 500, 300))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append((*forward(x, weight, scores, bias), grad_scores(grad_out, x, weight, scores)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_goes_where_it_belongs():
    x, weight, scores, bias, grad_out = inputs((5, 60, 40))
    weight[7, 3] = float("nan")
    x[2, 0] = float("nan")
    out, _, _ = forward(x, weight, scores, bias)
    is_nan = torch.zeros_like(out, dtype=torch.bool)
    is_nan[:, 7] = is_nan[2] = True
    assert torch.equal(out.isnan(), is_nan)
    is_nan = torch.zeros_like(weight, dtype=torch.bool)
    is_nan[:, 0] = is_nan[7, 3] = True
    assert torch.equal(grad_scores(grad_out, x, weight, scores).isnan(), is_nan)


@pytest.mark.parametrize(("change", "message"), [
    ({"x": torch.zeros(MOST_ROWS + 1, 4)}, "x must have 1 to 96 rows, got 97"),
    ({"x": torch.zeros(0, 4)}, "x must have 1 to 96 rows, got 0"),
    ({"x": torch.zeros(2, 5)}, r"weight must be a non-empty \[N, K\] and x \[..., K\]"),
    ({"x": torch.zeros(4, 2).t()}, "x must be contiguous with 8 elements"),
    ({"x": torch.zeros(2, 4, dtype=torch.bfloat16)}, "x must be float32"),
    ({"scores": torch.zeros(3, 1)}, "scores must have the shape of weight"),
    ({"bias": torch.zeros(4)}, "bias must be contiguous with 3 elements"),
    ({"out": torch.zeros(2, 2)}, "out must be contiguous with 6 elements"),
    ({"w_eff": torch.zeros(4, 3).t()}, "w_eff must be contiguous with 12 elements"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(change, message):
    given = {"x": torch.zeros(2, 4), "weight": torch.zeros(3, 4), "scores": torch.zeros(3, 4), "beta": BETA,
             "bias": None, "w_eff": torch.ones(3, 4), "penalty": torch.ones(()), "out": torch.ones(2, 3)}  # fmt: skip
    given.update(change)
    with pytest.raises(RuntimeError, match=message):
        ops.masked_linear(*given.values())
    assert given["penalty"] == 1
    if "w_eff" not in change:
        assert given["w_eff"].eq(1).all()


def test_shared_memory_is_refused():
    x, weight, scores, _, grad_out = inputs((4, 6, 8))
    with pytest.raises(RuntimeError, match="must not share memory"):
        ops.masked_linear(x, weight, scores, BETA, None, weight, torch.empty(()), torch.empty(4, 6))
    with pytest.raises(RuntimeError, match="must not share memory"):
        ops.linear_grad_scores(grad_out, None, x, weight, scores, BETA, scores)


@pytest.mark.skipif(fused_linear_rows() == 0, reason="this processor runs the portable kernels")
@pytest.mark.parametrize("case", ["fits", "rows", "columns", "strides", "dtype", "unit", "hard"])
def test_the_cpu_backend_uses_them_where_they_fit_and_agrees_elsewhere(case, monkeypatch):
    rows = fused_linear_rows() + (case == "rows")
    x, weight, scores, bias, _ = inputs((rows, 70, 240))
    if case == "columns":
        x = randn((240, rows), 0).t()
    if case == "strides":
        weight = randn((70, 240), 1, (1, 0))
    if case == "dtype":
        x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    if case == "unit":
        scores = scores[:, :1].contiguous()
    calls = []
    for name in ("masked_linear", "linear_grad_scores"):
        op = getattr(ops, name)
        spy = type("Spy", (), {"default": staticmethod(lambda *a, op=op, name=name: (calls.append(name), op(*a))[1])})
        monkeypatch.setattr(ops, name, spy)

    def results(backend):
        leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, scores)]
        out, penalty = sk.masked_linear(
            leaves[0], weight, leaves[1], 3.5, bias, kind="hard" if case == "hard" else "sigmoid", backend=backend
        )
        (out.float().square().sum() + 0.1 * penalty).backward()
        return out, penalty, leaves[0].grad, leaves[1].grad

    ours = results("cpu")
    assert calls == (["masked_linear", "linear_grad_scores"] if case == "fits" else [])
    for a, b in zip(ours, results("reference"), strict=True):
        if b is None:  # the scores of a hard mask have no gradient
            assert a is None and case == "hard"
            continue
        scale = b.float().abs().max()
        assert (a - b).float().abs().max() <= (2e-2 if case == "dtype" else 1e-5) * scale


@pytest.mark.parametrize("rows", [5, 200])
@pytest.mark.parametrize("case", ["plain", "row", "column", "transposed scores", "transposed weight"])
def test_a_layer_gives_the_same_bits_whether_its_effective_weight_was_there_or_not(rows, case):
    from subnets.nn import MaskedLinear

    x, weight, scores, bias, _ = inputs((rows, 70, 240))
    layer = MaskedLinear(240, 70, unit=case if case in ("row", "column") else "weight")
    if case == "transposed weight":
        layer.weight.data = weight.t().contiguous().t()
    if case == "transposed scores":
        layer.scores.data = scores.t().contiguous().t()
    with torch.no_grad():
        layer.weight.copy_(weight), layer.bias.copy_(bias)
        layer.scores.copy_(scores[: layer.scores.shape[0], : layer.scores.shape[1]])
    compiled = torch.compile(layer, backend="aot_eager")
    first, second = layer(x), layer(x)
    assert torch.equal(first, second) and torch.equal(first, compiled(x))
    layer._slot.clear()
    assert torch.equal(first, layer(x)) and torch.equal(first, compiled(x))
    with torch.inference_mode():
        assert torch.equal(first, layer(x))


def test_x_of_many_dimensions_is_served():
    x, weight, scores, bias, _ = inputs((4, 70, 240))
    out, _ = sk.masked_linear(x.view(1, 1, 1, 1, 1, 1, 1, 4, 240), weight, scores, 3.5, bias)
    assert out.shape == (1, 1, 1, 1, 1, 1, 1, 4, 70)
