"""The benchmark runner itself: its arithmetic, its gate, its rows, and a short run of each command."""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import aims, gpu_check, gpu_correctness, gpu_parts, kernels, memory, models, plot, rows, runner
from benchmarks.__main__ import main
from benchmarks.cases import (
    GPU_CONV_CASES,
    KERNEL_CASES,
    LINEAR_CASES,
    OVERHEAD_CASES,
    KernelCase,
    LayerCase,
    select,
)
from benchmarks.ceilings import Ceilings
from benchmarks.contenders import (
    Eager,
    NeuroSurgeon,
    Ours,
    OursOp,
    Plain,
    Skipped,
    check_capturable,
    make_contenders,
    masks_adamw,
)
from benchmarks.rows import FIELDS, Row
from benchmarks.runner import Settings, gate_layers
from benchmarks.timing import Timing, TimingConfig, percentile, time_interleaved
from subnet_kernels import testing

SMALL = LayerCase((24, 16), (8, 16), "fp32")
TINY_GPT2 = next(case for case in models.MODEL_CASES if case.name == "gpt2_tiny_2x16")
SHORT = TimingConfig(num_rounds=3, min_rounds=3, sample_s=0.0)


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


def test_gpu_check_goes_on_after_a_failure_writes_its_files_and_exits_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(check: gpu_check.Check) -> None:
        check.take(iter([("fine", 0.5), ("off by a little", 1.5), ("not a number", float("nan"))]))
        raise RuntimeError("launch failed")

    parts = (
        gpu_parts.Part("broken", broken, 0, 99), gpu_parts.Part("late", broken, 1e9, 99),
        gpu_parts.Part("ceilings", gpu_parts.ceilings, 0, 99),
    )  # fmt: skip
    monkeypatch.setattr(gpu_parts, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "supervise", lambda check, names, command: gpu_check.run_parts(check, names))
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path)]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "build.log", "environment.json", "report.txt", "results.csv", "results.json", "sanitizer.log",
        "tests.log",
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
    assert gpu_correctness.effective_weights_error(weights, scores, 3.0, kind, w_effs, penalties) == float("inf")


# --- GPU suite: everything that can be checked without a GPU ---------------------------------------------------------


def static_graph(function, leaves=(), num_warmups=3):  # type: ignore[no-untyped-def]
    """Stands in for as_cuda_graph: as there, replays write where the captured call wrote."""
    leaves = list(leaves)
    for leaf in leaves:
        leaf.grad = None
    function()
    owner = function.__self__
    gradients, loss = [leaf.grad for leaf in leaves], getattr(owner, "last_loss", None)

    def replay() -> None:
        function()
        for leaf, static in zip(leaves, gradients, strict=True):
            if static is not None and leaf.grad is not static:
                leaf.grad = static.copy_(leaf.grad)
        if loss is not None:
            owner.last_loss = loss.copy_(owner.last_loss)

    return replay


@pytest.fixture
def graphs_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "as_cuda_graph", static_graph)
    for module in (runner, models):
        monkeypatch.setattr(module, "check_capturable", lambda optimizer: None)


def test_a_plan_that_no_gpu_backend_serves_here_is_left_out_with_the_backends_reason() -> None:
    said: list[str] = []
    assert make_contenders(SMALL.build(), ["ours_fused", "ours_cached"], said.append) == []
    assert len(said) == 2 and all("backend 'triton' refused masked_linear: weight is on cpu" in text for text in said)


def test_channels_last_cases_are_so_in_all_their_images() -> None:
    case = LayerCase((6, 4, 3, 3), (2, 4, 9, 9), "bf16", {"padding": 1}, True)
    inputs = case.build()
    for tensor in (inputs.x, inputs.weight, inputs.scores, inputs.grad_out):
        assert tensor is not None and tensor.is_contiguous(memory_format=torch.channels_last)
    assert case.name == "conv_6x4x3x3_b2_9x9_nhwc_bf16"


