"""Trainer trains masks as one's own loop does, comes back from checkpoints, and refuses what would go wrong."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from subnets import MaskSet, Subnet, mask_model
from torch import Tensor, nn

from tests.api.tiny_transformers import MODELS, made, random_scores

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="Trainer needs accelerate, which is not installed")

from subnets.trainer import MaskCallback  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]

def rows(name: str, num: int = 8) -> list[dict[str, Tensor]]:
    """A data set: the batch of ``made``, a row each, over again with other numbers."""
    torch.manual_seed(1)
    if name in ("gpt2", "bert"):
        ids = torch.randint(1, 19, (num, 7))
        first = torch.tensor([-100])  # Trainer counts it among the labels, the model does not
        return [{"input_ids": i, "labels": torch.cat([first, i[1:]]) if name == "gpt2" else i[0] % 3} for i in ids]
    return [{"pixel_values": torch.randn(3, 8, 8), "labels": torch.tensor(i % 3)} for i in range(num)]


def masked(name: str = "gpt2", steps: int = 8) -> MaskSet:
    model, _ = made(name)
    for parameter in model.parameters():
        parameter.data.mul_(1 if name == "resnet" else 8)  # of weights of .02 hardly anything depends on a mask
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    masks = mask_model(model, init=random_scores)
    masks.anneal(to=200, steps=steps)
    return masks


class Batches:
    """A collator that keeps what it made."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.seen.append({key: torch.stack([part[key] for part in parts]) for key in parts[0]})
        return self.seen[-1]


def trainer(masks: MaskSet, folder: Path, callbacks=None, name: str = "gpt2", optimizer=None, **kwargs):
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, lr_scheduler_type="constant", logging_steps=2,
        **{"per_device_train_batch_size": 2, "max_steps": 8, "max_grad_norm": 0.0, "save_strategy": "no", **kwargs},
    )  # fmt: skip
    optimizer = masks.adamw(lr=0.02, lam=1e-5) if optimizer is None else optimizer
    return transformers.Trainer(
        masks.model, arguments, Batches(), rows(name), rows(name)[:4], optimizers=(optimizer, None),
        callbacks=[MaskCallback(masks)] if callbacks is None else callbacks,
    )  # fmt: skip


def run(*args, **kwargs):
    """Train in silence: Trainer prints its logs."""
    resume = kwargs.pop("resume_from_checkpoint", None)
    made_trainer = trainer(*args, **kwargs)
    with contextlib.redirect_stdout(io.StringIO()):
        made_trainer.train(resume_from_checkpoint=resume)
    return made_trainer


def distance(a: MaskSet, b: MaskSet) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(a.scores().values(), b.scores().values()))


