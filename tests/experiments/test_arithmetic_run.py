"""The whole experiment in miniature: its files, resuming after a kill at any moment, and refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import subnets
import torch
from subnets.cli import main
from subnets.experiments.arithmetic.config import CONDITIONS, ArithmeticConfig, make_config
from subnets.experiments.arithmetic.run import run
from subnets.experiments.arithmetic.stages import transfer_stacks
from subnets.subnet import Subnet
from subnets.training import files
from subnets.training.files import load_tensors, read_csv

TINY = {
    "layers": "1", "width": "16", "heads": "2", "base_pairs": "300", "base_epochs": "3", "discovery_pairs": "300",
    "discovery_epochs": "4", "discovery_batch": "50", "transfer_epochs": "3", "sizes": "10,20", "transfer_seeds": "2",
    "num_ambiguous": "60", "num_held_out": "50", "discovery_lr": "0.2", "beta_end": "5", "stack": "9",
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
            for row in read_csv(folder / "metrics.csv") if row["stage"] == "transfer"
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


def test_a_run_broken_off_before_any_write_goes_on_to_the_same_numbers(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every start gets one file further than the one before, then dies before the next rename."""
    rename, folder = os.replace, tmp_path / "broken"
    broken = 0
    while True:
        left = [2]

        def dying(source: str, target: str, left: list[int] = left) -> None:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            rename(source, target)

        monkeypatch.setattr(files.os, "replace", dying)
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


def test_every_run_is_in_exactly_one_stack_and_stacks_have_one_n() -> None:
    config = tiny(sizes="10,20,40", transfer_seeds="5", stack="12")
    stacks = transfer_stacks(config)
    runs = [one for stack in stacks for one in stack]
    assert len(set(runs)) == len(runs) == 8 * 3 * 5
    assert all(len(stack) <= 12 and len({one.num_disambiguation for one in stack}) == 1 for stack in stacks)


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