def test_the_convolution_cases_are_those_of_resnet18_and_it_has_its_published_size() -> None:
    net = models.ResNet18()
    sizes: dict[torch.nn.Module, int] = {}
    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    for conv in convs:
        conv.register_forward_hook(lambda m, x, out: sizes.__setitem__(m, x[0].shape[-1]))
    with torch.no_grad():
        net(torch.zeros(1, 3, 224, 224))
    found = {(tuple(c.weight.shape), sizes[c], c.stride[0], c.padding[0]) for c in convs}
    cases = [c for c in GPU_CONV_CASES if c.is_channels_last]
    assert found == {
        (c.weight_shape, c.x_shape[-1], c.conv.get("stride", 1), c.conv.get("padding", 0)) for c in cases
    }
    assert len(cases) == 11 and len(GPU_CONV_CASES) == 22
    assert sum(p.numel() for p in net.parameters()) == 11_689_512


def test_an_optimizer_that_no_graph_can_hold_is_refused_and_ours_asks_for_one_that_can() -> None:
    scores = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(Skipped, match="AdamW is not capturable"):
        check_capturable(torch.optim.AdamW([scores]))
    check_capturable(torch.optim.AdamW([scores], capturable=True))
    asked = []

    class Masks:
        is_on_gpu = True

        def adamw(self, lr, lam, capturable):  # type: ignore[no-untyped-def]
            asked.append(capturable)

    masks_adamw(Masks(), 0.1)
    assert asked == [True]


def test_a_baselines_optimizer_leaves_our_effective_weights_fresh() -> None:
    inputs = SMALL.build()
    contender = Ours(inputs)
    contender.step()
    layer = contender.layer
    state = (layer.weight, layer.scores, layer.beta, layer.kind, torch.float32)
    assert layer._slot.is_fresh(*state)
    Eager(inputs).step()
    assert layer._slot.is_fresh(*state)
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).step()  # as any other does
    assert not layer._slot.is_fresh(*state)


def test_rows_of_replayed_graphs_pass_their_check_and_a_stale_effective_weight_does_not(graphs_without_gpu) -> None:
    settings = Settings(
        timing=SHORT, baselines=("eager", "linear"), modes=("eager", "graph"), phases=("forward_backward", "step"),
        say=pytest.fail, fail=pytest.fail,
    )  # fmt: skip
    made = runner.run_layer(SMALL, settings, Ceilings("cpu", SHORT))
    assert {(r.phase, r.mode) for r in made} == {
        (p, m) for p in ("forward_backward", "step") for m in ("eager", "graph")
    }
    assert all(r.gate <= 1 for r in made if r.contender != "linear")
    assert all(r.peak_mb and r.ceiling_fraction and r.gflop and r.least_mb for r in made)

    class Stale(Eager):
        def forward(self):  # type: ignore[no-untyped-def]
            m = torch.sigmoid(self.beta * self.case.scores) + 0 * self.trained
            return self.product(self.x, self.weight * m), m.sum()

    inputs = SMALL.build()
    for contender, is_right in ((Ours(inputs), True), (Stale(inputs), False)):
        replay = static_graph(contender.forward_backward, contender.leaves())
        assert (runner.gate_replay(contender, replay, contender.x.grad, Eager(inputs)) <= 1) == is_right


def test_a_models_step_passes_its_checks_and_wrong_ones_do_not(graphs_without_gpu) -> None:
    settings = Settings(
        timing=SHORT, models=("eager", "finetune", "finetune_amp", "ours"), modes=("graph",), say=pytest.fail,
        fail=pytest.fail,
    )  # fmt: skip
    made = models.run_model(TINY_GPT2, settings, Ceilings("cpu", SHORT))
    assert [r.contender for r in made] == ["eager", "finetune", "finetune_amp", "ours"]
    assert all(r.gate is None or r.gate <= 1 for r in made)
    ours = made[-1]
    assert ours.x_finetune and ours.x_finetune_amp and ours.x_eager and ours.peak_mb and "tokens/s" in ours.note
    assert f"{12 * 32 * 32 * 2} weights masked" in ours.note

    class NoPenalty(models.Ours):
        def make_optimizer(self):  # type: ignore[no-untyped-def]
            return masks_adamw(self.masks, 0.0)

    class HalfTheLayers(models.Ours):
        def losses(self):  # type: ignore[no-untyped-def]
            for scores in list(self.trained.values())[::2]:
                scores.register_hook(lambda grad: grad * 0.5)
            return super().losses()

    base, x = TINY_GPT2.build("cpu")
    trainers, eager, scores, gates = models.make_trainers(TINY_GPT2, Settings(models=("ours",)))
    assert gates["ours"] <= 1
    for wrong in (NoPenalty, HalfTheLayers):
        trainer = wrong(TINY_GPT2, base, x, scores)
        trainer.labels = eager.labels
        assert models.gate_step(trainer, eager, scores) > 1, wrong
    assert models.gate_replay(trainers[0], lambda: None, eager, scores) > 1  # a graph that does nothing


