"""The CUDA backend's matrix products on CUTLASS: their epilogue on the host, and which of them would serve a call."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from subnet_kernels import dispatch
from subnet_kernels.backends import cuda_gemm
from subnet_kernels.backends.cuda_gemm import Gpu, choose, refusal, served
from subnet_kernels.backends.native import is_available
from subnet_kernels.masks import as_kind
from tests.kernels import cuda_on_host

ROOT = Path(__file__).parents[2]
H200, A100, L40 = Gpu(90, 132), Gpu(80, 108), Gpu(89, 142)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ALL = (
    "sm90_bf16_pingpong", "sm90_bf16_wide", "sm90_bf16_stream_k", "sm90_fp16_pingpong", "sm90_bf16_fp32_pingpong",
    "sm80_bf16_stream_k", "sm80_fp16_stream_k", "sm80_bf16_fp32_stream_k",
)  # fmt: skip
EPILOGUE = """
#include "cuda/gemm/score_gradient_epilogue.h"
struct Four {
  using Element = float;
  static constexpr int kElements = 4;
  float at[4];
  float& operator[](int i) { return at[i]; }
  float operator[](int i) const { return at[i]; }
};
extern "C" void epilogue(const float* product, const float* weight, const float* scores, float beta, float penalty,
                         float* out, int num) {
  const Four betas{{beta, beta, beta, beta}}, penalties{{penalty, penalty, penalty, penalty}};
  const auto four = [](const float* from) { return Four{{from[0], from[1], from[2], from[3]}}; };
  for (int i = 0; i < num; i += 4) {
    const Four made = subnet::ScoreGradientEpilogue<Four>{}(four(product + i), four(weight + i), four(scores + i),
                                                            betas, penalties);
    for (int j = 0; j < 4; ++j) out[i + j] = made[j];
  }
}
"""


@pytest.fixture(scope="module")
def epilogue(tmp_path_factory):
    """The functor of the CUDA kernels' epilogue, made by the host's compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("epilogue")
    (folder / "epilogue.cpp").write_text(EPILOGUE)
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, "epilogue.cpp", "-o", "epilogue.so"], cwd=folder, check=True)
    function = ctypes.CDLL(str(folder / "epilogue.so")).epilogue
    function.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_float] * 2, ctypes.c_void_p, ctypes.c_int]

    def run(product, weight, scores, beta, penalty):
        out = torch.full_like(product, float("nan"))
        pointers = [tensor.data_ptr() for tensor in (product, weight, scores)]
        function(*pointers, beta, penalty, out.data_ptr(), out.numel())
        return out

    return run


@pytest.mark.parametrize("beta", [0.5, 3.0, 200.0])
@pytest.mark.parametrize("penalty", [0.0, -0.25])
def test_the_epilogue_is_the_chain_rule_through_the_mask(epilogue, beta, penalty):
    generator = torch.Generator().manual_seed(7)
    product, weight, scores = (torch.randn(4096, generator=generator) for _ in range(3))
    got = epilogue(product, weight, scores, beta, penalty)
    z = beta * scores.double()
    slope = beta * torch.sigmoid(z) * torch.sigmoid(-z)
    true = (product.double() * weight.double() + penalty) * slope
    terms = (product * weight).abs().double() + abs(penalty)  # before they cancel
    # z is rounded to fp32 before exp, and a sigmoid below 2^-100 counts as 0
    bound = (6 + 2 * z.abs()) * 2.0**-24 * slope + beta * 1.001 * 2.0**-100
    assert ((got.double() - true).abs() <= bound * terms).all()
    assert got.abs().max() > 0.01  # and not all of it rounds to nothing


def test_the_epilogue_counts_a_closed_mask_as_zero(epilogue):
    ones = torch.ones(8)
    scores = torch.tensor([70.0, -70.0, 69.0, -69.0, 0.0, 1e30, -1e30, float("nan")])
    got = epilogue(ones, ones, scores, 1.0, 0.0)
    assert got[[0, 1, 5, 6]].tolist() == [0.0] * 4
    assert (got[2:4] > 0).all() and got[4] == 0.25 and got[7].isnan()


