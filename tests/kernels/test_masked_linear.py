"""masked_linear on every backend that runs here, against fp64."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

import subnet_kernels as sk
from subnet_kernels.testing import Case, linear_case, ours, worst_errors

BACKENDS = [("reference", "cached"), ("reference", "fused"), ("cpu", "cached"), (None, None)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (3, 5, 7), (64, 17, 129), (33, 128, 96), (257, 31, 64)]


def by(backend: str | None, plan: str | None):
    return lambda case: ours(case, backend=backend, plan=plan)


def assert_within_bound(case: Case, op) -> None:
    worst = worst_errors(case, op)
    assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize("backend, plan", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_every_gradient_are_within_the_error_bound(backend, plan, dtype, shape):
    assert_within_bound(linear_case(*shape, dtype), by(backend, plan))


@pytest.mark.parametrize("backend, plan", BACKENDS)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("scores_shape", [(24, 1), (1, 36), (1, 1), (4, 1), (6, 12), (24, 9), (24, 36)], ids=str)
def test_coarser_scores_and_transposed_weights_are_within_the_error_bound(backend, plan, scores_shape, is_transposed):
    for dtype in DTYPES:
        case = linear_case(10, 24, 36, dtype, scores_shape=scores_shape, is_transposed=is_transposed)
        assert_within_bound(case, by(backend, plan))


@pytest.mark.parametrize("backend, plan", BACKENDS)
@pytest.mark.parametrize("beta", [0.0, 1.0, 200.0, 1e30])
def test_every_beta_from_zero_to_saturation_is_within_the_error_bound(backend, plan, beta):
    case = linear_case(9, 33, 65, beta=beta)
    case.scores.view(-1)[:3] = torch.tensor([0.0, 1e-3, -1e-3])
    assert_within_bound(case, by(backend, plan))


@pytest.mark.parametrize("backend, plan", BACKENDS)
def test_hard_mask_keeps_positive_scores_only_and_gives_scores_no_gradient(backend, plan):
    case = linear_case(4, 6, 5, kind="hard")
    case.scores[0, :3] = torch.tensor([0.0, -0.0, 1e-38])
    assert_within_bound(case, by(backend, plan))
    scores = case.scores.clone().requires_grad_()
    out, penalty = sk.masked_linear(case.x, case.weight, scores, 5.0, kind="hard", backend=backend, plan=plan)
    assert torch.equal(out, F.linear(case.x, case.weight * (case.scores > 0)))
    assert penalty.item() == (case.scores > 0).sum().item()
    out.sum().backward() if out.requires_grad else None
    assert scores.grad is None or not scores.grad.any()


@pytest.mark.parametrize("backend, plan", BACKENDS)
def test_each_gradient_alone_equals_the_same_gradient_with_all(backend, plan):
    case = linear_case(7, 12, 20)

    def gradients(*wanted: str) -> dict[str, torch.Tensor]:
        leaves = {n: t.detach().clone().requires_grad_(n in wanted) for n, t in case.tensors().items()}
        out, penalty = sk.masked_linear(
            leaves["x"], leaves["weight"], leaves["scores"], 3.0, leaves["bias"], backend=backend, plan=plan
        )
        ((out * case.grad_out).sum() + 0.37 * penalty).backward()
        return {n: leaves[n].grad for n in wanted}

    together = gradients("x", "weight", "scores", "bias")
    for name, gradient in together.items():
        assert torch.equal(gradients(name)[name], gradient), name


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_empty_batch_gives_an_empty_output_and_the_penalty_gradient(backend):
    scores = torch.randn(4, 6, requires_grad=True)
    x = torch.empty(0, 6, requires_grad=True)
    out, penalty = sk.masked_linear(x, torch.randn(4, 6), scores, 2.0, torch.randn(4), backend=backend)
    assert out.shape == (0, 4)
    (out.sum() + penalty).backward()
    m = torch.sigmoid(2 * scores.detach().double())
    assert x.grad.shape == (0, 6)
    torch.testing.assert_close(scores.grad.double(), 2 * m * (1 - m), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n, k", [(0, 5), (5, 0), (0, 0)])
def test_an_empty_weight_is_valid(n, k):
    out, penalty = sk.masked_linear(torch.randn(3, k), torch.randn(n, k), torch.randn(n, k), 1.0)
    assert out.shape == (3, n) and penalty.item() == 0 and not out.any()


@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (2, 1, 4)], ids=str)
def test_leading_dimensions_are_those_of_f_linear(leading):
    x, w, s = torch.randn(*leading, 6), torch.randn(4, 6), torch.randn(4, 6)
    out, _ = sk.masked_linear(x, w, s, 1.5)
    assert out.shape == (*leading, 4)
    torch.testing.assert_close(out, F.linear(x, w * torch.sigmoid(1.5 * s)))


def test_non_contiguous_inputs_give_the_result_of_contiguous_ones():
    x, w, s = torch.randn(12, 16)[::2, ::2], torch.randn(10, 16)[::2, ::2], torch.randn(10, 16)[::2, ::2]
    out, penalty = sk.masked_linear(x, w, s, 2.0)
    expected, penalty_expected = sk.masked_linear(x.contiguous(), w.contiguous(), s.contiguous(), 2.0)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(penalty, penalty_expected)
    s = s.detach().requires_grad_()
    sk.masked_linear(x, w, s, 2.0)[0].sum().backward()
    s2 = s.detach().contiguous().requires_grad_()
    sk.masked_linear(x, w.contiguous(), s2, 2.0)[0].sum().backward()
    torch.testing.assert_close(s.grad, s2.grad)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("is_weight_transposed", [False, True])
def test_scores_of_other_strides_than_weight_give_the_same_and_a_gradient_in_their_own(backend, is_weight_transposed):
    case = linear_case(5, 12, 20, is_transposed=is_weight_transposed)
    other = case.scores.t().contiguous().t() if not is_weight_transposed else case.scores.contiguous()
    leaves = [s.clone(memory_format=torch.preserve_format).requires_grad_() for s in (case.scores, other)]
    results = [sk.masked_linear(case.x, case.weight, s, 3.0, backend=backend) for s in leaves]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    for out, penalty in results:
        (out.sum() + penalty).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-6, atol=1e-6)
    assert leaves[1].grad.stride() == leaves[1].stride()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_repeated_calls_are_bit_identical(backend):
    case = linear_case(65, 130, 257, torch.bfloat16)
    first = None
    for _ in range(3):
        scores = case.scores.clone().requires_grad_()
        out, penalty = sk.masked_linear(case.x, case.weight, scores, 3.0, case.bias, backend=backend)
        (out.float().sum() + penalty).backward()
        result = (out, penalty, scores.grad)
        first = first or result
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))


def test_beta_as_a_tensor_equals_beta_as_a_float_and_is_read_when_it_runs():
    x, w, s = torch.randn(3, 6), torch.randn(4, 6), torch.randn(4, 6)
    beta = torch.tensor(2.0)
    assert torch.equal(sk.masked_linear(x, w, s, beta)[0], sk.masked_linear(x, w, s, 2.0)[0])
    beta.fill_(7.0)
    assert torch.equal(sk.masked_linear(x, w, s, beta)[0], sk.masked_linear(x, w, s, 7.0)[0])


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_of_f_linear_and_rounds_only_the_effective_weight(autocast_dtype):
    x, w, s, b = torch.randn(5, 8), torch.randn(4, 8), torch.randn(4, 8, requires_grad=True), torch.randn(4)
    with torch.autocast("cpu", autocast_dtype):
        out, penalty = sk.masked_linear(x, w, s, 2.0, b)
        assert out.dtype == F.linear(x, w, b).dtype == autocast_dtype
    rounded = (w * torch.sigmoid(2.0 * s)).to(autocast_dtype)
    expected = F.linear(x.to(autocast_dtype), rounded, b.to(autocast_dtype))
    assert torch.equal(out, expected) and penalty.dtype == torch.float32
    out.sum().backward()
    assert s.grad.dtype == torch.float32


def test_kept_for_backward_is_x_weight_scores_and_one_effective_weight():
    w, s = torch.randn(64, 32), torch.randn(64, 32, requires_grad=True)
    x = torch.randn(8, 32, requires_grad=True)
    for plan, allowed in (("cached", w.numel()), ("fused", 0)):
        kept: dict[int, torch.Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):  # noqa: B023
            sk.masked_linear(x, w, s, 2.0, plan=plan)
        extra = [t.numel() for p, t in kept.items() if p not in (x.data_ptr(), w.data_ptr(), s.data_ptr())]
        assert sum(n for n in extra if n > 1) == allowed, plan


# --- autograd, schema and compiler contracts -------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["cached", "fused"])
@pytest.mark.parametrize("scores_shape", [(4, 6), (4, 1), (2, 3)], ids=str)
def test_gradcheck_in_fp64(plan, scores_shape):
    case = linear_case(3, 4, 6, torch.float64, scores_shape=scores_shape)
    leaves = [t.requires_grad_() for t in (case.x, case.weight, case.scores, case.bias)]
    assert torch.autograd.gradcheck(lambda x, w, s, b: sk.masked_linear(x, w, s, 1.7, b, plan=plan), leaves)


@pytest.mark.parametrize("kind", ["sigmoid", "hard"])
@pytest.mark.parametrize("plan", [None, "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(kind, plan, dtype):
    case = linear_case(3, 4, 6, dtype)
    x, w, s, b = (t.requires_grad_() for t in (case.x, case.weight, case.scores, case.bias))
    beta = torch.tensor(1.5, dtype=s.dtype)
    torch.library.opcheck(
        torch.ops.subnet_kernels.masked_linear.default, (x, w, s, beta, b, kind, [], None, plan, None, None, None)
    )
    x, w, s = x.detach(), w.detach(), s.detach()
    upstream = (torch.randn(3, 4, dtype=dtype), torch.ones((), dtype=s.dtype))
    args = (*upstream, x, w, s, beta, None, kind, [], None, None, [True] * 4)
    torch.library.opcheck(torch.ops.subnet_kernels.masked_linear_backward.default, args)


def test_double_backward_raises_eagerly_and_through_the_registered_op():
    x, w, s = torch.randn(3, 6, requires_grad=True), torch.randn(4, 6), torch.randn(4, 6, requires_grad=True)
    out, _ = sk.masked_linear(x, w, s, 1.0)
    (grad,) = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad.sum().backward()
    args = (x, w, s, torch.tensor(1.0), None, "sigmoid", [], None, None, None, None, None)
    out = torch.ops.subnet_kernels.masked_linear(*args)[0]
    (grad,) = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def test_compile_fullgraph_gives_eager_results_without_recompiling_for_a_new_beta():
    case = linear_case(5, 8, 6)
    beta = torch.tensor(1.0)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(x, w, s, b):
        return sk.masked_linear(x, w, s, beta, b)

    for value in (1.0, 5.0, 80.0):
        beta.fill_(value)
        scores = case.scores.clone().requires_grad_()
        out, penalty = step(case.x, case.weight, scores, case.bias)
        (out.sum() + penalty).backward()
        scores_eager = case.scores.clone().requires_grad_()
        out_eager, penalty_eager = sk.masked_linear(case.x, case.weight, scores_eager, value, case.bias)
        (out_eager.sum() + penalty_eager).backward()
        assert torch.equal(out, out_eager) and torch.equal(penalty, penalty_eager)
        assert torch.equal(scores.grad, scores_eager.grad)
    assert counter.frame_count == 1


def test_torch_func_grad_and_vmap_over_scores_equal_a_loop():
    x, w = torch.randn(5, 6), torch.randn(4, 6)
    many = torch.randn(3, 4, 6)

    def loss(s):
        out, penalty = sk.masked_linear(x, w, s, torch.tensor(2.0))
        return out.pow(2).sum() + 0.1 * penalty

    together = torch.func.vmap(torch.func.grad(loss))(many)
    for scores, gradient in zip(many, together, strict=True):
        leaf = scores.clone().requires_grad_()
        loss(leaf).backward()
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-5)
    with sk.use_backend("cpu"), pytest.raises(sk.BackendRefused, match=r"torch\.func"):
        torch.func.grad(loss)(many[0])


# --- bad input -------------------------------------------------------------------------------------------------------

X, W, S, B = torch.randn(3, 6), torch.randn(4, 6), torch.randn(4, 6), torch.randn(4)


@pytest.mark.parametrize(
    "args, kwargs, error, words",
    [
        ((X, W, S.t(), 1.0), {}, ValueError, r"weight's shape \[4, 6\] or sizes that divide it, got \[6, 4\]"),
        ((X, W, torch.randn(4, 4), 1.0), {}, ValueError, "sizes that divide it"),
        ((X, W, torch.randn(2, 4, 6), 1.0), {}, ValueError, "first dimension must be a multiple of the 2 masks"),
        ((X[0], W, torch.randn(2, 4, 6), 1.0), {}, ValueError, "x needs a batch dimension in front"),
        ((X, W, torch.randn(0, 4, 6), 1.0), {}, ValueError, "at least one mask"),
        ((X, W, torch.randn(3, 4, 6), 1.0), {"plan": "fused"}, NotImplementedError, "plan 'fused' is not built"),
        ((X, W, S, 1.0), {"shared_input": True}, ValueError, "shared_input=True needs scores with a leading dim"),
        ((X, W, S.half(), 1.0), {}, TypeError, "scores must be torch.float32"),
        ((X, W, S.double(), 1.0), {}, TypeError, "scores must be torch.float32"),
        ((X.double(), W, S, 1.0), {}, TypeError, "x must have weight's dtype torch.float32, got torch.float64"),
        ((X[:, :5], W, S, 1.0), {}, ValueError, r"x must have 6 features .* got shape \[3, 5\]"),
        ((X, W[0], S[0], 1.0), {}, ValueError, "weight must have 2 dimensions"),
        ((X, W, S, -1.0), {}, ValueError, "beta must be finite and >= 0, got -1.0"),
        ((X, W, S, float("nan")), {}, ValueError, "beta must be finite"),
        ((X, W, S, float("inf")), {}, ValueError, "beta must be finite"),
        ((X, W, S, "2"), {}, TypeError, "beta must be a float or a 0-d tensor"),
        ((X, W, S, torch.ones(1)), {}, ValueError, "beta must be a float or a 0-d tensor"),
        ((X, W, S, torch.ones((), requires_grad=True)), {}, ValueError, "beta must not require grad"),
        ((X, W, S, torch.ones((), device="meta")), {}, ValueError, "beta must be on the scores' device"),
        ((X, W, S, 1.0, B[:3]), {}, ValueError, r"bias must have shape \[4\], got \[3\]"),
        ((X, W, S, 1.0, B.double()), {}, ValueError, "bias must have x's dtype"),
        ((X, W, S, 1.0), {"kind": "soft"}, ValueError, r"kind must be one of \['bernoulli', .*, got 'soft'"),
        ((X, W, S, 1.0), {"plan": "fast"}, ValueError, "plan must be 'cached', 'fused', 'recompute' or None"),
        ((X, W, S, 1.0), {"backend": "gpu"}, ValueError, "backend must be one of"),
        ((X, W, S, 1.0), {"backend": "cuda"}, sk.BackendRefused, "backend 'cuda' refused masked_linear: "),
        ((X, W, S, 1.0), {"backend": "triton"}, sk.BackendRefused, "backend 'triton' refused masked_linear: "),
        ((X, W, S, 1.0), {"backend": "cpu", "plan": "fused"}, sk.BackendRefused, "plan 'fused' is not built here yet"),
        ((X.to("meta"), W, S, 1.0), {}, ValueError, "x must be on weight's device"),
        ((X, W, S.to("meta"), 1.0), {}, ValueError, "scores must be on weight's device"),
        ((X.long(), W, S, 1.0), {}, TypeError, "x must have weight's dtype"),
        ((X, W.long(), S, 1.0), {}, TypeError, "weight must be float32, bfloat16, float16 or float64"),
        (([1.0], W, S, 1.0), {}, TypeError, "x must be a tensor, got list"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(args, kwargs, error, words):
    with pytest.raises(error, match=words) as info:
        sk.masked_linear(*args, **kwargs)
    assert "\n" not in str(info.value)


def test_use_backend_forces_its_backend_and_explain_says_so():
    with sk.use_backend("reference"):
        assert sk.explain("masked_linear", X, W, S, 1.0).splitlines()[0] == (
            "masked_linear on cpu: backend reference, plan cached"
        )
    assert "backend cpu" in sk.explain("masked_linear", X, W, S, 1.0)
    assert "copied at every call" in sk.explain("masked_linear", X, W, S.t().contiguous().t(), 1.0)
    told = sk.explain("masked_linear", X, W, S, 1.0, plan="fused")
    assert "backend reference, plan fused" in told and "cpu: refused: plan 'fused'" in told
    with pytest.raises(ValueError, match="backend must be one of"), sk.use_backend("tpu"):
        pass


def test_the_refresh_op_writes_only_what_is_stale_and_passes_opcheck():
    w, s, beta = torch.randn(4, 6), torch.randn(4, 6), torch.tensor(2.0)
    slot = sk.Slot()
    w_eff, penalty = slot.buffers(w, torch.float32)
    args = (w, s, beta, "sigmoid", [], slot.number, w_eff, penalty)
    torch.ops.subnet_kernels.refresh_effective_weight(*args)
    assert torch.equal(w_eff, sk.effective_weight(w, s, 2.0)[0])
    w_eff.zero_()  # behind the slot's back: a fresh slot is not written again
    torch.ops.subnet_kernels.refresh_effective_weight(*args)
    assert not w_eff.any()
    beta.fill_(3.0)
    torch.ops.subnet_kernels.refresh_effective_weight(*args)
    assert torch.equal(w_eff, sk.effective_weight(w, s, 3.0)[0])
    torch.library.opcheck(torch.ops.subnet_kernels.refresh_effective_weight.default, args)
