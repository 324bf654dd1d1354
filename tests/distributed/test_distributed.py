"""DDP and FSDP2 with two processes on gloo, against one process that takes the two ranks' rows in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from subnets import mask_model
from subnets.distributed import check_same
from torch import nn

from tests.distributed import ranks as scenario
from tests.distributed.ranks import BATCH, LAM, RATE, STEPS, mask, network, parts_of, resume, train, whole_scores

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # checkpoints of one process
EVERYTHING = [slice(0, BATCH)]


@cache
def alone(
    unit: str = "weight", dtype: torch.dtype = torch.float32, lam: float = LAM, keep: bool = True,
    at_once: bool = False, clip: float | None = None, even: bool = False, moments: str = "float32",
) -> Any:  # fmt: skip
    """The same training in this process: the ranks' rows in turn, gradients added, or all rows at once."""
    with one_thread():
        masks = mask(network(dtype, even), unit, keep)
        optimizer = masks.adamw(RATE, lam=lam, moment_dtype=getattr(torch, moments))
        parts = EVERYTHING if at_once else parts_of(0, world=1)
        train(masks.model, masks, optimizer, range(STEPS), parts, dtype, clip=clip)
    return masks


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As every rank has: the bits of a product depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def largest_difference(scores: dict[str, torch.Tensor], masks: Any) -> float:
    return max(float((scores[name] - value).abs().max()) for name, value in whole_scores(masks).items())


# --- DDP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"gradient_as_bucket_view": True}, {"moments": "bfloat16"}, {"compiled": True}],
    ids=["", "bucket_view", "bf16-moments", "compiled"],
)
def test_ddp_takes_the_steps_of_one_process_to_the_bit(ranks, kwargs):
    # dividing by two ranks is exact and two terms have one sum: not even rounding may differ
    one = alone(moments=kwargs.get("moments", "float32"))
    for result in ranks(scenario.ddp, **kwargs):
        assert largest_difference(result["scores"], one) == 0
        assert result["beta"] == one.beta
        assert all(torch.equal(result["kept"][name], kept) for name, kept in one.kept().items())
    assert 0.02 < one.density() < 0.98


def test_ddp_on_halves_is_one_process_on_the_whole_batch_within_rounding(ranks):
    # sums over eight rows in another order: 1e-12 is 5,000 roundoffs of fp64. A penalty that counts twice, the
    # smallest mistake there could be, changes scores by more than 1e-4
    whole = alone(dtype=torch.float64, at_once=True)
    for result in ranks(scenario.ddp, dtype="float64"):
        assert largest_difference(result["scores"], whole) < 1e-12
    twice = alone(dtype=torch.float64, at_once=True, lam=2 * LAM)
    assert largest_difference(whole_scores(twice), whole) > 1e-4


def test_ddp_counts_a_penalty_in_the_loss_once(ranks):
    # every rank adds lam * penalty, and the mean over ranks is one of it
    for result in ranks(scenario.ddp, dtype="float64", way="loss"):
        assert largest_difference(result["scores"], alone(dtype=torch.float64)) < 1e-12


def test_ddp_accumulates_gradients_without_communication(ranks):
    masks = mask(network())
    quarters = [slice(start, start + 2) for start in range(0, BATCH, 2)]
    with one_thread():
        train(masks.model, masks, masks.adamw(RATE, lam=LAM), range(STEPS), quarters)
    first, second = ranks(scenario.ddp_accumulating)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert largest_difference(first, masks) < 1e-5  # (a+b)+(c+d) for ((a+b)+c)+d


def test_ddp_brings_rank_0s_scores_to_all_ranks_and_makes_effective_weights_anew(ranks):
    first, second = ranks(scenario.ddp_takes_rank_0s_tensors)
    assert "scores of 0.weight (rank 1)" in first["before"] and first["before"] == second["before"]
    assert all(bool((value == 0.1).all()) for value in second["scores"].values())
    assert torch.equal(first["out"], second["out"])


def test_check_same_names_what_differs_on_every_rank(ranks):
    for of_scores, of_beta in ranks(scenario.differing):
        assert "not as on rank 0: scores of 3.weight (rank 1);" in of_scores
        assert "not as on rank 0: beta, hard or soft, schedule (rank 1);" in of_beta
    check_same(mask(network()))  # in one process


