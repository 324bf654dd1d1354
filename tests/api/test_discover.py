"""discover: what it finds, what it leaves as it was, and that a run killed at any moment ends in the same numbers."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from subnets import Discovery, DiscoveryConfig, MaskSet, Subnet, discover, mask_model, objectives
from subnets.capture import put_back
from torch import Tensor, nn

from subnet_kernels.optim import MaskAdamW

ROOT = Path(__file__).parents[2]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def data(num_batches: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator))
        for _ in range(num_batches)
    ]


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module) -> float:
    x, y = data(1)[0]
    return (model(x).argmax(1) == y).float().mean().item()


def snapshot(model: nn.Module) -> tuple:
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [id(p) for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        [(type(module), module.training, sorted(vars(module))) for module in model.modules()],
    )


def assert_same(before: tuple, after: tuple) -> None:
    assert set(before[0]) == set(after[0])
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert before[1:] == after[1:]


def assert_same_discovery(a: Discovery, b: Discovery) -> None:
    assert a.history == b.history and a.best == b.best
    assert all(torch.equal(mask, b.subnet.masks[name]) for name, mask in a.subnet.masks.items())
    assert a.subnet.provenance == b.subnet.provenance and a.subnet.base_hash == b.subnet.base_hash


FAST = DiscoveryConfig(epochs=4, lr=0.05, lam=1e-3)


# --- it finds what is there ------------------------------------------------------------------------------------------


def test_discover_keeps_the_weights_the_task_needs_and_drops_the_others():
    """out = x0 + x1 of a linear layer that also reads x2 and x3 for a second output: the first needs two weights."""
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1, 0.7, -0.7], [0.5, -0.5, 1, 1]]))
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(32, 4, generator=generator) for _ in range(40)]

    def first_output(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x)[:, 0] - x[:, 0] - x[:, 1]).pow(2).mean()

    config = DiscoveryConfig(epochs=10, lr=0.05, lam=1e-2)
    found = discover(model, batches, first_output, config, evaluate=lambda m: -first_output(m, batches[0]).item())
    assert found.subnet.masks["weight"].tolist() == [[True, True, False, False], [False] * 4]
    assert found.best["score"] == pytest.approx(0, abs=1e-12) and found.best["density"] == 0.25
    assert found.subnet.density() == 0.25


def test_one_epoch_equals_the_loop_written_by_hand():
    model = network().eval()
    found = discover(model, data(), classify, DiscoveryConfig(epochs=3, lr=0.05, lam=1e-3, beta_end=8.0))
    masks = mask_model(model)
    optimizer = MaskAdamW(list(masks.scores().values()), lr=0.05, lam=1e-3)
    for epoch in range(3):
        masks.beta = 8.0 ** (epoch / 3)
        losses = []
        for batch in data():
            loss = classify(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        row = found.history[epoch]
        assert row["loss"] == pytest.approx(sum(losses) / 5, rel=1e-15)
        assert (row["beta"], row["density"], row["undecided"]) == (masks.beta, masks.density(), masks.undecided())
        assert (row["epoch"], row["step"], row["score"]) == (epoch, 5 * (epoch + 1), None)
    assert all(torch.equal(found.subnet.masks[name], kept) for name, kept in masks.kept().items())


def test_mean_is_sum_with_lam_over_the_number_of_masked_weights():
    by_sum = discover(network(), data(), classify, DiscoveryConfig(epochs=2, lr=0.05, lam=1e-3))
    by_mean = discover(network(), data(), classify, DiscoveryConfig(epochs=2, lr=0.05, lam=56e-3, reduction="mean"))
    assert by_sum.history == by_mean.history


@pytest.mark.parametrize("schedule, anneal, betas", [
    ("after_epoch", "epoch", [1, 1, 4, 4]),
    ("reach_end", "epoch", [1, 1, 16, 16]),
    ("after_epoch", "step", [1, 2, 4, 8]),
    ("reach_end", "step", [1, 16 ** (1 / 3), 16 ** (2 / 3), 16]),
])  # fmt: skip
def test_beta_follows_the_schedule_per_epoch_or_per_step(schedule, anneal, betas):
    seen = []

    def objective(model: nn.Module, batch) -> Tensor:
        seen.append(float(model[0].beta))
        return classify(model, batch)

    config = DiscoveryConfig(epochs=2, beta_end=16.0, beta_schedule=schedule, anneal=anneal)
    found = discover(network(), data(2), objective, config)
    assert seen == pytest.approx(betas, rel=2.0**-23)
    assert [row["beta"] for row in found.history] == seen[1::2]
    assert DiscoveryConfig(epochs=1, beta_schedule="reach_end").beta(0, 1) == 100.0


@pytest.mark.parametrize("scores, best", [([1.0, 3.0, 3.0, 2.0], 2), ([5.0, 1.0, 2.0, 3.0], 0), (None, 3)])
def test_the_best_epoch_is_kept_and_the_latest_of_equal_ones(scores, best):
    kept, seen = [], []

    def evaluate(model: nn.Module) -> float:
        assert not torch.is_grad_enabled() and all(layer._state.is_hard for layer in (model[0], model[4]))
        seen.append(model[0].mask())
        return scores[len(seen) - 1]

    found = discover(
        network(), data(), classify, FAST, evaluate=None if scores is None else evaluate,
        callbacks=[lambda row, masks: kept.append({name: k.clone() for name, k in masks.kept().items()})],
    )  # fmt: skip
    assert found.best == found.history[best] and found.best["score"] == (scores and scores[best])
    assert all(torch.equal(mask, kept[best][name]) for name, mask in found.subnet.masks.items())
    assert found.subnet.provenance["best"] == found.best and found.subnet.provenance["config"]["lam"] == 1e-3
    assert not torch.equal(kept[0]["0.weight"], kept[3]["0.weight"])
    if scores:
        assert torch.equal(seen[best].bool(), found.subnet.masks["0.weight"])


def test_the_subnet_belongs_to_the_network_and_can_be_saved_with_its_weights(tmp_path):
    model = network()
    found = discover(model, data(), classify, FAST)
    found.subnet.save(tmp_path / "s.safetensors", weights=model)
    with pytest.raises(ValueError, match="hash"), torch.no_grad():
        model[0].weight.add_(1)
        found.subnet.save(tmp_path / "s.safetensors", weights=model)


# --- what it leaves as it was ----------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def fail(*_) -> None:
    raise Stop


@pytest.mark.parametrize("where", ["nowhere", "objective", "evaluate", "callback", "batches"])
def test_the_model_and_the_random_state_are_what_they_were_whatever_happens(where):
    model = network()
    model[4].bias.requires_grad_(False)
    model[1].eval()
    before = snapshot(model)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def objective(model: nn.Module, batch) -> Tensor:
        assert not any(module.training for module in model.modules())
        random.random(), np.random.rand(), torch.rand(1)
        return fail() if where == "objective" else classify(model, batch)

    def batches(epoch: int):
        return fail() if where == "batches" and epoch == 1 else data()

    def evaluate(model: nn.Module) -> float:
        model.train()  # a user's function may do that; the next epoch runs in eval mode again
        model(data()[0][0])  # batch norm moves its running statistics here
        return fail() if where == "evaluate" else 1.0

    arguments = dict(evaluate=evaluate, callbacks=[fail] if where == "callback" else ())
    if where == "nowhere":
        discover(model, batches, objective, FAST, **arguments)
    else:
        with pytest.raises(Stop):
            discover(model, batches, objective, FAST, **arguments)
    assert_same(before, snapshot(model))
    assert torch.equal(states[0], torch.get_rng_state()) and random.getstate() == states[2]
    assert (np.random.get_state()[1] == states[1]).all()


def test_it_runs_inside_no_grad_and_inference_mode():
    batches, model = data(), network()
    expected, before = discover(network(), batches, classify, FAST), snapshot(model)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert discover(model, batches, classify, FAST).history == expected.history
    assert_same(before, snapshot(model))


# --- the same numbers ------------------------------------------------------------------------------------------------


def noisy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Uses all three random streams."""
    noise = torch.randn(16, 4) * random.random() * np.random.rand()
    return F.cross_entropy(model(batch[0] + noise), batch[1])