@pytest.mark.parametrize("precision", ["fp32", "amp"])
def test_the_vision_networks_step_passes_its_checks_beside_neurosurgeon_and_unmasked_training(precision: str) -> None:
    pytest.importorskip("transformers")
    case = models.ModelCase("tiny", "vision", 4, 32, {"width": 8}, precision)
    names = ("eager", "unmasked", "neurosurgeon", "ours", "ours_in_backward")
    said: list[str] = []
    settings = Settings(timing=SHORT, models=names, say=said.append, fail=pytest.fail)
    made = {row.contender: row for row in models.run_model(case, settings, Ceilings("cpu", SHORT))}
    assert set(made) == set(names) - ({"neurosurgeon"} if said else set())
    assert made["unmasked"].gate is None
    assert all(row.gate is not None and row.gate <= 1 for name, row in made.items() if name != "unmasked")
    assert made["ours"].x_unmasked and "images/s, 175512 weights masked" in made["ours"].note
    stem = {"network.resnet.embedder.embedder.convolution": torch.zeros(0)}
    trained = models.Unmasked(case, *case.build("cpu"), stem).model.parameters()
    assert [(p.dtype, p.shape) for p in trained if p.requires_grad] == [(torch.float32, (8, 3, 7, 7))]

    class WrongLayer(models.OursInBackward):
        def backward(self) -> None:
            super().backward()
            with torch.no_grad():
                next(iter(self.trained.values())).mul_(1.01)

    base, x = case.build("cpu")
    _, eager, scores, _ = models.make_trainers(case, Settings(models=("eager",)))
    trainer = WrongLayer(case, base, x, scores)
    trainer.labels = eager.labels
    assert models.gate_step(trainer, eager, scores) > 1


def test_the_state_says_whether_a_case_fits_in_the_l2_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(Ceilings):
        def floor_s(self, flops, num_bytes, dtype):  # type: ignore[no-untyped-def]
            return 1e-6

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: type("P", (), {"L2_cache_size": 1000}))
    for working_set, state in ((1000, "l2-hot"), (1001, "beyond-l2")):
        row = Row("layers", "a", "step", "ours", "graph", 1, 2.0, 1.0, 3.0)
        runner.set_floor(row, Fixed("cuda", SHORT), 1e9, 2**20, torch.bfloat16, working_set)
        assert (row.state, row.ceiling_fraction, row.gflop, row.least_mb) == (state, 0.5, 1.0, 1.0)
    assert SMALL.working_set("step") - SMALL.working_set("forward_backward") == 8 * SMALL.num_weights


def test_aims_are_met_missed_or_not_measured_and_the_table_stays_short() -> None:
    wanted = [aims.Aim("a", "step", "x_eager", 1.5), aims.Aim("a", "step", "x_compile", 1.0)]
    made = [
        Row("layers", "a", "step", "ours", "eager", 1, 2.0, 1.0, 3.0, x_eager=9.0),
        Row("layers", "a", "step", "ours", "graph", 1, 2.0, 1.0, 3.0, x_eager=1.4),
        Row("layers", "a", "step", "ours", "graph", 1, 2.0, 1.0, 3.0, x_eager=1.6, x_compile=1.1),
    ]
    words = [line.split("  ")[0] for line in aims.verdicts(made, (*wanted, aims.Aim("b", "step", "x_mm", 0.8)))]
    assert words == ["aim", "MISSED", "met", "not measured"]
    launched = aims.Aim("a", "step", "x_compile", 1.0, rival_mode="eager")
    assert launched.value(made) is None
    assert launched.value([*made, Row("layers", "a", "step", "compile", "eager", 1, 7.0, 1.0, 9.0)]) == 3.5
    many = aims.short_table(made * 40, tuple(wanted))
    assert len(many) + len(aims.verdicts(made)) + 5 + gpu_check.NUM_FAILURES_SHOWN <= 60
    assert all(len(line) <= 150 for line in many)


