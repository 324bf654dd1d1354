"""The whole experiment in miniature: its files, resuming after a kill at any moment, and refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import pytest
import subnets
import torch
from subnets.cli import main
from subnets.experiments.arithmetic.config import CONDITIONS, ArithmeticConfig, make_config
from subnets.experiments.arithmetic.run import report, run
from subnets.subnet import Subnet
from subnets.training import files
from subnets.training.files import load_tensors, read_csv
from subnets.training.member_training import StackTrainer

TINY = {
    "layers": "1", "width": "16", "heads": "2", "base_pairs": "300", "base_epochs": "3", "discovery_pairs": "300",
    "discovery_epochs": "4", "discovery_batch": "50", "transfer_epochs": "3", "sizes": "10,20", "transfer_seeds": "2",
    "num_ambiguous": "60", "num_held_out": "50", "discovery_lr": "0.2", "beta_end": "5", "stack": "9",
    "base_seeds": "1", "conditions": ",".join(CONDITIONS),
}  # fmt: skip
NUMBERS = ("results.csv", "metrics.csv")


def tiny(**changes: str) -> ArithmeticConfig:
    return make_config("paper", {**TINY, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "finished"
    run(tiny(), folder)
    return folder


def test_a_run_folder_holds_one_row_per_condition_n_and_seed_and_every_promised_file(finished: Path) -> None:
    rows = read_csv(finished / "results.csv")
    skipped = {row["condition"] for row in rows} ^ set(CONDITIONS)
    assert skipped <= {"sampled_complement", "sampled_complement_as_published"}
    keys = {(row["condition"], row["layers"], row["n_disambiguation"], row["seed"]) for row in rows}
    assert len(keys) == len(rows) == (8 - len(skipped)) * 2 * 2
    assert all(0.0 <= float(row["test_accuracy"]) <= 1.0 and row["inherit"] == "unmasked" for row in rows)
    assert all(1 <= int(row["best_epoch"]) <= 3 for row in rows)
    for name in ("config.json", "environment.json", "metrics.csv", "report.html", "figures/layers1_accuracy.svg"):
        assert (finished / name).stat().st_size > 100, name
    assert json.loads((finished / "environment.json").read_text()).keys() >= {"torch", "threads", "cpu"}
    stages = [row["stage"] for row in read_csv(finished / "metrics.csv")]
    assert (stages.count("base"), stages.count("discovery"), stages.count("transfer")) == (3, 4, 3 * len(rows))
    assert not list(finished.rglob("*checkpoint*")) and not list(finished.rglob("*.tmp"))


def test_inherit_none_runs_to_the_report_and_trains_other_networks_from_the_same_subnet(
    finished: Path, tmp_path: Path
) -> None:
    text = run(tiny(inherit="none"), tmp_path / "none")
    rows, inherited = read_csv(tmp_path / "none" / "results.csv"), read_csv(finished / "results.csv")
    assert len(rows) == len(inherited) and {row["inherit"] for row in rows} == {"none"}
    assert "inherit='none'" in text and "inherit='unmasked'" not in text
    for name in ("base", "subnet"):  # what comes before the transfer does not know of `inherit`
        ours, theirs = (load_tensors(f / "layers1" / f"{name}.safetensors")[0] for f in (tmp_path / "none", finished))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    curves = {
        folder: {
            (row["condition"], row["n_disambiguation"], row["seed"], row["epoch"]): float(row["loss"])
            for row in read_csv(folder / "metrics.csv")
            if row["stage"] == "transfer"
        }
        for folder in (tmp_path / "none", finished)
    }
    for key, loss in curves[tmp_path / "none"].items():  # only full_model takes all of T1 in either case
        assert (loss == curves[finished][key]) == (key[0] == "full_model"), key


def test_the_saved_subnet_carries_the_weights_of_the_base(finished: Path) -> None:
    subnet = Subnet.load(finished / "layers1" / "subnet.safetensors")
    base = load_tensors(finished / "layers1" / "base.safetensors")[0]
    assert subnet.provenance["task"] == "ab mod 7" and subnet.weights is not None
    assert 0.0 < subnet.density() < 1.0
    for name, mask in subnet.masks.items():
        assert (subnet.weights[name] == base[name][mask]).all()


def test_a_second_call_trains_nothing_and_writes_the_same_numbers(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "layers1").iterdir()}
    numbers = [(finished / name).read_bytes() for name in NUMBERS]
    run(tiny(), finished)
    assert {path: path.stat().st_mtime_ns for path in (finished / "layers1").iterdir()} == before
    assert [(finished / name).read_bytes() for name in NUMBERS] == numbers


def die_after(count: int, rename: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets so many files be written, and kills before the next rename."""
    left = [count]

    def dying(source: str, target: str) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        rename(source, target)

    monkeypatch.setattr(files.os, "replace", dying)