def test_the_seed_decides_every_random_number_and_the_callers_state_none():
    runs = []
    for caller, seed in ((1, 0), (2, 0), (1, 5)):
        model = network()
        torch.manual_seed(caller), random.seed(caller), np.random.seed(caller)
        runs.append(discover(model, data(), noisy, DiscoveryConfig(epochs=3, lr=0.05, seed=seed)))
    assert_same_discovery(runs[0], runs[1])
    assert runs[0].history != runs[2].history


@pytest.mark.parametrize("has_generator", [True, False])
def test_a_shuffling_data_loader_is_seeded_per_epoch_and_its_generator_put_back(has_generator, tmp_path):
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    runs = []
    for caller in (1, 2):
        generator = torch.Generator().manual_seed(caller) if has_generator else None
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True, generator=generator
        )
        torch.manual_seed(caller)
        runs.append(discover(network_of_seed_0(), loader, classify, FAST))
        if generator is not None:
            assert torch.equal(generator.get_state(), torch.Generator().manual_seed(caller).get_state())
    assert_same_discovery(*runs)
    assert len({row["loss"] for row in runs[0].history}) == 4


def network_of_seed_0() -> nn.Sequential:
    with torch.random.fork_rng():
        return network()


SETTINGS = dict(epochs=6, lr=0.05, lam=1e-3, anneal="step", unit="weight")