SETTINGS = {
    "nothing": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": 0.01},
    "bf16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_trainer_takes_the_steps_of_ones_own_loop_with(setting, tmp_path):
    """Penalty and schedule among them."""
    masks, arguments = masked(), SETTINGS[setting]
    trained = run(masks, tmp_path, **arguments)
    own = masked()
    start = {name: scores.detach().clone() for name, scores in own.scores().items()}
    optimizer = own.adamw(lr=0.02, lam=1e-5)
    accumulation, max_norm = arguments.get("gradient_accumulation_steps", 1), arguments.get("max_grad_norm")
    own.model.train()
    losses = []
    for number, batch in enumerate(trained.data_collator.seen, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "bf16"):
            loss = own.model(**batch).loss / accumulation
        loss.backward()
        losses.append(loss.item())
        if number % accumulation == 0:
            if max_norm:
                assert torch.nn.utils.clip_grad_norm_(own.scores().values(), max_norm) > max_norm
            optimizer.step()
            optimizer.zero_grad()
    assert masks.beta == own.beta == 200.0 and masks.is_hard
    moved = max(float((own.scores()[name].detach() - s).abs().max()) for name, s in start.items())
    assert moved > 0.1 and distance(masks, own) <= 1e-4 * moved
    logged = [row["loss"] for row in trained.state.log_history if "loss" in row]
    expected = torch.tensor(losses).view(4, -1).sum(1) / 2
    assert logged == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_ends_with_the_bits_of_the_uninterrupted_one(name, tmp_path):
    whole, again = masked(name), masked(name)
    run(whole, tmp_path / "a", name=name, save_strategy="steps", save_steps=4)
    elsewhere = tmp_path / "moved"
    shutil.copytree(tmp_path / "a" / "checkpoint-4", elsewhere)
    callback = MaskCallback(again, resume_from=elsewhere)
    run(again, tmp_path / "b", [callback], name, resume_from_checkpoint=str(elsewhere))
    assert distance(whole, again) == 0.0
    assert again.state_dict() == whole.state_dict() and again.beta == 200.0
    logs = [list(csv.DictReader((tmp_path / part / "metrics.csv").open())) for part in "ab"]
    betas = [[row["beta"] for row in log if row["loss"]] for log in logs]
    assert betas[0] == betas[1] and len(betas[0]) == 4  # the rows before the checkpoint are there too


def test_resuming_needs_the_masks_of_the_checkpoint_whole_and_of_the_same_layers(tmp_path):
    run(masked(), tmp_path, save_strategy="steps", save_steps=4)
    checkpoint = tmp_path / "checkpoint-4"
    file = checkpoint / "masks.safetensors"
    whole, again = file.read_bytes(), masked()
    with safe_open(file, "pt") as opened:
        metadata, scores = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    name, values = scores.popitem()
    for others in (scores, {**scores, name: values[:1]}):
        save_file(others, file, metadata)
        with pytest.raises(ValueError, match=f"masks of other layers or shapes than the model: {name}; mask the model"):
            run(again, tmp_path, resume_from_checkpoint=str(checkpoint))
    file.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="masks.safetensors is damaged, nothing was loaded"):
        run(again, tmp_path, resume_from_checkpoint=str(checkpoint))
    assert again.beta == 1.0
    file.unlink()
    with pytest.raises(ValueError, match="resume from a checkpoint that was written with this callback"):
        run(masked(), tmp_path, resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_the_best_checkpoints_masks_come_back_at_the_end_and_early_stopping_stops(name, tmp_path):
    """The loss is made to be best at step 4; ViT's files have other names than its modules."""
    masks = masked(name)
    kept = {}

    class Worse(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 4:
                kept.update({n: s.detach().clone() for n, s in masks.scores().items()}, beta=masks.beta)

        def on_evaluate(self, args, state, control, metrics, **_):
            metrics["eval_loss"] = abs(state.global_step - 4)

    callbacks = [Worse(), transformers.EarlyStoppingCallback(1), MaskCallback(masks)]
    done = run(
        masks, tmp_path, callbacks, name, max_steps=20, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    assert done.state.global_step == 6 and done.state.best_model_checkpoint.endswith("checkpoint-4")
    assert masks.beta == kept.pop("beta") > 1 and masks.is_hard
    assert all(torch.equal(scores, kept[n]) for n, scores in masks.scores().items())


def test_masks_are_soft_in_training_steps_and_hard_in_every_evaluation(tmp_path):
    masks = masked()
    seen = []
    masks.model.register_forward_pre_hook(lambda module, _: seen.append((module.training, masks.is_hard)))
    tester = trainer(masks, tmp_path, eval_strategy="steps", eval_steps=4, eval_on_start=True)
    with contextlib.redirect_stdout(io.StringIO()):
        before = tester.evaluate()["eval_loss"]
        tester.train()
        after = tester.evaluate()["eval_loss"]
        tester.predict(rows("gpt2")[:2])
    assert set(seen) == {(True, False), (False, True)} and seen.count((True, False)) == 8
    evaluated = [row["eval_loss"] for row in tester.state.log_history if "eval_loss" in row]
    fresh, batch = masked(), Batches()(rows("gpt2")[:4])
    with torch.no_grad(), fresh.hard():
        expected = float(fresh.model(**batch).loss)
    assert before == pytest.approx(expected, rel=1e-5) and before == evaluated[0]
    with torch.no_grad(), masks.hard():
        assert after == pytest.approx(float(masks.model(**batch).loss), rel=1e-5)
    assert after == evaluated[-1] != before


def test_an_evaluation_that_a_later_callback_asks_for_does_not_run_soft(tmp_path):
    class Asks(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_evaluate = True

    masks = masked()
    with pytest.raises(RuntimeError, match="make MaskCallback the last"):
        run(masks, tmp_path, [MaskCallback(masks), Asks()])
    masks = masked()
    assert run(masks, tmp_path, [Asks(), MaskCallback(masks)]).state.global_step == 8


def test_the_csv_holds_what_trainer_logs_and_beta_density_and_undecided_of_that_step(tmp_path):
    masks = masked()
    done = run(masks, tmp_path, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=8)
    with (tmp_path / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [{k: v for k, v in row.items() if v} for row in table] == [
        {key: str(value) for key, value in row.items()} for row in done.state.log_history
    ]
    assert [row["step"] for row in table if row["loss"]] == ["2", "4", "6", "8"]
    assert [row["step"] for row in table if row["eval_loss"]] == ["4", "8"]
    for row in table:
        assert float(row["beta"]) == pytest.approx(200 ** (int(row["step"]) / 8), rel=1e-6)
    assert float(table[-1]["density"]) == masks.density() and float(table[-1]["undecided"]) == masks.undecided() < 0.1
    saved = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    assert saved[0]["density"] == float(table[0]["density"]) != masks.density()
    with contextlib.redirect_stdout(io.StringIO()):
        done.train()  # again: Trainer begins its log anew, and the file with it
    with (tmp_path / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(done.state.log_history) == len(table)


def test_what_would_train_something_else_in_silence_is_refused(tmp_path):
    masks = masked()
    with pytest.raises(ValueError, match=r"must be masks.adamw\(...\).*got AdamW; pass Trainer"):
        run(masks, tmp_path, optimizer=torch.optim.AdamW(masks.scores().values()))
    with pytest.raises(ValueError, match=r"must be masks.adamw\(...\)"):
        run(masks, tmp_path, optimizer=masked().adamw())
    with pytest.raises(ValueError, match="use masks.adamw\\(in_backward=False\\)"):
        run(masks, tmp_path, optimizer=masks.adamw(in_backward=True))
    with pytest.raises(ValueError, match="use activation_checkpointing_kwargs={'use_reentrant': False}"):
        run(masks, tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(TypeError, match="masks must be what mask_model gave, got GPT2LMHeadModel"):
        MaskCallback(masks.model)
    usual = {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": None}
    usual.update(n_gpu=1, fsdp=False, deepspeed=None)
    for change, words in [({"n_gpu": 2}, "torchrun --nproc-per-node"), ({"fsdp": True}, "not built; use DDP")]:
        arguments = SimpleNamespace(**{**usual, **change})
        state = transformers.TrainerState()
        with pytest.raises(ValueError, match=words):
            MaskCallback(masks).on_train_begin(arguments, state, None, optimizer=masks.adamw())


def test_only_the_first_process_writes(tmp_path):
    masks, state = masked(), transformers.TrainerState(global_step=3, is_world_process_zero=False)
    state.log_history.append({"loss": 1.0, "step": 3})
    (tmp_path / "checkpoint-3").mkdir()
    for is_first in (False, True):
        state.is_world_process_zero = is_first
        callback, arguments = MaskCallback(masks), SimpleNamespace(output_dir=tmp_path)
        callback.on_save(arguments, state, None)
        callback.on_log(arguments, state, None, logs={})
        written = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
        assert written == (["masks.safetensors", "metrics.csv"] if is_first else [])


def test_a_schedule_that_does_not_end_with_the_training_is_warned_of(tmp_path):
    for steps, words in ((9, "masks.anneal was given steps=9"), (None, "there is no schedule")):
        masks = masked()
        masks.anneal(steps=9) if steps else masks.load_state_dict({**masks.state_dict(), "schedule": None})
        with pytest.warns(UserWarning, match=f"{words}.*call masks.anneal\\(to=200, steps=8\\)"):
            run(masks, tmp_path)


def test_the_example_runs_as_the_page_has_it_in_two_fresh_processes(tmp_path):
    page = (ROOT / "docs" / "huggingface.md").read_text()
    train, plant = ((ROOT / "examples" / f"gpt2_{part}.py").read_text() for part in ("trainer", "plant"))
    assert f"```python\n{train}```" in page and f"```python\n{plant}```" in page
    assert len((train + plant).splitlines()) <= 25
    look = """
import torch
from subnets import Subnet
subnet = Subnet.load("subnet.safetensors")
torch.save({name: other.get_parameter(name).detach() for name in subnet.masks}, "planted.pt")
"""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python_api"), *sys.path])
    for code in (train, plant + look):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        if code is train:
            loss = float(re.search(r"loss of the hard masks: (\S+)", done.stdout)[1])
            assert loss < 2.2  # a network that knows nothing has log(16) = 2.77
    names: dict[str, Any] = {}
    exec(train.split("masks = ")[0], names)  # the network that the subnet was found in
    subnet, planted = Subnet.load(tmp_path / "subnet.safetensors"), torch.load(tmp_path / "planted.pt")
    assert 0.1 < subnet.density() < 0.9
    for name, kept in subnet.masks.items():
        source = names["model"].get_parameter(name)
        assert torch.equal(planted[name][kept], source[kept]) and not torch.equal(planted[name], source)


def test_statistics_that_would_drift_are_warned_of(tmp_path):
    masks = masked("resnet")
    before = {name: buffer.clone() for name, buffer in masks.model.named_buffers() if "running" in name}
    run(masks, tmp_path, name="resnet")  # momentum 0: no warning, no drift
    assert all(torch.equal(buffer, masks.model.get_buffer(name)) for name, buffer in before.items())
    for module in masks.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    with pytest.warns(UserWarning, match="running statistics of .* and .* other BatchNorm layers"):
        run(masks, tmp_path, name="resnet")