def test_plots_are_made_from_files_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = [
        Row("layers", f"linear_8x8_m{m}_bf16", "step", name, "graph", 3, 10.0 * m, 9.0, 11.0, x_eager=ratio,
            gflop=0.1 * m, least_mb=1.0)
        for m in (64, 256) for name, ratio in (("eager", None), ("ours", 1.5))
    ]  # fmt: skip
    env = rows.environment("cpu", 1, "wall", "abc")
    rows.write_csv(tmp_path / "r.csv", made, env)
    rows.write_json(tmp_path / "r.json", made, env, {"copy_4096mb_gb_s": 4000.0, "matmul_bfloat16_tflop_s": 700.0})
    records, ceilings = plot.read(tmp_path / "r.csv")
    assert records[1]["x_eager"] == 1.5 and records[0]["commit"] == "abc" and ceilings["copy_4096mb_gb_s"] == 4000
    assert plot.main([str(tmp_path / "r.csv"), "--out", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["linear_over_m.png", "ratios.png", "roofline.png"]


def test_a_dry_run_goes_through_the_parts_and_says_what_was_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = "conv,score_gradient,linear,resnet,kernels"
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path), "--parts", parts]) == 0
    found = json.loads((tmp_path / "environment.json").read_text())
    assert list(found["seconds"]) == ["score_gradient", "linear", "resnet", "kernels", "conv"]
    with (tmp_path / "results.csv").open() as file:
        records = list(csv.DictReader(file))
    assert {r["suite"] for r in records} == {"kernels", "layers", "models"}
    assert all(r["peak_mb"] and r["ceiling_fraction"] for r in records)
    assert any(r["contender"] == "ours" and r["x_mm"] for r in records)
    assert not (tmp_path / "state.json").exists()
    last = capsys.readouterr().out.split("\n\n")[-1]
    assert last.count("not measured") == len(aims.AIMS) and len(last.splitlines()) <= 60
    with pytest.raises(SystemExit):
        gpu_check.main(["--dry-run", "--parts", "linear,everything"])


def test_a_part_that_crashes_or_hangs_costs_itself_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
import os, sys, time
from pathlib import Path
from benchmarks import gpu_check, gpu_parts
def fine(check): check.take([("fine", 0.5)])
def crash(check): os._exit(7)
def hang(check): time.sleep(99)
gpu_parts.PARTS = tuple(gpu_parts.Part(f.__name__, f, 0, s) for f, s in ((crash, 99), (hang, 0.5), (fine, 99)))
check = gpu_check.Check(Path(sys.argv[1]), "cpu", 0, time.time() + 99)
check.load()
gpu_check.run_parts(check, sys.argv[2].split(","))
"""
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.0)
    check = gpu_check.Check(tmp_path, "cpu", 0, time.time() + 60)
    command = [sys.executable, "-c", script, str(tmp_path)]
    gpu_check.supervise(check, ["crash", "hang", "fine"], lambda names: [*command, ",".join(names)])
    assert check.failed == [
        "crash: its process ended with exit code 7", "hang: took too long and was stopped",
    ]  # fmt: skip
    assert [name for name, _ in check.checks] == ["fine"] and check.done == ["crash", "hang", "fine"]


def test_the_command_hands_its_options_on_and_tuning_without_a_gpu_is_refused_in_words(capsys) -> None:
    from subnets.cli import main as command

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stop:
        command(["bench", "--tune"])
    assert stop.value.code == 2 and "--tune: this torch sees no GPU" in capsys.readouterr().err