@pytest.mark.parametrize(
    ("n", "k", "on", "dtypes", "expected"),
    [
        (4096, 11008, H200, (BF16, BF16), "sm90_bf16_wide"),  # 1376 tiles of 128x256: 10.4 waves
        (8192, 28672, H200, (BF16, BF16), "sm90_bf16_wide"),
        (3072, 768, H200, (BF16, BF16), "sm90_bf16_stream_k"),  # 144 tiles of 128x128: the second wave has 12
        (512, 128, H200, (BF16, BF16), "sm90_bf16_stream_k"),  # 4 tiles
        (1408, 1536, H200, (BF16, BF16), "sm90_bf16_pingpong"),  # 132 tiles of 128x128, 66 of the larger
        (4096, 11008, H200, (FP16, FP16), "sm90_fp16_pingpong"),
        (4096, 11008, H200, (BF16, FP32), "sm90_bf16_fp32_pingpong"),
        (512, 128, H200, (FP16, FP16), None),
        (4096, 11008, H200, (FP16, FP32), None),
        (4096, 11008, A100, (BF16, BF16), "sm80_bf16_stream_k"),
        (512, 128, L40, (BF16, FP32), "sm80_bf16_fp32_stream_k"),
        (512, 128, Gpu(120, 170), (FP16, FP16), "sm80_fp16_stream_k"),
        (4096, 11008, Gpu(75, 40), (FP16, FP16), None),
    ],
)
def test_the_kernel_is_chosen_by_sizes_dtypes_and_gpu(n, k, on, dtypes, expected):
    kernel, reason = choose(n, k, *dtypes, on, ALL)
    assert kernel == expected and bool(reason) == (expected is None)
    if expected is None and on.capability == 90:
        assert "no sm90 kernel of tile" in reason


def test_a_gpu_runs_its_own_kernels_and_those_of_older_ones():
    own = ["sm90_bf16_pingpong", "sm90_bf16_wide", "sm90_bf16_stream_k"]
    assert served(BF16, BF16, H200, ALL) == [*own, "sm80_bf16_stream_k"]
    assert served(BF16, FP32, H200, ALL) == ["sm90_bf16_fp32_pingpong", "sm80_bf16_fp32_stream_k"]
    assert served(FP16, FP16, A100, ALL) == ["sm80_fp16_stream_k"]
    assert served(BF16, BF16, Gpu(100, 148), ALL) == ["sm80_bf16_stream_k"]  # sm_90a code runs nowhere else
    assert served(FP16, FP16, Gpu(75, 40), ALL) == served(FP16, FP32, H200, ALL) == []


def test_without_cutlass_the_refusal_says_so():
    assert choose(4096, 11008, BF16, BF16, H200, ()) == (
        None, "the extension was built without CUTLASS (its headers were not found), see docs/kernels.md"
    )  # fmt: skip


def tensors(m=16, n=24, k=32, dtype=BF16, weight_dtype=BF16):
    return [
        torch.zeros(m, n, dtype=dtype), torch.zeros(m, k, dtype=dtype), torch.zeros(n, k, dtype=weight_dtype),
        torch.zeros(n, k),
    ]  # fmt: skip


def test_what_the_products_can_not_read_is_refused_in_words():
    assert refusal(*tensors()) is None
    assert refusal(*tensors(weight_dtype=FP32)) is None
    grad_out, x, weight, scores = tensors()
    transposed = torch.zeros(32, 24, dtype=BF16).t(), torch.zeros(32, 24).t()
    assert refusal(grad_out, x, *transposed) is None
    assert "not 16-bit alike" in str(refusal(*tensors(dtype=FP32)))
    assert "not 16-bit alike" in str(refusal(grad_out.half(), x, weight, scores))
    assert "nothing to multiply" in str(refusal(*tensors(m=0)))
    assert "weight's shape and strides" in str(refusal(grad_out, x, weight, scores[:1]))
    assert "weight's shape and strides" in str(refusal(grad_out, x, weight, scores.double()))
    assert "not contiguous" in str(refusal(grad_out.t().contiguous().t(), x, weight, scores))
    assert "strides are (64, 2)" in str(refusal(
        grad_out, x, torch.zeros(24, 64, dtype=BF16)[:, ::2], torch.zeros(24, 64)[:, ::2]
    ))  # fmt: skip
    assert "[20, 32] or an address are no multiples of 16 bytes" in str(refusal(*tensors(n=20)))
    assert "[24, 33]" in str(refusal(*tensors(k=33)))
    off = torch.zeros(16 * 32 + 4, dtype=BF16)[4:].view(16, 32)
    assert "no multiples of 16 bytes" in str(refusal(grad_out, off, weight, scores))


@pytest.mark.skipif(not cuda_gemm.kernels(), reason="the extension was built without CUTLASS")
def test_the_extension_names_what_it_was_built_with():
    assert cuda_gemm.kernels() == ALL


def test_a_call_that_no_product_serves_goes_to_the_vendors(monkeypatch):
    backend = dispatch.BACKENDS["cuda"]
    taken = []
    monkeypatch.setattr(backend, "grad_scores", lambda grad, *rest, **more: taken.append(grad) or (grad, None))
    grad_out, x, weight, scores = (torch.randn_like(tensor) for tensor in tensors(n=20))
    beta = torch.tensor(2.0)
    made, _ = backend.linear_grad_scores(grad_out, x, None, weight, scores, beta, as_kind("sigmoid"), True, False)
    assert len(taken) == 1 and made is taken[0]
    torch.testing.assert_close(made, grad_out.t() @ x)