def with_checkpoint(path: Path, evaluate=accuracy, **changes) -> DiscoveryConfig:
    return DiscoveryConfig(**{**SETTINGS, "checkpoint": path, **changes})


@pytest.mark.parametrize("unit", ["weight", "row"])
@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_run_stopped_in_an_epoch_goes_on_from_the_last_whole_one_to_the_same_numbers(tmp_path, unit, stop_at):
    path = tmp_path / "run" / "discovery.safetensors"
    unbroken = discover(network(), data(), noisy, DiscoveryConfig(**{**SETTINGS, "unit": unit}), evaluate=accuracy)
    steps = []

    def stopping(model: nn.Module, batch) -> Tensor:
        steps.append(1)
        return fail() if len(steps) == 5 * stop_at + 3 else noisy(model, batch)

    with pytest.raises(Stop):
        discover(network(), data(), stopping, with_checkpoint(path, unit=unit), evaluate=accuracy)
    resumed = discover(network(), data(), stopping, with_checkpoint(path, unit=unit), evaluate=accuracy)
    assert_same_discovery(unbroken, resumed)
    assert len(steps) == 5 * stop_at + 3 + 5 * (6 - stop_at)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays
    again = discover(network(), data(), fail, with_checkpoint(path, unit=unit), evaluate=accuracy)
    assert_same_discovery(unbroken, again)  # nothing is left to do


def run_in_a_process(checkpoint: Path, result: Path) -> subprocess.Popen:
    code = (
        "import sys, json, time; sys.path.insert(0, sys.argv[3])\n"
        "import torch; torch.set_num_threads(1)\n"
        "import test_discover as t\n"
        "def slow(model, batch):\n    time.sleep(0.004); return t.noisy(model, batch)\n"
        "from pathlib import Path\n"
        "def say(row, masks):\n    print(row['epoch'], flush=True)\n"
        "found = t.discover(t.network(), t.data(), slow, t.with_checkpoint(Path(sys.argv[1]), epochs=20), "
        "evaluate=t.accuracy, callbacks=[say])\n"
        "found.subnet.save(sys.argv[2] + '.subnet')\n"
        "Path(sys.argv[2]).write_text(json.dumps([found.history, found.best]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python_api")])}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(checkpoint), str(result), str(Path(__file__).parent)],
        env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_process_that_is_started_again_ends_in_the_numbers_of_an_unbroken_run(tmp_path):
    whole = run_in_a_process(tmp_path / "a.safetensors", tmp_path / "a.json")
    killed = run_in_a_process(tmp_path / "b.safetensors", tmp_path / "b.json")
    for line in killed.stdout:
        if int(line) >= 7:  # said before the checkpoint of epoch 7 is written: killed around that moment
            break
    killed.send_signal(signal.SIGKILL)
    killed.stdout.close()
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "b.json").exists()
    last = run_in_a_process(tmp_path / "b.safetensors", tmp_path / "b.json")
    assert int(last.stdout.readline()) >= 7
    for process in (whole, last):
        process.communicate()
        assert process.returncode == 0
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    subnets = [Subnet.load(tmp_path / f"{name}.json.subnet") for name in "ab"]
    assert subnets[0].provenance == subnets[1].provenance and subnets[0].base_hash == subnets[1].base_hash
    assert all(torch.equal(mask, subnets[1].masks[name]) for name, mask in subnets[0].masks.items())
    assert len(json.loads((tmp_path / "a.json").read_text())[0]) == 20


