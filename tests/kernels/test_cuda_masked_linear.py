"""The CUDA kernel of linear layers with few rows of x, as a host function with the tensor cores' instruction written
out, against fp64."""

import pytest
import torch

from subnet_kernels.backends.cuda_gemm import few_rows_refusal
from subnet_kernels.masks import as_kind
from tests.kernels import cuda_on_host

if cuda_on_host.compiler() is None:
    pytest.skip("there is no C++ compiler", allow_module_level=True)
pytest.importorskip("subnet_kernels._C", reason="the extension is not built")
from tests.kernels.native_inputs import ROUNDOFF, assert_within, nan_like, randn

BETA = torch.tensor(3.0)
U = 2.0**-24
# m, n, k: one and several tiles of rows of x, blocks of 16 and of 64 rows of weight, shares of k, with tails everywhere
SIZES = [(1, 1, 8), (3, 17, 40), (16, 16, 256), (17, 40, 264), (64, 33, 1000), (65, 16, 64), (130, 24, 72)]
SIZES += [(5, 8200, 8)]  # enough blocks for four warps along the rows of weight


@pytest.fixture(scope="module")
def op():
    cuda_on_host.load()
    return torch.ops.subnet_on_host.masked_linear_few_rows.default


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_and_the_sum_of_the_mask_match_fp64(op, size, dtype):
    m, n, k = size
    x, weight, scores = randn((m, k), 1).to(dtype), randn((n, k), 2).to(dtype), randn((n, k), 3)
    bias = randn((n,), 4).to(dtype) if n % 2 else None
    out, penalty = nan_like(torch.empty(m, n), dtype), torch.tensor(float("nan"))
    op(x, weight, scores, BETA, bias, out, penalty)
    mask = torch.sigmoid(3.0 * scores.double())
    w_eff = (weight.double() * mask).to(torch.float64)
    true = x.double() @ w_eff.t() + (0 if bias is None else bias.double())
    absolute = x.double().abs() @ w_eff.abs().t() + (0 if bias is None else bias.double().abs())
    # w_eff is rounded to dtype once, the sum of k products is fp32, the result is rounded once
    u = ROUNDOFF[dtype]
    assert_within(out, true, 1.01 * u * (absolute + true.abs()) + (k + 8) * U * absolute + 2.0**-25)
    assert_within(penalty, mask.sum(), 16 * U * mask.sum())


def test_a_subnet_of_exact_numbers_gives_exact_outputs(op):
    """Scores so far from 0 that m is 1 or 0: every index that is off by one shows as a whole number."""
    m, n, k = 67, 70, 136
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-3, 4, (m, k), generator=generator).bfloat16()
    weight = torch.randint(-3, 4, (n, k), generator=generator).bfloat16()
    kept = torch.rand(n, k, generator=generator) < 0.05  # few, so that sums stay below 256, which bf16 holds
    scores = torch.where(kept, 100.0, -100.0)
    out, penalty = nan_like(torch.empty(m, n), torch.bfloat16), torch.tensor(float("nan"))
    op(x, weight, scores, BETA, None, out, penalty)
    assert torch.equal(out.double(), x.double() @ (weight.double() * kept).t())
    assert penalty == kept.sum()


def test_the_backend_takes_it_where_no_effective_weight_is_kept():
    backend, kind = cuda_on_host.OnHost(), as_kind("sigmoid")
    x, weight, scores, bias = randn((2, 3, 24), 1).half(), randn((17, 24), 2).half(), randn((17, 24), 3), None
    made, penalty, w_eff = backend.masked_linear(x, weight, scores, BETA, bias, kind, "recompute")
    kept, same_penalty, kept_w_eff = backend.masked_linear(x, weight, scores, BETA, bias, kind, "cached")
    assert w_eff is None and kept_w_eff is not None and made.shape == (2, 3, 17)
    assert_within(made, x.double() @ kept_w_eff.double().t(), 4 * ROUNDOFF[torch.float16] * kept.double().abs() + 1e-3)
    torch.testing.assert_close(penalty, same_penalty, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "hard"}, "kind 'hard'"),
        ({"x": (300, 16)}, "x has 300 rows, more than 256"),
        ({"x": (0, 16)}, "nothing to multiply"),
        ({"x": (4, 12), "weight": (8, 12), "scores": (8, 12)}, "rows of 12 weights"),
        ({"scores": (8, 1)}, "not fp32 of weight's shape"),
        ({"dtype": torch.float32}, "not 16-bit alike"),
    ],
)
def test_what_it_can_not_read_is_left_to_an_effective_weight(change, words):
    given = {"x": (4, 16), "weight": (8, 16), "scores": (8, 16), "kind": "sigmoid", "dtype": torch.bfloat16} | change
    x, weight = (torch.zeros(given[name], dtype=given["dtype"]) for name in ("x", "weight"))
    scores, kind = torch.zeros(given["scores"]), as_kind(given["kind"])
    assert words in str(few_rows_refusal(x, weight, scores, kind))


def test_twice_the_same_call_gives_the_same_bits(op):
    x, weight, scores = randn((20, 520), 1).half(), randn((50, 520), 2).half(), randn((50, 520), 3)
    made = []
    for _ in range(2):
        out, penalty = nan_like(torch.empty(20, 50), torch.float16), torch.tensor(float("nan"))
        op(x, weight, scores, BETA, None, out, penalty)
        made.append((out, penalty))
    assert torch.equal(made[0][0], made[1][0]) and torch.equal(made[0][1], made[1][1])


def test_what_the_kernel_can_not_read_is_refused_in_words(op):
    def call(x=(4, 16), weight=(8, 16), scores=(8, 16), out=(4, 8), dtype=torch.bfloat16, bias=None):
        tensors = [torch.zeros(shape, dtype=dtype) for shape in (x, weight)]
        op(*tensors, torch.zeros(scores), BETA, bias, torch.zeros(out, dtype=dtype), torch.tensor(0.0))

    call()
    with pytest.raises(RuntimeError, match="K a multiple of 8"):
        call(x=(4, 12), weight=(8, 12), scores=(8, 12))
    with pytest.raises(RuntimeError, match="M from 1 to 256"):
        call(x=(257, 16), out=(257, 8))
    with pytest.raises(RuntimeError, match="16-bit"):
        call(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="scores must be contiguous"):
        call(scores=(8, 1))
    with pytest.raises(RuntimeError, match="out must be contiguous with shape"):
        call(out=(8, 4))
    with pytest.raises(RuntimeError, match="bias must be contiguous"):
        call(bias=torch.zeros(7, dtype=torch.bfloat16))
