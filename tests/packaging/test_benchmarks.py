"""The benchmark runner itself: its arithmetic, its gate, its rows, and a short run of each command."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_correctness, kernels, memory
from benchmarks.__main__ import main
from benchmarks.cases import KERNEL_CASES, LINEAR_CASES, OVERHEAD_CASES, KernelCase, LayerCase, select
from benchmarks.contenders import Eager, NeuroSurgeon, Ours, OursOp, Plain, Skipped
from benchmarks.rows import FIELDS
from benchmarks.runner import gate_layers
from benchmarks.timing import Timing, TimingConfig, percentile, time_interleaved
from subnet_kernels import testing

SMALL = LayerCase((24, 16), (8, 16), "fp32")


def test_percentiles_interpolate_between_ordered_values() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 20) == 2.0
    assert percentile([7.0], 80) == 7.0


def test_ratio_is_the_median_of_the_rounds_ratios_and_not_the_ratio_of_medians() -> None:
    ours, eager = Timing((1.0, 10.0, 2.0)), Timing((3.0, 20.0, 2.0))
    assert ours.ratio(eager) == 2.0
    assert ours.over_us(eager) == pytest.approx(-2e6)


def test_every_round_times_every_contender_once_in_turning_order() -> None:
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    config = TimingConfig(num_rounds=3, min_rounds=3, sample_s=0.0)
    timings = time_interleaved(functions, "cpu", config)
    assert calls[-9:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert {len(t.samples) for t in timings.values()} == {3}


def test_flops_and_bytes_of_a_case_are_counted_from_its_sizes() -> None:
    conv = LayerCase((6, 4, 3, 3), (2, 4, 9, 9), "bf16", {"padding": 1, "stride": 2})
    assert SMALL.product_flops() == 2 * 8 * 24 * 16
    assert conv.num_outputs() == 2 * 6 * 5 * 5 == math.prod(testing.plain(conv.build())[0].shape)
    assert conv.product_flops() == 2 * 300 * 36
    assert SMALL.fewest_bytes("forward") == 4 * (8 * 16 + 8 * 24) + 384 * 8


@pytest.mark.parametrize("case", [SMALL, LayerCase((6, 4, 3, 3), (2, 4, 9, 9), "bf16", {"padding": 1})], ids=str)
def test_all_masked_contenders_compute_the_same_layer(case: LayerCase) -> None:
    inputs = case.build()
    contenders = [Eager(inputs), Ours(inputs), OursOp(inputs)]
    try:
        contenders.append(NeuroSurgeon(inputs))
    except Skipped as reason:
        pytest.skip(str(reason))
    worst = gate_layers(inputs, contenders)
    assert set(worst) == {"eager", "ours", "ours_op", "neurosurgeon"}
    assert max(worst.values()) <= 1


def test_the_gate_sees_a_missing_penalty_gradient() -> None:
    class Forgetful(Ours):
        def forward(self):  # type: ignore[no-untyped-def]
            out, penalty = super().forward()
            return out, penalty.detach()

        def forward_backward(self) -> None:
            self.x.grad = self.trained.grad = None
            self.forward()[0].backward(self.grad_out)

    inputs = SMALL.build()
    assert gate_layers(inputs, [Forgetful(inputs)])["ours"] > 10
    assert gate_layers(inputs, [Ours(inputs)])["ours"] <= 1


def test_ours_keeps_one_effective_weight_and_eager_two_or_more() -> None:
    inputs = SMALL.build()
    weight_bytes = SMALL.num_weights * 4
    assert memory.kept_bytes(Ours(inputs)) == weight_bytes
    assert memory.kept_bytes(Eager(inputs)) == 2 * weight_bytes
    assert memory.kept_bytes(Plain(inputs)) == 0


def test_peak_is_the_largest_sum_of_living_allocations() -> None:
    def two_at_a_time() -> None:
        for _ in range(3):
            first = torch.empty(1 << 20, dtype=torch.uint8)
            second = torch.empty(1 << 18, dtype=torch.uint8)
            del first, second

    assert memory.peak_of(two_at_a_time, "cpu") == (1 << 20) + (1 << 18)


def test_a_step_of_ours_is_eagers_step_with_the_penalty_in_its_loss() -> None:
    inputs = SMALL.build()
    ours, eager = Ours(inputs), Eager(inputs)
    for _ in range(3):
        ours.step()
        eager.step()
    assert not torch.equal(eager.trained, inputs.scores)
    torch.testing.assert_close(ours.trained, eager.trained)


@pytest.mark.parametrize("op", sorted({case.op for case in KERNEL_CASES}))
def test_every_kernel_case_passes_its_gate_and_a_wrong_result_does_not(op: str) -> None:
    with torch.no_grad():
        problem = kernels.make_problem(KernelCase(op, ((24, 16),), "fp32"), "cpu")
        problem.functions.pop("compile", None)
        right = problem.functions["eager"]
        problem.functions["wrong"] = lambda: [value.double() + 0.01 for value in right()]
        worst = kernels.gate(problem)
    assert worst.pop("wrong") > 1
    assert max(worst.values()) <= 1


def test_shapes_and_quick_select_cases_by_name() -> None:
    assert [c.name for c in select(LINEAR_CASES, ["m64_fp32"], False)] == ["linear_3072x768_m64_fp32"]
    assert all("512x128_m256" in c.name for c in select(LINEAR_CASES, None, True))
    assert select(OVERHEAD_CASES, None, True) == OVERHEAD_CASES


def test_a_quick_run_writes_rows_that_name_device_versions_commit_and_threads(tmp_path: Path) -> None:
    files = [tmp_path / "rows.csv", tmp_path / "rows.json"]
    words = ["--suite", "layers", "--shapes", "linear_512x128_m256_fp32", "--threads", "1", "--quick", "--rounds", "3"]
    assert main([*words, "--out", *map(str, files)]) == 0
    with files[0].open() as file:
        records = list(csv.DictReader(file))
    assert {r["phase"] for r in records} == {"forward", "forward_backward", "step"}
    assert {"eager", "linear", "ours"} <= {r["contender"] for r in records}
    for record in records:
        assert all(record[name] for name in ("device", "torch", "commit", "num_threads", "subnet_kernels"))
        assert 0 < float(record["p20_us"]) <= float(record["median_us"]) <= float(record["p80_us"])
    ours = next(r for r in records if r["contender"] == "ours" and r["phase"] == "forward_backward")
    assert float(ours["x_eager"]) > 0 and float(ours["kept_weights"]) == 1 and float(ours["gate"]) <= 1
    content = json.loads(files[1].read_text())
    assert set(content["rows"][0]) == set(FIELDS) and content["ceilings"]["matmul_float32_tflop_s"] > 0


def test_a_selection_that_matches_nothing_is_said_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--suite", "layers", "--shapes", "7x8191", "--threads", "1"]) == 1
    assert "no case of suite layers" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--out rows.txt", "--threads 0", "--mode graph", "--suite everything"])
def test_bad_arguments_are_refused(words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_check_without_a_gpu_says_so_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 2
    assert "no GPU" in capsys.readouterr().out


def test_gpu_check_goes_on_after_a_failure_writes_six_files_and_exits_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(check: gpu_check.Check) -> None:
        check.take(iter([("fine", 0.5), ("off by a little", 1.5), ("not a number", float("nan"))]))
        raise RuntimeError("launch failed")

    sections = (("broken", broken, 0), ("late", broken, 1e9), ("ceilings", gpu_check.measure_ceilings, 0))
    monkeypatch.setattr(gpu_check, "SECTIONS", sections)
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path)]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "build.log", "environment.json", "report.txt", "results.csv", "results.json", "tests.log",
    ]  # fmt: skip
    found = json.loads((tmp_path / "environment.json").read_text())
    assert [what.split(":")[0] for what in found["failed"]] == ["off by a little", "not a number", "broken"]
    assert found["skipped"][0].startswith("late")


def test_the_kernel_checks_pass_on_the_reference_and_see_an_unwritten_element() -> None:
    assert max(ratio for _, ratio in gpu_correctness.effective_weights_checks("reference", "cpu", 1)) <= 1
    weights, scores = gpu_correctness._inputs("cpu", 0, torch.float32, ((5, 7),))
    kind = gpu_correctness.as_kind("sigmoid")
    w_effs, penalties = gpu_correctness._run("reference", weights, scores, 3.0, kind, torch.float32)
    w_effs[0][4, 6] = float("nan")
    assert gpu_correctness._worst(weights, scores, 3.0, kind, w_effs, penalties) == float("inf")