def test_a_checkpoint_of_another_config_or_model_is_refused_with_the_differing_keys(tmp_path):
    path = tmp_path / "c.safetensors"
    discover(network(), data(), classify, with_checkpoint(path))
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"these differ: config\.lam \(0\.001 there, 0\.5 now\), config\.seed \(0 "):
        discover(network(), data(), classify, with_checkpoint(path, lam=0.5, seed=3))
    with pytest.raises(ValueError, match=r"these differ: config\.has_evaluate"):
        discover(network(), data(), classify, with_checkpoint(path), evaluate=accuracy)
    with pytest.raises(ValueError, match=r"these differ: config\.unit.*masked weights"):
        discover(network(), data(), classify, with_checkpoint(path, unit="row"))
    other = network()
    with torch.no_grad():
        other[1].running_mean.add_(1)
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"these differ: model's parameters and buffers \(hash\)"):
        discover(other, data(), classify, with_checkpoint(path))
    assert_same(before, snapshot(other))
    assert path.read_bytes() == content


def test_a_damaged_or_foreign_checkpoint_is_refused_in_one_sentence_and_kept(tmp_path):
    path = tmp_path / "c.safetensors"
    discover(network(), data(), classify, with_checkpoint(path))
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-5] ^= 1
    for damaged in (content[: len(content) // 2], b"", b"hello", bytes(flipped), content + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^discover: the checkpoint .*c.safetensors.*delete it to") as info:
            discover(network(), data(), classify, with_checkpoint(path))
        assert "\n" not in str(info.value) and path.read_bytes() == damaged
    discover(network(), data(), classify, FAST).subnet.save(path)
    with pytest.raises(ValueError, match="damaged or not a discovery's"):
        discover(network(), data(), classify, with_checkpoint(path))
    with pytest.raises(ValueError, match="is a folder"):
        discover(network(), data(), classify, with_checkpoint(tmp_path))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["loss", "scores"])
def test_values_that_are_not_finite_stop_the_run_name_the_layers_and_keep_the_checkpoint(tmp_path, broken):
    path = tmp_path / "c.safetensors"
    steps = []

    def breaking(model: nn.Module, batch) -> Tensor:
        steps.append(1)
        loss = classify(model, batch)
        if len(steps) != 13:
            return loss
        return loss * float("nan") if broken == "loss" else loss + (model[4].scores * 1e38 * 1e38).sum()

    model = network()
    before = snapshot(model)
    layers = "0.scores, 4.scores" if broken == "loss" else "4.scores"
    with pytest.raises(ValueError, match=rf"after epoch 2: .*not finite in .*{layers}.*c.safetensors holds epoch 1"):
        discover(model, data(), breaking, with_checkpoint(path))
    assert_same(before, snapshot(model))
    repaired = discover(model, data(), classify, with_checkpoint(path))
    assert_same_discovery(repaired, discover(network(), data(), classify, DiscoveryConfig(**SETTINGS)))


def test_a_one_shot_iterator_is_refused_for_several_epochs_and_taken_for_one():
    with pytest.raises(ValueError, match="generator that is used up after one epoch, and epochs is 4"):
        discover(network(), (batch for batch in data()), classify, FAST)
    found = discover(network(), (batch for batch in data()), classify, DiscoveryConfig(epochs=1))
    assert found.history[0]["step"] == 5
    used = iter(data())
    with pytest.raises(ValueError, match="no batch in epoch 1"):
        discover(network(), lambda epoch: used, classify, FAST)


def test_steps_per_epoch_takes_exactly_so_many_batches_of_any_source():
    def endless(epoch: int):
        while True:
            yield data()[epoch % 5]

    config = DiscoveryConfig(epochs=2, steps_per_epoch=3, anneal="step")
    assert [row["step"] for row in discover(network(), endless, classify, config).history] == [3, 6]
    assert [row["step"] for row in discover(network(), data(), classify, config).history] == [3, 6]
    with pytest.raises(ValueError, match="2 batches per epoch, fewer than steps_per_epoch=3"):
        discover(network(), data(2), classify, config)
    with pytest.raises(ValueError, match="gave 2 batches in epoch 0, not the 3"):
        discover(network(), lambda epoch: iter(data(2)), classify, config)
    with pytest.raises(ValueError, match="has no length; set steps_per_epoch"):
        discover(network(), endless, classify, DiscoveryConfig(anneal="step"))


REFUSED_CALLS = [
    (dict(model="gpt2"), TypeError, r"model must be an nn\.Module"),
    (dict(batches=3), TypeError, "batches must be something to iterate over"),
    (dict(batches=lambda epoch: 3), TypeError, r"batches\(epoch\) must return"),
    (dict(batches=[]), ValueError, "no batch in epoch 0"),
    (dict(objective=None), TypeError, "objective must be a function"),
    (dict(objective=lambda m, b: 1.0), TypeError, "objective must return a 0-d tensor, got float"),
    (dict(objective=lambda m, b: m(b[0])), TypeError, r"got a tensor of shape \[16, 3\]"),
    (dict(objective=lambda m, b: m(b[0]).detach().sum()), ValueError, "does not depend on the scores"),
    (dict(config={"epochs": 3}), TypeError, "config must be a DiscoveryConfig"),
    (dict(evaluate=0.5), TypeError, "evaluate must be a function"),
    (dict(evaluate=lambda m: "good"), TypeError, "evaluate must return a number"),
    (dict(evaluate=lambda m: float("nan")), ValueError, "evaluate returned nan after epoch 0"),
    (dict(callbacks=[3]), TypeError, "callbacks must be functions"),
    (dict(model=nn.Sequential(nn.ReLU())), ValueError, "match nothing"),
    (dict(config=DiscoveryConfig(cuda_graph=True)), ValueError, "needs the model on a CUDA device, it is on cpu"),
]


@pytest.mark.parametrize("arguments, error, message", REFUSED_CALLS)
def test_a_bad_argument_is_refused_in_words_and_the_model_stays(arguments, error, message):
    model = network()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        discover(**{"model": model, "batches": data(), "objective": classify, "config": FAST, **arguments})
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("setting, error", [
    (dict(epochs=0), ValueError), (dict(epochs=2.5), TypeError), (dict(steps_per_epoch=0), ValueError),
    (dict(lr=0.0), ValueError), (dict(lr="1e-3"), TypeError), (dict(lam=-1e-9), ValueError),
    (dict(lam=float("nan")), ValueError), (dict(weight_decay=-1.0), ValueError), (dict(beta_start=0.0), ValueError),
    (dict(beta_end=0.5), ValueError), (dict(reduction="max"), ValueError), (dict(beta_schedule="linear"), ValueError),
    (dict(anneal="never"), ValueError), (dict(kind="hard"), ValueError), (dict(kind="soft"), ValueError),
    (dict(score_init=float("inf")), ValueError), (dict(seed="0"), TypeError), (dict(checkpoint=3), TypeError),
    (dict(cuda_graph=1), TypeError),
])  # fmt: skip
def test_a_bad_setting_is_refused_where_it_is_written_down(setting, error):
    with pytest.raises(error):
        DiscoveryConfig(**setting)


# --- the step as a CUDA graph, replayed by hand (tests/kernels/test_gpu.py has real graphs) ---------------------------


class CapturedByHand:
    """What CapturedStep does, with runs of step in place of replays."""

    def __init__(self, masks: MaskSet, step, optimizer) -> None:
        assert all(group["capturable"] for group in optimizer.param_groups)
        self.step, self.num_replays = step, 0
        CapturedByHand.last = self
        with torch.random.fork_rng(), put_back(masks, optimizer):
            for _ in range(3):
                step()
        self.result = torch.zeros(())

    def __call__(self) -> Tensor:
        self.num_replays += 1
        return self.result.copy_(self.step())


@pytest.fixture
def graphs_by_hand(monkeypatch):
    monkeypatch.setattr("subnets.discovery.replay.CapturedStep", CapturedByHand)
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    monkeypatch.setattr("subnet_kernels.capturing.is_capturing", lambda tensor: False)


def taking_apart(model: nn.Module, batch: dict) -> Tensor:
    """An objective with random numbers, which changes the containers that it is given."""
    x, y = batch.pop("pair")
    return F.cross_entropy(model(x + 0.1 * torch.randn(x.shape[0], 1)), y) * batch["scale"]


@pytest.mark.parametrize("anneal", ["epoch", "step"])
def test_replayed_steps_and_those_of_odd_batches_give_the_numbers_of_ordinary_ones(graphs_by_hand, anneal, tmp_path):
    batches = [{"pair": pair, "scale": 1.0} for pair in data(6)]
    batches[2] = {"pair": tuple(part[:7] for part in batches[2]["pair"]), "scale": 1.0}  # another size
    batches[4] = {**batches[4], "scale": 2.0}  # another plain value
    settings = {**SETTINGS, "epochs": 3, "anneal": anneal}

    def fresh(epoch: int):
        return [dict(batch) for batch in batches]

    plain = discover(
        network(), fresh, taking_apart, DiscoveryConfig(**{**settings, "steps_per_epoch": 6}), evaluate=accuracy
    )
    config = DiscoveryConfig(**{**settings, "steps_per_epoch": 6, "cuda_graph": True, "checkpoint": tmp_path / "c"})
    replayed = discover(network(), fresh, taking_apart, config, evaluate=accuracy)
    assert_same_discovery(plain, replayed)
    assert CapturedByHand.last.num_replays == 3 * 4


def test_a_discovery_with_replays_goes_on_from_the_checkpoint_of_one_without(graphs_by_hand, tmp_path):
    settings = dict(SETTINGS, epochs=4, steps_per_epoch=5)

    def batches(epoch: int):
        return [{"pair": pair, "scale": 1.0} for pair in data()]

    unbroken = discover(network(), batches, taking_apart, DiscoveryConfig(**settings), evaluate=accuracy)
    rows = []

    def stop_after_two(row, masks):
        rows.append(row)
        return fail() if len(rows) == 3 else None

    for cuda_graph, callbacks in ((False, [stop_after_two]), (True, [])):
        config = DiscoveryConfig(**settings, checkpoint=tmp_path / "c", cuda_graph=cuda_graph)
        with pytest.raises(Stop) if callbacks else contextlib.nullcontext():
            found = discover(network(), batches, taking_apart, config, evaluate=accuracy, callbacks=callbacks)
    assert_same_discovery(unbroken, found)
    assert CapturedByHand.last.num_replays == 2 * 5


def test_a_batch_that_cannot_be_copied_is_refused(graphs_by_hand):
    class Batch:
        x = data(1)[0][0]

    config = DiscoveryConfig(epochs=1, cuda_graph=True)
    with pytest.raises(TypeError, match=r"got a batch with Batch; convert it"):
        discover(network(), [Batch()], lambda model, batch: model(batch.x).sum(), config)


# --- objectives ------------------------------------------------------------------------------------------------------


def test_kl_to_unmasked_is_the_divergence_of_the_masked_from_the_unmasked_output():
    model = network().eval()
    x = data()[0][0]
    unmasked = torch.softmax(model(x).detach().double(), 1)
    masks = mask_model(model, score_init=0.3)
    masked = torch.softmax(model(x).detach().double(), 1)
    expected = (unmasked * (unmasked / masked).log()).sum(1).mean()
    for batch in (x, (x, "labels"), [x]):
        loss = objectives.kl_to_unmasked(model, batch)
        assert loss.dim() == 0 and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert all(scores.grad.abs().sum() > 0 for scores in masks.scores().values())
    assert all(p.grad is None for name, p in model.named_parameters() if not name.endswith("scores"))
    with torch.no_grad():
        for scores in masks.scores().values():
            scores.fill_(1e4)
    assert objectives.kl_to_unmasked(model, x).item() == 0.0  # all masks are one: the same network


def test_kl_to_unmasked_needs_no_labels_and_discover_keeps_what_moves_the_output():
    """Two of eight hidden units do nothing (their outgoing weights are zero), so their incoming weights must go."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[2].weight[:, :2] = 0.0
    batches = [torch.randn(32, 4) for _ in range(20)]
    config = DiscoveryConfig(epochs=10, lr=0.05, lam=1e-4)
    found = discover(model, batches, objectives.kl_to_unmasked, config)
    assert not found.subnet.masks["0.weight"][:2].any() and found.subnet.masks["0.weight"][2:].float().mean() > 0.5
    assert found.history[-1]["loss"] < 0.2 * found.history[0]["loss"]


def test_kl_to_unmasked_refuses_what_is_no_logits_and_an_empty_batch():
    model = network().eval()
    with pytest.raises(ValueError, match="no masked layer"):
        objectives.kl_to_unmasked(model, data()[0][0])
    mask_model(model)
    with pytest.raises(ValueError, match="batch is empty"):
        objectives.kl_to_unmasked(model, torch.empty(0, 4))
    model.forward = lambda x: {"a": 1}
    with pytest.raises(TypeError, match=r"must return logits \[\.\.\., classes\], got dict"):
        objectives.kl_to_unmasked(model, data()[0][0])


# --- the bar ---------------------------------------------------------------------------------------------------------


def test_the_bar_shows_loss_beta_density_and_undecided_and_can_be_off(capsys):
    discover(network(), data(), classify, FAST, progress=True)
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("20/20", "loss=", "beta=", "density=", "undecided="))
    discover(network(), data(), classify, FAST, progress=False)
    discover(network(), data(), classify, FAST)  # stderr is no terminal here
    assert capsys.readouterr().err == ""