def test_a_run_broken_off_before_any_write_goes_on_to_the_same_numbers(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every start gets one file further than the one before, then dies before the next rename."""
    rename, folder = os.replace, tmp_path / "broken"
    broken = 0
    while True:
        die_after(2, rename, monkeypatch)
        try:
            run(tiny(), folder)
        except KeyboardInterrupt:
            broken += 1
            if all((folder / "layers1" / path.name).exists() for path in (finished / "layers1").iterdir()):
                break
    monkeypatch.setattr(files.os, "replace", rename)
    run(tiny(), folder)
    assert broken >= 4
    for name in NUMBERS:
        assert (folder / name).read_bytes() == (finished / name).read_bytes()


REPLICATES = {
    "layers": "2,4", "base_seeds": "2", "transfer_seeds_at": "2", "sizes": "10,16",
    "conditions": "subnet,random_init,sampled",
}  # fmt: skip


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "replicated"
    run(tiny(**REPLICATES), folder)
    return folder


def test_replicates_have_a_base_network_a_mask_and_a_transfer_seed_each_and_the_report_shows_both_kinds_of_bars(
    replicated: Path,
) -> None:
    rows = read_csv(replicated / "results.csv")
    pairs = {(row["layers"], row["base_seed"], row["seed"]) for row in rows}
    assert pairs == {("2", "0", "0"), ("2", "0", "1"), ("2", "1", "1"), ("4", "0", "0"), ("4", "1", "1")}
    assert len(rows) == 5 * 2 * 3
    facts = {(row["base_seed"], row["subnet_density"]) for row in rows if row["layers"] == "2"}
    assert len(facts) == 2 and len({density for _, density in facts}) == 2
    weights = [load_tensors(replicated / "layers2" / f"base{r}" / "base.safetensors")[0]["wte.weight"] for r in (0, 1)]
    assert (weights[0] == weights[1]).double().mean() < 0.01
    page = (replicated / "report.html").read_text(encoding="utf-8")
    assert "mean ± population std over base networks, masks and transfer seeds" in page
    assert "Hollow squares, a little to the right: the same over transfer seeds, one base network and mask" in page
    assert (replicated / "figures" / "published.png").stat().st_size > 10_000
    batches = read_csv(replicated / "batches.csv")
    assert sum(int(row["runs"]) for row in batches) == len(rows) and all(float(row["seconds"]) > 0 for row in batches)
    assert int(batches[0]["member_steps"]) == 3 * 2 * 9  # 3 epochs, 60 + 10 pairs in batches of 50, 9 runs


def test_runs_of_several_sizes_train_in_one_stack_as_they_do_in_stacks_of_their_own(tmp_path: Path, capsys) -> None:
    curves = {}
    for stack in ("9", "3"):
        config = tiny(conditions="subnet,random_init,sampled", transfer_seeds="1", sizes="10,16,120", stack=stack)
        folder = tmp_path / stack
        run(config, folder, show=True)
        curves[stack] = {
            (row["condition"], row["n_disambiguation"], row["epoch"]): float(row["loss"])
            for row in read_csv(folder / "metrics.csv") if row["stage"] == "transfer"
        }  # fmt: skip
    shown = capsys.readouterr().err
    assert "T2, 1 layers, batch 1 of 1: n=10-120, 9 runs; no batch timed yet" in shown
    assert re.search(r"T2, 1 layers, batch 2 of 3: n=16, 3 runs; \d+ s left for the whole run", shown)
    names = [sorted(path.name for path in (tmp_path / stack / "layers1").glob("transfer*")) for stack in ("9", "3")]
    assert names[0] == ["transfer_000_n10-120.json"]
    assert names[1] == [f"transfer_00{i}_n{n}.json" for i, n in enumerate((10, 16, 120))]
    assert curves["9"].keys() == curves["3"].keys() and len(curves["3"]) == 3 * 3 * 3
    for key, loss in curves["3"].items():  # 6 to 12 steps on numbers near 7, apart by the rounding of the products
        assert loss == pytest.approx(curves["9"][key], rel=1e-6), key


def test_a_run_killed_in_the_middle_of_a_batch_goes_on_to_the_same_numbers(
    replicated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every start gets three files further, and a checkpoint is written after each epoch."""
    rename, folder = os.replace, tmp_path / "broken"
    init = StackTrainer.__init__
    monkeypatch.setattr(StackTrainer, "__init__", partialmethod(init, checkpoint_seconds=0.0))
    died_within_a_batch = 0
    for _ in range(100):
        die_after(3, rename, monkeypatch)
        try:
            run(tiny(**REPLICATES), folder)
        except KeyboardInterrupt:
            died_within_a_batch += any(folder.rglob("transfer*.checkpoint.safetensors"))
        monkeypatch.setattr(files.os, "replace", rename)
        if len(list(folder.rglob("transfer*.json"))) == 4:
            break
    run(tiny(**REPLICATES), folder)
    assert died_within_a_batch >= 2
    for name in NUMBERS:
        assert (folder / name).read_bytes() == (replicated / name).read_bytes()


def test_a_run_that_is_not_finished_is_reported_as_far_as_it_came(replicated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "partial"
    shutil.copytree(replicated, folder)
    for name in ("layers4/base1/discovery.json", "layers4/transfer_000_n10.json", "layers4/transfer_001_n16.json"):
        (folder / name).unlink()
    (folder / "layers2" / "transfer_001_n16.json").unlink()
    text = report(folder)
    assert (
        "NOT FINISHED, 2 layers: 2 of 2 base networks there; 2 of 2 subnets there; 9 of 18 transfer runs there; "
        "missing: all at n = 16." in text
    )
    assert (
        "NOT FINISHED, 4 layers: 2 of 2 base networks there; 1 of 2 subnets there; 0 of 12 transfer runs there; "
        "missing: all at n = 10, 16." in text
    )
    rows = read_csv(folder / "results.csv")
    assert len(rows) == 9 and {(row["layers"], row["n_disambiguation"]) for row in rows} == {("2", "10")}
    assert "extrapolated" in text and "NOT FINISHED" in (folder / "report.html").read_text(encoding="utf-8")
    shutil.rmtree(folder / "layers2")
    shutil.rmtree(folder / "layers4")
    nothing = report(folder)
    assert nothing.count("0 of 2 base networks there") == 2 and nothing.startswith("2 layers: nothing to judge yet.")
    assert "NOT FINISHED" not in (replicated / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_killed_process_started_again_ends_in_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    sets = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "subnets.cli", "run", "arithmetic", "--preset", "paper", "--out", str(folder)]
    roots = Path(subnets.__path__[0]).parent
    threads = str(torch.get_num_threads())  # the same numbers need the same number of threads
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(roots), str(roots.parent)]), "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
    }  # fmt: skip
    for awaited in ("layers1/base.safetensors", "layers1/transfer_000_n10.json"):
        process = subprocess.Popen([*command, *sets, "--quiet"], env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (folder / awaited).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (folder / awaited).exists()
    run(tiny(), folder)
    for name in NUMBERS:
        ours = {tuple(row.items()) for row in read_csv(folder / name)}
        assert ours == {tuple(row.items()) for row in read_csv(finished / name)}


def test_a_folder_of_another_config_is_refused_with_the_keys_that_differ(finished: Path) -> None:
    with pytest.raises(ValueError, match=r"transfer_seeds: 2 there, 3 now; lam: 1e-07 there, 1e-05 now"):
        run(tiny(transfer_seeds="3", lam="1e-5"), finished)


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"must be empty or a run folder, got files but no config\.json"):
        run(tiny(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_damaged_stage_file_is_named(tmp_path: Path, finished: Path) -> None:
    folder = tmp_path / "damaged"
    (folder / "layers1").mkdir(parents=True)
    for name in ("config.json", "layers1/base.json"):
        (folder / name).write_bytes((finished / name).read_bytes())
    (folder / "layers1" / "base.safetensors").write_bytes(
        (finished / "layers1" / "base.safetensors").read_bytes()[:-50]
    )
    with pytest.raises(ValueError, match=r"base.safetensors must be a readable safetensors file, .* delete it to redo"):
        run(tiny(), folder)


def test_the_command_reports_a_finished_run_and_refuses_mistakes_in_one_line(finished: Path, capsys) -> None:
    assert main(["report", str(finished)]) == 0
    assert "Test accuracy on T2, 1 layers, inherit='unmasked'" in capsys.readouterr().out
    for words, message in [
        (["run", "arithmetic", "--preset", "fast"], "preset must be one of quick, standard, paper, got 'fast'"),
        (["run", "arithmetic", "--set", "layers"], "--set must be KEY=VALUE, got 'layers'"),
        (
            ["run", "arithmetic", "--set", "seed=1", "--set", "seed=2"],
            "--set must name each key once, got 'seed' twice",
        ),
        (["report", str(finished / "figures")], "must be a run folder with a config.json, got none"),
    ]:
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(["run", "arithmetic", "--set", "help"]) == 0
    assert "transfer_lr = 0.0002" in capsys.readouterr().out