def test_a_transposed_weight_exchanges_the_factors(monkeypatch):
    """The op gets what is contiguous, and its result goes back to weight's strides."""
    calls = []

    class Op:
        @staticmethod
        def default(grad_out, grad_penalty, x, weight, scores, beta, kernel, grad_scores):
            calls.append(kernel)
            assert all(t.is_contiguous() for t in (grad_out, x, weight, scores, grad_scores))
            grad_scores.copy_((grad_out.float().t() @ x.float()) * weight + scores)

    monkeypatch.setattr(cuda_gemm, "_op", lambda: Op)
    grad_out, x, _, _ = (torch.randn_like(tensor) for tensor in tensors())
    weight, scores = torch.randn(32, 24, dtype=BF16).t(), torch.randn(32, 24).t()
    made = cuda_gemm.score_gradient(grad_out, x, None, weight, scores, torch.tensor(1.0), "sm90_bf16_pingpong")
    assert calls == ["sm90_bf16_pingpong"] and made.stride() == weight.stride()
    torch.testing.assert_close(made, (grad_out.float().t() @ x.float()) * weight + scores)


@pytest.fixture(scope="module")
def on_host():
    """The binding, over kernels that are plain loops."""
    if cuda_on_host.compiler() is None or not is_available():
        pytest.skip("there is no C++ compiler, or the extension is not built")
    cuda_on_host.load()
    return torch.ops.subnet_on_host


@pytest.mark.parametrize("kernel", ALL)
@pytest.mark.parametrize("penalty", [None, 0.5])
def test_the_binding_hands_every_tensor_to_its_kernel(on_host, kernel, penalty):
    assert on_host.score_gradient_kernels().split() == list(ALL)
    dtype = FP16 if "fp16" in kernel else BF16
    grad_out, x, weight, scores = (
        torch.randn(t.shape, generator=torch.Generator().manual_seed(i)).to(t.dtype)
        for i, t in enumerate(tensors(5, 16, 24, dtype, FP32 if "fp32" in kernel else dtype))
    )
    beta, made = torch.tensor(2.0), torch.full((16, 24), float("nan"))
    given = None if penalty is None else torch.tensor(penalty)
    on_host.score_gradient(grad_out, given, x, weight, scores, beta, kernel, made)
    slope = 2.0 * torch.sigmoid(2.0 * scores.double()) * torch.sigmoid(-2.0 * scores.double())
    true = (grad_out.double().t() @ x.double() * weight.double() + (penalty or 0.0)) * slope
    torch.testing.assert_close(made.double(), true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": (5, 20)}, "weight must be|x must be contiguous with shape \\[5, 24\\]"),
        ({"weight": (16, 20), "x": (5, 20)}, "N and K must be multiples of 8"),
        ({"grad_out": (0, 16), "x": (0, 24)}, "M at least 1"),
        ({"scores": (16, 1)}, "scores must be contiguous with shape \\[16, 24\\]"),
        ({"kernel": "sm70"}, "kernel must be one of sm90_bf16_pingpong .* got 'sm70'"),
        ({"kernel": "sm80_fp16_stream_k"}, "dtype float16 at a multiple of 16 bytes, .* dtype bfloat16"),
    ],
)
def test_the_binding_refuses_in_words_what_would_read_elsewhere(on_host, change, words):
    given = {"grad_out": (5, 16), "x": (5, 24), "weight": (16, 24), "scores": (16, 24), "kernel": ALL[0]} | change
    grad_out, x, weight = (torch.zeros(given[name], dtype=BF16) for name in ("grad_out", "x", "weight"))
    beta = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match=words):
        on_host.score_gradient(
            grad_out, None, x, weight, torch.zeros(given["scores"]), beta, given["kernel"], torch.zeros(weight.shape)
        )


def test_the_binding_refuses_memory_that_is_shared_or_off(on_host):
    grad_out, x, weight, scores = tensors(5, 16, 24)
    beta = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="grad_scores must not share memory with scores"):
        on_host.score_gradient(grad_out, None, x, weight, scores, beta, ALL[0], scores)
    off = torch.zeros(16 * 24 + 2)[2:].view(16, 24)
    with pytest.raises(RuntimeError, match="scores must be contiguous .* at a multiple of 16 bytes"):
        on_host.score_gradient(grad_out, None, x, weight, off, beta, ALL[0], torch.zeros(16, 24))
