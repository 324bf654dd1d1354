"""add_penalty_grad, pack_mask, unpack_mask and the choice of instruction set in C++, and what every op refuses."""

import platform
from pathlib import Path

import pytest
import torch

pytest.importorskip("subnet_kernels._C", reason="the extension is not built")
from subnet_kernels.backends.native import NativeBackend
from subnet_kernels.backends.reference import ReferenceBackend
from subnet_kernels.masks import as_kind
from tests.kernels.native_inputs import CAPABILITIES, assert_within, capability, ops, randn

BETA = torch.tensor(3.5)


@pytest.mark.parametrize("name", CAPABILITIES)
def test_add_penalty_grad_adds_lam_times_count_times_slope(name):
    scores = [randn((67, 129), 0), randn((5, 1), 1), randn((6, 35), 2, (1, 0)), torch.empty(0, 3)]
    scores.append(randn((9, 8), 3)[:, ::2])
    counts = [1, 40, 7, 3, 2]
    for transposed in (False, True):
        grads = [randn(tuple(s.shape), 9 + i, (1, 0) if transposed else None) for i, s in enumerate(scores)]
        before = [grad.double() for grad in grads]
        with capability(name):
            ops.add_penalty_grad(grads, scores, counts, BETA, 1e-2, 0)
        for grad, old, s, count in zip(grads, before, scores, counts):
            z = 3.5 * s.double()
            added = 1e-2 * count * 3.5 * torch.sigmoid(z) * torch.sigmoid(-z)
            assert_within(grad, old + added, 8 * 2.0**-24 * (old.abs() + added))


@pytest.mark.parametrize("backend", [NativeBackend("cpu"), ReferenceBackend()], ids=lambda backend: backend.name)
def test_add_penalty_grad_takes_lam_as_a_tensor(backend):
    scores = [randn((67, 129), 0), randn((5, 1), 1), randn((6, 35), 2, (1, 0))]
    for lam in (torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)):
        results = []
        for given in (0.25, lam):
            grads = [randn(tuple(s.shape), 9) for s in scores]
            backend.add_penalty_grad_(grads, scores, [1, 40, 7], BETA, given, as_kind("sigmoid"))
            results.append(grads)
        for with_float, with_tensor in zip(*results, strict=True):
            assert_within(with_tensor, with_float.double(), 4 * 2.0**-24 * (with_float.double().abs() + 10))