def test_masks_of_a_wrapped_model_have_the_models_own_names(ranks):
    for found in ranks(scenario.names):
        assert found == ["0.weight", "3.weight", "5.weight"]


@pytest.fixture(scope="session")
def refusals(ranks):
    return ranks(scenario.refused)


@pytest.mark.parametrize(
    "what, said",
    [
        ("in_backward", "RuntimeError: MaskAdamW: in_backward=True can't work in several processes"),
        ("batch_score_gradients", "RuntimeError: batch_score_gradients: works in one process, torch.distributed has 2"),
        ("discover", "RuntimeError: discover: works in one process, torch.distributed has 2 here; for one discovery"),
        ("mask after DDP", "ValueError: mask_model: the model is wrapped in DistributedDataParallel"),
        ("mask after DDP of a part", "ValueError: mask_model: 0 is wrapped in DistributedDataParallel"),
        ("mask after FSDP", "ValueError: mask_model: 0.weight is sharded already; mask first"),
        ("optimizer before FSDP", "RuntimeError: MaskSet.step: 0.weight was sharded by fully_shard after its masks"),
        ("audit", "RuntimeError: MaskSet.audit: the model is sharded (FSDP)"),
        ("param_dtype of a parameter", "TypeError: effective_weight: scores must be torch.float32 beside"),
        ("unmask", "ValueError: MaskSet.unmask: 0.weight is sharded (FSDP), which can't be undone in place"),
        ("penalty of what did not run", "RuntimeError: collect_penalty: a sharded layer (FSDP) did not run inside it"),
        ("param_dtype", "got torch.bfloat16; use scores.to(torch.float32), and under FSDP a MixedPrecisionPolicy"),
        ("two dtypes train", "FSDP expects uniform original parameter dtype"),
        ("str", "MaskSet(3 layers, beta 1, sharded)"),
    ],
    ids=lambda text: text if ":" not in text and len(text) < 30 else "",
)
def test_what_can_not_work_is_refused_on_every_rank_with_the_reason(refusals, what, said):
    assert all(said in refused[what] for refused in refusals)


def test_trainer_on_two_ranks_takes_the_steps_of_one_process(ranks, tmp_path):
    with one_thread():
        one = scenario.train_by_trainer(1, str(tmp_path / "one"))
    for result in ranks(scenario.trainer, folder=str(tmp_path / "two")):
        assert max(float((result[name] - value).abs().max()) for name, value in one.items()) < 1e-9
    assert all(float((value + 0.1).abs().mean()) > 0.01 for value in one.values())
    assert len((tmp_path / "two" / "metrics.csv").read_text().splitlines()) == 1 + 4 + 2 + 1  # of one rank


# --- FSDP2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs, bound",
    [
        ({"even": True}, 0),
        ({"even": True, "dtype": "bfloat16"}, 0),
        ({}, 1e-6),  # last bits
        ({"dtype": "float64"}, 1e-12),
        ({"dtype": "float64", "unit": "row"}, 1e-12),
        ({"dtype": "float64", "unit": "column"}, 1e-12),  # rank 1 has none of its scores, in one row
        ({"dtype": "float64", "clip": 0.01}, 1e-12),  # by a norm over all shards
        ({"even": True, "plan": "cached"}, 1e-6),  # asked for by hand: costs memory, and is right
        ({"even": True, "compiled": True}, 1e-6),
    ],
    ids=["even", "even-bf16-weights", "odd", "odd-fp64", "row", "column", "clipping", "cached", "compiled"],
)
def test_fsdp_takes_the_steps_of_one_process(ranks, kwargs, bound):
    dtype, settings = getattr(torch, kwargs.get("dtype", "float32")), {**kwargs}
    keeps = settings.pop("plan", "recompute") == "cached"
    settings.pop("compiled", None)
    settings.pop("dtype", None)
    one = alone(dtype=dtype, keep=False, **settings)
    first, second = ranks(scenario.fsdp, **kwargs)
    for result in (first, second):
        assert largest_difference(result["scores"], one) <= bound
        assert result["weights_are_unchanged"] and result["keeps_effective_weights"] == keeps
        assert result["plans"] == {"recompute"}
        assert result["density"] == one.density() and result["undecided"] == one.undecided()
        expected = one.subnet(ranks=True)
        assert result["base_hash"] == expected.base_hash and result["architecture"] == "Sequential"
        assert bound or all(torch.equal(result["ranks"][name], ranks) for name, ranks in expected.ranks.items())
        assert all(torch.equal(result["kept"][name], kept) for name, kept in one.kept().items())
    assert torch.equal(first["hard_out"], second["hard_out"])
    total = sum(scores.numel() for scores in one.scores().values())
    assert first["moments_here"] + second["moments_here"] == total
    assert all(float(scores.std()) > 0.005 for scores in whole_scores(one).values())
    if "clip" in kwargs:
        assert largest_difference(whole_scores(alone(dtype=dtype, keep=False)), one) > 1e-3


