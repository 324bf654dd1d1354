"""The plan: every run once, sizes together, replicates with streams of their own, and the time it will take."""

from __future__ import annotations

import pytest
import torch
from subnets.experiments.arithmetic import data, stages
from subnets.experiments.arithmetic.config import make_config
from subnets.experiments.arithmetic.plan import (
    CPU_STACK,
    GPU_STACK,
    Run,
    all_runs,
    cost,
    member_bytes,
    num_steps,
    on_this_machine,
    sizes_of,
    transfer_stacks,
)
from subnets.experiments.arithmetic.stages import base_stages, discovery_config, replicates, s1_batches
from subnets.experiments.arithmetic.timing import StageTime, estimate, seconds_left
from subnets.experiments.arithmetic.transfers import build_members
from subnets.report.page import duration
from subnets.subnet import Subnet


def planned(layers: int = 4, **overrides: str) -> list[list[Run]]:
    return transfer_stacks(make_config("paper", {"stack": "12", **overrides}), layers)


def test_every_run_is_in_exactly_one_stack_and_the_plan_depends_on_the_config_alone() -> None:
    for layers, pairs in ((4, 5), (12, 9)):
        stacks = planned(layers)
        runs = [run for stack in stacks for run in stack]
        config = make_config("paper")
        assert len(set(runs)) == len(runs) == 7 * 17 * pairs and set(runs) == set(all_runs(config, layers))
        assert all(len(stack) <= 12 for stack in stacks) and stacks == planned(layers)


def test_a_size_with_more_runs_than_a_stack_holds_has_stacks_of_its_own_of_equal_length() -> None:
    stacks = planned(sizes="640,0,1000", conditions="subnet,random_init,full_model")  # 15 runs per size
    assert [(sizes_of(stack), len(stack)) for stack in stacks] == [
        (n, count) for n in ("0", "640", "1000") for count in (7, 8)
    ]


def test_neighbouring_sizes_share_a_stack_as_long_as_all_their_runs_fit() -> None:
    stacks = planned(sizes="1000,10,40,16", conditions="subnet")  # 5 runs per size
    assert [sizes_of(stack) for stack in stacks] == ["10-16", "40-1000"] and {len(stack) for stack in stacks} == {10}
    assert [sizes_of(stack) for stack in planned(sizes="10,16,40", conditions="subnet", stack="15")] == ["10-40"]
    assert [len(stack) for stack in planned(stack="128")] == [105] * 5 + [70]  # three sizes of 35 in most


def test_quick_and_standard_train_one_n_per_stack_as_they_always_did() -> None:
    plans = {}
    for preset in ("quick", "standard"):
        config = on_this_machine(make_config(preset, {"device": "cpu"}))
        plans[preset] = [(sizes_of(s), len(s)) for s in transfer_stacks(config, config.layers[0])]
    assert plans["quick"] == [("640", 12), ("1000", 12)]
    assert plans["standard"] == [(n, count) for n in ("100", "250", "640", "1000") for count in (7, 8)]
    first = transfer_stacks(on_this_machine(make_config("quick", {"device": "cpu"})), 2)[0]
    assert first[:5] == [
        *[Run(name, 640, 0) for name in ("subnet", "full_model", "sampled", "random_init")], Run("subnet", 640, 1)
    ]  # fmt: skip


def test_the_plan_is_fixed_by_device_and_memory_before_the_config_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("paper", {"device": "cpu"})
    assert on_this_machine(config).stack == CPU_STACK and on_this_machine(config).device == "cpu"
    assert on_this_machine(make_config("paper", {"device": "cpu", "stack": "3"})).stack == 3
    with pytest.raises(ValueError, match=r"config.stack must be a number, got None; call on_this_machine first"):
        transfer_stacks(config, 2)

    class Properties:
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (on_this_machine(make_config("paper")).device, on_this_machine(make_config("paper")).stack) == (
        "cuda", GPU_STACK
    )  # fmt: skip
    Properties.total_memory = 2 * 2**30
    assert on_this_machine(make_config("paper")).stack == 2**30 // member_bytes(config.shape(12), 50)
    parameters = 12 * 196_608 + 1001 * 128
    assert member_bytes(config.shape(12), 50) > 25 * parameters


def test_seed_pairs_are_the_replicates_and_the_transfer_seeds_of_the_first_base() -> None:
    config = make_config("paper", {"base_seeds": "3", "transfer_seeds": "4", "transfer_seeds_at": "2"})
    assert config.seed_pairs(2) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (2, 2)]
    assert config.seed_pairs(4) == [(0, 0), (1, 1), (2, 2)]
    assert make_config("paper", {"base_seeds": "1"}).seed_pairs(4) == [(0, s) for s in range(5)]
    everywhere = make_config("paper", {"base_seeds": "2", "transfer_seeds_at": "none"})
    assert everywhere.seed_pairs(4) == [(0, s) for s in range(5)] + [(1, 1)]