def test_add_penalty_grad_of_a_hard_mask_changes_nothing():
    grads = [randn((6, 35), 0)]
    before = grads[0].clone()
    ops.add_penalty_grad(grads, [randn((6, 35), 1)], [1], BETA, 1.0, 1)
    assert torch.equal(grads[0], before)


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("num", [0, 1, 7, 8, 9, 63, 64, 65, 1000003])
def test_pack_mask_puts_element_i_into_bit_i_modulo_8_and_unpacks(name, num):
    mask = torch.rand(num, generator=torch.Generator().manual_seed(num)) < 0.3
    with capability(name):
        packed = ops.pack_mask(mask)
        again = ops.unpack_mask(packed, num)
    padded = torch.zeros((num + 7) // 8 * 8, dtype=torch.int64)
    padded[:num] = mask
    truth = (padded.view(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8)
    assert packed.dtype == torch.uint8 and torch.equal(packed, truth)
    assert again.dtype == torch.bool and torch.equal(again, mask)


def test_the_chosen_instruction_set_is_the_best_that_the_processor_lists():
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or platform.machine() != "x86_64":
        assert CAPABILITIES[0] == "portable"
        return
    flags = set(next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")).split())
    avx2 = {"avx2", "fma", "f16c"} <= flags
    avx512 = avx2 and {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    assert CAPABILITIES == ("portable",) + ("avx2",) * avx2 + ("avx512",) * avx512
    assert ops.cpu_capability() == CAPABILITIES[-1]


def test_a_capability_that_does_not_exist_is_refused_and_nothing_changes():
    before = ops.cpu_capability()
    assert before in CAPABILITIES
    with pytest.raises(RuntimeError, match=r"name must be avx512, avx2 or portable.*'sse9'"):
        ops.set_cpu_capability("sse9")
    assert ops.cpu_capability() == before


WEIGHT, SCORES = torch.ones(4, 6), torch.ones(4, 6)


def forward(weight=WEIGHT, scores=SCORES, beta=BETA, kind=0, w_eff=None, penalty=None):
    w_eff = torch.empty_like(weight) if w_eff is None else w_eff
    ops.effective_weight(weight, scores, beta, kind, w_eff, torch.empty(()) if penalty is None else penalty)


@pytest.mark.parametrize(
    ("message", "bad"),
    [
        (r"scores must have weight's number of dimensions .* \[4, 6\], got \[4, 4\]", {"scores": torch.ones(4, 4)}),
        (r"scores must have weight's number of dimensions .* got \[6\]", {"scores": torch.ones(6)}),
        (r"scores must have .* got \[4, 0\]", {"scores": torch.ones(4, 0)}),
        (r"scores must have .* got \[8, 6\]", {"scores": torch.ones(8, 6)}),
        ("scores must be float32", {"scores": SCORES.double()}),
        ("weight must be float32, bfloat16 or float16", {"weight": WEIGHT.double()}),
        ("weight must be float32, bfloat16 or float16", {"weight": WEIGHT.to(torch.int32)}),
        ("weight must be dense", {"weight": torch.ones(4, 12)[:, ::2]}),
        ("weight must be dense", {"weight": torch.ones(4, 1).expand(4, 6)}),
        ("weight must have at most 8 dimensions, got 9", {"weight": torch.ones([1] * 9)}),
        (r"w_eff must have the shape of weight, \[4, 6\], got \[6, 4\]", {"w_eff": torch.ones(6, 4)}),
        ("w_eff must have weight's strides", {"w_eff": torch.ones(6, 4).t()}),
        ("w_eff must not share memory with weight", {"w_eff": WEIGHT}),
        ("w_eff must not share memory with scores", {"w_eff": SCORES}),
        ("beta must be 0-d", {"beta": torch.ones(1)}),
        ("beta must be float32", {"beta": BETA.double()}),
        ("penalty must be 0-d", {"penalty": torch.ones(2)}),
        ("kind must be 0 .sigmoid. or 1 .hard., got 2", {"kind": 2}),
    ],
)
def test_effective_weight_refuses_bad_input_in_words(message, bad):
    with pytest.raises(RuntimeError, match="effective_weight: " + message):
        forward(**bad)


def backward(grad=WEIGHT, penalty=BETA, scores=SCORES, grad_scores=None, grad_weight=None):
    grad_scores = torch.empty(scores.shape) if grad_scores is None else grad_scores
    ops.grad_scores(grad, penalty, torch.ones(4, 6), scores, BETA, 0, grad_scores, grad_weight)


@pytest.mark.parametrize(
    ("message", "bad"),
    [
        ("grad_w_eff must have the shape of weight", {"grad": torch.ones(4, 3)}),
        ("grad_w_eff must have weight's strides", {"grad": torch.ones(6, 4).t()}),
        ("grad_penalty must be 0-d", {"penalty": torch.ones(1)}),
        ("grad_scores must have the shape of scores", {"grad_scores": torch.ones(4, 1)}),
        ("grad_scores must be float32", {"grad_scores": torch.ones(4, 6, dtype=torch.bfloat16)}),
        ("grad_scores must not hold one element at several", {"grad_scores": torch.ones(4, 1).expand(4, 6)}),
        ("grad_scores must not share memory with scores", {"grad_scores": SCORES}),
        ("grad_weight must have weight's dtype", {"grad_weight": torch.ones(4, 6, dtype=torch.bfloat16)}),
        ("grad_weight must have the shape of weight", {"grad_weight": torch.ones(4, 3)}),
        ("grad_weight needs grad_w_eff", {"grad": None, "grad_weight": torch.ones(4, 6)}),
    ],
)
def test_grad_scores_refuses_bad_input_in_words(message, bad):
    with pytest.raises(RuntimeError, match="grad_scores: " + message):
        backward(**bad)


def test_grad_scores_refuses_a_partial_overlap_with_grad_w_eff():
    memory = torch.ones(30)
    with pytest.raises(RuntimeError, match="grad_scores must not share memory with grad_w_eff"):
        backward(grad=memory[:24].view(4, 6), grad_scores=memory[6:].view(4, 6))
    with pytest.raises(RuntimeError, match="grad_scores must not share memory with grad_w_eff"):
        backward(grad=memory[:24].view(4, 6), scores=torch.ones(4, 1), grad_scores=memory[:4].view(4, 1))


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(RuntimeError, match=r"must be lists as long as weights \(1\), got 2 and 1"):
        ops.effective_weights([WEIGHT], [SCORES] * 2, BETA, 0, [torch.empty(4, 6)], torch.empty(1))
    with pytest.raises(RuntimeError, match=r"penalties must have shape \[1\], got \[2\]"):
        ops.effective_weights([WEIGHT], [SCORES], BETA, 0, [torch.empty(4, 6)], torch.empty(2))
    with pytest.raises(RuntimeError, match=r"must be lists as long as grads \(1\), got 0 and 1"):
        ops.add_penalty_grad([WEIGHT.clone()], [], [1], BETA, 0.1, 0)


def test_packing_refuses_bad_input_in_words():
    with pytest.raises(RuntimeError, match="pack_mask: mask must be bool"):
        ops.pack_mask(torch.ones(8))
    with pytest.raises(RuntimeError, match="pack_mask: mask must be contiguous"):
        ops.pack_mask(torch.ones(8, 2, dtype=torch.bool).t())
    packed = torch.zeros(2, dtype=torch.uint8)
    for num in (8, 17, -1):
        with pytest.raises(RuntimeError, match=f"packed must be 1-d with ceil.num/8. bytes for num = {num}, got 2"):
            ops.unpack_mask(packed, num)
    with pytest.raises(RuntimeError, match="unpack_mask: packed must be uint8"):
        ops.unpack_mask(packed.to(torch.int8), 16)