def test_fsdp_takes_a_network_from_the_meta_device(ranks):
    for result in ranks(scenario.fsdp_from_meta):
        assert largest_difference(result, alone(keep=False)) <= 1e-6


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_gpt2_takes_the_steps_of_one_process_to_the_bit(ranks, wrap):
    masks = scenario.gpt2()
    for layer in masks.layers.values() if wrap == "fsdp" else ():
        layer.plan = "recompute"  # as keep_effective_weights=False
    with one_thread():
        one = scenario.train_gpt2(masks.model, masks, parts_of(0, world=1))
    for result in ranks(scenario.gpt2_of, wrap=wrap):
        assert all(torch.equal(result[name], scores) for name, scores in one.items())
    assert len(one) == 8 and all(float((scores + 0.1).abs().mean()) > 0.01 for scores in one.values())


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_masks_of_parameters_take_the_steps_of_one_process(ranks, wrap):
    masks = scenario.tied()
    one = scenario.train_tied(masks.model, masks, parts_of(0, world=1))
    for scores, kept in ranks(scenario.tied_of, wrap=wrap):
        assert max(float((scores[name] - value).abs().max()) for name, value in one.items()) < 1e-12
        assert all(torch.equal(kept[name], value) for name, value in masks.kept().items())
    assert len(one) == 3 and all(float(value.std()) > 0.01 for value in one.values())


def test_fsdp_counts_a_penalty_in_the_loss_once(ranks):
    for result in ranks(scenario.fsdp, dtype="float64", way="loss"):
        assert largest_difference(result["scores"], alone(dtype=torch.float64)) < 1e-12


def test_fsdp_sees_scores_that_were_written_in_place(ranks):
    masks = mask(network(), score_init=1.0)
    expected = masks.model(scenario.batches()[0][0])
    for after, before in ranks(scenario.fsdp_edited):
        assert torch.allclose(after, expected, rtol=0, atol=1e-6) and not torch.allclose(after, before, atol=1e-2)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(ranks, wrap, tmp_path):
    ranks(scenario.saving, wrap=wrap, folder=str(tmp_path))
    masks = mask(network(), keep=wrap == "ddp")
    result = resume(0, 1, masks, masks.model, masks.adamw(RATE, lam=LAM), str(tmp_path))
    check_resumed(result, wrap)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_a_checkpoint_of_one_process_goes_on_on_two_ranks(ranks, wrap, tmp_path):
    masks = mask(network(), keep=wrap == "ddp")
    optimizer = masks.adamw(RATE, lam=LAM)
    train(masks.model, masks, optimizer, range(STEPS // 2), parts_of(0, world=1), clip=0.01)
    scenario.dcp.save({"masks": scenario.TrainingState(masks.model, masks, optimizer)}, checkpoint_id=str(tmp_path))
    for result in ranks(scenario.resuming, wrap=wrap, folder=str(tmp_path)):
        check_resumed(result, wrap)


def check_resumed(result: Any, wrap: str) -> None:
    one = alone(keep=wrap == "ddp", clip=0.01)
    assert result["beta"] == one.beta
    assert largest_difference(result["scores"], one) < 1e-5  # a norm over shards is summed up in another order
    assert largest_difference(whole_scores(mask(network())), one) > 0.01


def test_a_checkpoint_before_the_first_step_changes_nothing(tmp_path):
    masks = mask_model(nn.Sequential(nn.Linear(4, 3)), "all-linear")
    masks.anneal(to=10, steps=5)
    optimizer = masks.adamw(lam=0.1)
    scenario.dcp.save({"masks": scenario.TrainingState(masks.model, masks, optimizer)}, checkpoint_id=str(tmp_path))
    (state,) = optimizer.state.values()
    assert masks.beta == 1.0 and float(state["step"]) == 0 and not bool(state["exp_avg"].any())