def test_replicates_share_no_stream_and_replicate_0_is_the_config_itself(tmp_path) -> None:
    config = make_config("paper", {"layers": "1", "width": "16", "heads": "2", "base_pairs": "500"})
    depths = replicates(config, 1, tmp_path)
    assert [depth.folder.name for depth in depths] == [f"base{r}" for r in range(5)]
    assert depths[0].config == config and len({depth.config.seed for depth in depths}) == 5
    assert make_config("paper", {"seed": "1"}).seed not in {depth.config.seed for depth in depths}
    alone = make_config("paper", {"base_seeds": "1"})
    assert [(depth.config, depth.folder) for depth in replicates(alone, 1, tmp_path)] == [(alone, tmp_path)]

    def same(function) -> list[float]:
        first, *others = [function(depth) for depth in depths]
        return [(first == other).double().mean().item() for other in others]

    assert max(same(lambda depth: depth.model().state_dict()["h.0.mlp.c_fc.weight"])) < 0.01
    assert max(same(lambda depth: data.training_set(data.T1, 500, depth.config.seed)[:, :2])) < 0.1
    assert max(same(lambda depth: next(s1_batches(depth.config)(0))[:, :2])) < 0.1
    assert len({discovery_config(depth.config, 1).seed for depth in depths}) == 5


def test_a_transfer_seed_names_the_same_t2_data_and_fresh_weights_on_every_base(tmp_path) -> None:
    config = make_config("paper", {"layers": "1", "width": "16", "heads": "2"})
    depths = replicates(config, 1, tmp_path)
    bases = []
    for depth in depths[:2]:
        source = depth.model().state_dict()
        masks = {name: value > 0.01 for name, value in source.items() if "h.0" in name and value.ndim == 2}
        bases.append((source, Subnet(masks)))
    runs = [Run("random_init", 640, 1, 0), Run("random_init", 640, 1, 1), Run("random_init", 640, 0, 0)]
    members, _ = build_members(config, 1, bases, runs)
    first, second, other = members
    assert torch.equal(first.train, second.train) and torch.equal(first.test, second.test)
    assert first.streams == second.streams != other.streams
    name = "h.0.mlp.c_fc.weight"
    assert torch.equal(first.state[name], second.state[name]) and not torch.equal(first.state[name], other.state[name])
    embeddings = [member.state["wte.weight"] for member in members]  # inherited from the base
    assert torch.equal(embeddings[0], embeddings[2]) and not torch.equal(embeddings[0], embeddings[1])


def test_bases_of_one_depth_train_as_members_of_one_stack(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    train_stack = stages.train_stack

    def counting(shape, members, recipe, **more):
        seen.append(len(members))
        return train_stack(shape, members, recipe, **more)

    monkeypatch.setattr(stages, "train_stack", counting)
    config = make_config("paper", {
        "width": "16", "heads": "2", "base_pairs": "300", "base_epochs": "3", "base_seeds": "3", "num_held_out": "50"
    })  # fmt: skip
    depths = replicates(config, 1, tmp_path)
    states = base_stages(depths, tmp_path)
    assert [list(state) for state in base_stages(depths, tmp_path)] == [list(state) for state in states]
    assert seen == [3]  # the second call found the files
    (tmp_path / "base1" / "base.json").unlink()
    alone = base_stages(depths[1:2], tmp_path)
    assert seen == [3, 1]
    for name, value in alone[0].items():  # in company and alone: rounding apart, on the way of 18 steps of 5e-4
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)


def test_steps_and_time_left_by_hand() -> None:
    config = make_config("paper")
    assert num_steps(config, 0) == 2000 and num_steps(config, 640) == 3300 and num_steps(config, 10) == 2100
    assert sum(num_steps(config, run.num_disambiguation) for run in all_runs(config, 4)) == 18_648_000 // 6
    assert cost(config, 2) == 2 * 196_608 + 1001 * 128
    times = {
        2: {"base": StageTime(5, 5, 5, 50.0), "discovery": StageTime(5, 3, 2, 40.0), "transfer": StageTime(1000)},
        4: {"base": StageTime(5), "discovery": StageTime(5), "transfer": StageTime(1000, 0, 0, 0.0)},
    }
    cost_of = {2: 1.0, 4: 2.0}
    assert seconds_left(times, cost_of) == (2 * 20.0 + 5 * 20.0 + 5 * 40.0, False)  # no transfer was timed yet
    assert estimate(times, cost_of) == {2: None, 4: None}
    times[4]["transfer"] = StageTime(1000, 500, 250, 50.0)
    assert estimate(times, cost_of) == {2: 50 + 100 + 100, 4: 100 + 200 + 200}
    assert seconds_left(times, cost_of) == (340.0 + 1000 * 0.1 + 500 * 0.2, True)
    assert [duration(s) for s in (45, 700, 7_800, 200_000)] == ["45 s", "12 min", "2 h 10 min", "2 d 7 h"]


def test_a_device_that_is_not_there_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="there is no CUDA device for device='cuda'"):
        on_this_machine(make_config("quick", {"device": "cuda"}))
