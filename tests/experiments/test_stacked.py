"""Networks trained side by side: the same numbers as each network alone, and planted entries that never move."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from subnets.experiments.arithmetic import data
from subnets.training.gpt2 import GPT2Shape, LeanGPT2, lm_loss
from subnets.training.member_training import Member, MemberResult, Recipe, StackTrainer, train_stack
from subnets.training.seeds import seed_for, torch_generator
from subnets.training.stack_step import _bits_of
from subnets.training.stacked import DropoutNoise, StackedGPT2
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHAPE = GPT2Shape(layers=2, width=32, heads=4, dropout=0.0)
DROPPING = GPT2Shape(layers=2, width=32, heads=4, dropout=0.1)


def shaken_models(count: int) -> list[LeanGPT2]:
    """Networks whose weights are large enough that every path matters."""
    models = []
    for i in range(count):
        generator = torch_generator("models", i)
        model = LeanGPT2(SHAPE, generator).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
        models.append(model)
    return models


def test_losses_gradients_and_answers_of_a_stack_equal_autograd_on_each_network() -> None:
    models = shaken_models(3)
    sequences = torch.stack([data.training_set(data.T1, 40, i) for i in range(3)])
    sequences[:, 5] = sequences[:, 4]  # a token that occurs twice in the batch
    stack = StackedGPT2(SHAPE, [model.state_dict() for model in models])
    losses = stack.loss_and_grads(sequences)
    answers = stack.answers(sequences)
    for i, model in enumerate(models):
        loss = lm_loss(model, sequences[i])
        loss.backward()
        torch.testing.assert_close(losses[i], loss.detach(), rtol=1e-5, atol=0)
        for name, parameter in model.named_parameters():
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(stack.grads[name][i], parameter.grad, rtol=1e-4, atol=2e-6 * max(scale, 1.0))
        assert torch.equal(answers[i], model(sequences[i, :, :-1])[:, -1].argmax(-1))


def test_gradients_with_dropout_are_those_of_the_dropped_network() -> None:
    """Central differences along random directions, with the same noise in every pass."""
    stack = StackedGPT2(DROPPING, [model.state_dict() for model in shaken_models(2)])
    sequences = torch.stack([data.training_set(data.T1, 30, i) for i in range(2)])

    def losses() -> torch.Tensor:
        return stack.loss_and_grads(sequences, DropoutNoise(torch.tensor([3, 4]), torch.tensor(7), 0.1))

    losses()
    gradients = {name: grad.clone() for name, grad in stack.grads.items()}
    for name in ("h.0.attn.c_attn.weight", "h.1.mlp.c_fc.weight", "h.0.ln_2.weight", "wte.weight", "wpe.weight"):
        value, step = stack.params[name], 2e-2
        direction = gradients[name] / gradients[name].flatten(1).norm(dim=1).view(-1, *[1] * (value.ndim - 1))
        start = value.clone()
        value.copy_(start + step * direction)
        above = losses()
        value.copy_(start - step * direction)
        below = losses()
        value.copy_(start)
        slope = (gradients[name] * direction).flatten(1).sum(1)
        torch.testing.assert_close((above - below) / (2 * step), slope, rtol=3e-2, atol=1e-4)


def test_dropout_keeps_nine_tenths_scales_by_ten_ninths_and_repeats_per_member_step_and_place() -> None:
    seeds, step = torch.tensor([5, 9]), torch.tensor(3)
    factors = DropoutNoise(seeds, step, 0.1).factors(100, [1000, 7])
    assert [tuple(part.shape) for part in factors] == [(2, 100, 1000), (2, 100, 7)]
    assert factors[0].unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert (factors[0] > 0).float().mean((1, 2)).tolist() == pytest.approx([0.9, 0.9], abs=4e-3)
    alone = DropoutNoise(seeds[1:], step, 0.1).factors(60, [1000, 7])  # fewer sequences: the same draws for each
    for ours, theirs in zip(alone, factors, strict=True):
        assert torch.equal(ours[0], theirs[1, :60])
    later = DropoutNoise(seeds, step + 1, 0.1).factors(100, [1000])[0]
    for other in (factors[0][0], later[1], factors[0][1].roll(1, 0)):
        assert (other == factors[0][1]).float().mean().item() == pytest.approx(0.9**2 + 0.1**2, abs=5e-3)


def member(index: int, *, frozen: bool = False, rows: int = 230) -> Member:
    state = {name: value.clone() for name, value in shaken_models(index + 1)[index].state_dict().items()}
    masks = {}
    if frozen:
        generator = torch_generator("mask", index)
        masks = {n: torch.rand(state[n].shape, generator=generator) < 0.3 for n in SHAPE.masked_names()}
    sets = [data.held_out_set(data.T2, split, index, 100) for split in ("validation", "test")]
    return Member({"index": index}, state, data.training_set(data.T2, rows, index), *sets, ("m", index), masks)


RECIPE = Recipe(epochs=3, batch=50, lr=3e-3, weight_decay=0.1)


def test_planted_entries_stay_constant_to_the_bit_and_all_others_move() -> None:
    planted, free = member(0, frozen=True), member(1)
    trainer = StackTrainer(DROPPING, [free, planted], RECIPE)
    trainer.run()
    for i, who in enumerate([planted, free]):  # in the stack those with frozen entries come first
        now = trainer.net.state(i)
        for name in SHAPE.masked_names():
            mask = who.frozen.get(name, torch.zeros_like(now[name], dtype=torch.bool))
            assert torch.equal(now[name][mask], who.state[name][mask])
            assert (now[name][~mask] != who.state[name][~mask]).float().mean().item() > 0.99


def test_a_member_alone_and_in_company_agree_within_rounding() -> None:
    company = train_stack(DROPPING, [member(0), member(1, frozen=True), member(2)], RECIPE)
    for i, frozen in ((0, False), (1, True)):
        alone = train_stack(DROPPING, [member(i, frozen=frozen)], RECIPE)[0]
        assert alone.label == company[i].label == {"index": i}
        for theirs, ours in zip(company[i].curve, alone.curve, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-4)
        for name, value in alone.state.items():
            torch.testing.assert_close(company[i].state[name], value, rtol=0, atol=2e-3)


def test_training_equals_torch_adamw_on_the_plain_network() -> None:
    who = member(0)
    trainer = StackTrainer(SHAPE, [who], RECIPE)
    trainer.run()
    model = LeanGPT2(SHAPE)
    model.load_state_dict(who.state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    best = (-1.0, None)
    for epoch in (1, 2, 3):
        order = torch.randperm(230, generator=torch_generator("m", 0, "order", epoch))
        for rows in order.split(50):
            optimizer.zero_grad()
            lm_loss(model, who.train[rows]).backward()
            optimizer.step()
        right = (model(who.validation[:, :-1])[:, -1].argmax(-1) == who.validation[:, -1]).float().mean().item()
        best = max(best, (right, -epoch))
    standing = trainer.progress.standing[0]
    assert (standing.best, -standing.best_epoch) == pytest.approx(best)
    if best[1] == -3:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(trainer.net.state(0)[name], value, rtol=0, atol=2e-4)


def test_the_first_of_the_best_epochs_is_reported_with_its_weights() -> None:
    result = train_stack(DROPPING, [member(0)], Recipe(epochs=5, batch=50, lr=3e-3))[0]
    accuracies = [point["validation_accuracy"] for point in result.curve]
    assert result.validation_accuracy == max(accuracies)
    assert result.best_epoch == accuracies.index(max(accuracies)) + 1
    best = StackedGPT2(SHAPE, [result.state])
    test = member(0).test[None]
    assert result.test_accuracy == pytest.approx((best.answers(test) == test[..., -1]).float().mean().item())


def in_fp64(who: Member) -> Member:
    return dataclasses.replace(who, state={name: value.double() for name, value in who.state.items()})


def test_eight_transfer_runs_alone_and_in_company_agree_within_rounding() -> None:
    """The bound is what rounding alone does: 4 times the largest distance, over the runs, of a run alone in fp32 from
    the same run in fp64, up to the same epoch. A wrong order, seed or moment is off by far more."""
    rows = (230, 130, 330, 230, 180, 95, 230, 330)
    members = [member(i, frozen=i % 2 == 1, rows=n) for i, n in enumerate(rows)]
    recipe = dataclasses.replace(RECIPE, lr=1e-3)
    company = train_stack(DROPPING, members, recipe)
    alone = [train_stack(DROPPING, [who], recipe)[0] for who in members]
    exact = [train_stack(DROPPING, [in_fp64(who)], recipe)[0] for who in members]

    def curves(results: list[MemberResult], key: str) -> torch.Tensor:
        return torch.tensor([[point[key] for point in result.curve] for result in results], dtype=torch.float64)

    losses, true = curves(alone, "loss"), curves(exact, "loss")
    rounding = (losses - true).abs().amax(0).cummax(0).values
    assert (rounding < 1e-5).all()
    assert ((curves(company, "loss") - losses).abs() <= 4 * rounding).all()
    accuracies = curves(company, "validation_accuracy") - curves(alone, "validation_accuracy")
    assert accuracies.abs().max() <= 0.02  # two of 100 answers that hang on a rounding
    for ours, theirs, who in zip(company, alone, members, strict=True):
        assert ours.label == who.label and ours.best_epoch == theirs.best_epoch
        for name, mask in who.frozen.items():
            for result in (ours, theirs):
                assert torch.equal(result.state[name][mask], who.state[name][mask])


def test_members_leave_when_they_are_done_and_the_others_go_on() -> None:
    members = [member(0, rows=230), member(1, frozen=True, rows=95), member(2, frozen=True, rows=230)]
    seen = []
    results = train_stack(DROPPING, members, RECIPE, report=lambda v: seen.append((v["active"], v["member_steps"])))
    assert [len(result.curve) for result in results] == [3, 3, 3]
    assert seen[:5] == [(3, 3), (3, 6), (3, 9), (3, 12), (3, 15)] and seen[5] == (2, 18)  # 3 epochs of 2 steps
    assert seen[6] == (2, 20) and seen[-2] == (2, 34) and seen[-1] == (0, 36) and len(seen) == 15
    points = [[point["epoch"] for point in result.curve] for result in results]
    assert points == [[1.0, 2.0, 3.0]] * 3


def test_patience_and_the_wanted_accuracy_belong_to_the_member() -> None:
    model = LeanGPT2(SHAPE, torch_generator("p"))
    sequences = data.held_out_set(data.T1, "test", 0, 60)
    right = sequences.clone()
    right[:, 3] = model.eval()(sequences[:, :3])[:, 2].argmax(-1)
    wrong = right.clone()
    wrong[:, 3] = (right[:, 3] + 1) % 900
    half = torch.cat([right[:30], wrong[30:]])
    members = [Member({}, model.state_dict(), right, kind, kind, ("p",)) for kind in (wrong, right, half)]
    recipe = Recipe(epochs=9, batch=30, lr=1e-12, weight_decay=0.0, stop_at=1.0, patience=4)
    results = train_stack(SHAPE, members, recipe)
    assert [len(result.curve) for result in results] == [5, 1, 5]
    assert [result.best_epoch for result in results] == [1, 1, 1]
    assert [result.test_accuracy for result in results] == [0.0, 1.0, 0.5]


def test_validation_and_test_sets_of_other_lengths_count_their_own_rows() -> None:
    short = member(0)
    cut = dataclasses.replace(short, validation=short.validation[:37], test=short.test[:11])
    longer, shorter = train_stack(SHAPE, [member(1), cut], RECIPE)
    assert shorter.test_accuracy * 11 == pytest.approx(round(shorter.test_accuracy * 11))
    for point in shorter.curve:
        assert point["validation_accuracy"] * 37 == pytest.approx(round(point["validation_accuracy"] * 37), abs=1e-4)
    alone = train_stack(SHAPE, [cut], RECIPE)[0]
    assert shorter.curve == [pytest.approx(point, rel=1e-3) for point in alone.curve]
    assert longer.curve == [pytest.approx(p, rel=1e-3) for p in train_stack(SHAPE, [member(1)], RECIPE)[0].curve]


@pytest.mark.parametrize("killed_at", [2, 5, 6, 7, 14])
def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path: Path, killed_at: int) -> None:
    """Members of 5 and 2 steps an epoch: killed with nothing written, before and after one has left, in the end."""
    members = [member(0), member(1, frozen=True, rows=95), member(2, frozen=True)]
    unbroken = train_stack(DROPPING, members, RECIPE)

    def stop(values: dict[str, float]) -> None:
        if values["step"] == killed_at:
            raise KeyboardInterrupt

    path = tmp_path / "c.safetensors"
    with pytest.raises(KeyboardInterrupt):
        StackTrainer(DROPPING, members, RECIPE, checkpoint=path, checkpoint_seconds=0.0).run(stop)
    resumed = StackTrainer(DROPPING, members, RECIPE, checkpoint=path, checkpoint_seconds=0.0).run()
    again = StackTrainer(DROPPING, members, RECIPE, checkpoint=path).run()  # of a training that is over
    for ours, last, theirs in zip(resumed, again, unbroken, strict=True):
        assert ours.curve == last.curve == theirs.curve
        assert ours.test_accuracy == last.test_accuracy == theirs.test_accuracy
        for name, value in theirs.state.items():
            assert torch.equal(ours.state[name], value) and torch.equal(last.state[name], value)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    members = [member(0), member(1)]
    StackTrainer(DROPPING, members, RECIPE, checkpoint=path, checkpoint_seconds=0.0).run()
    others = {
        "members": (DROPPING, [member(0), member(2)], RECIPE),
        "members$": (DROPPING, [member(0)], RECIPE),
        "recipe": (DROPPING, members, dataclasses.replace(RECIPE, lr=2 * RECIPE.lr)),
        "parameters": (dataclasses.replace(DROPPING, layers=DROPPING.layers + 1), None, RECIPE),
    }
    for what, (shape, given, recipe) in others.items():
        if given is None:
            deeper = LeanGPT2(shape, torch_generator("deeper")).state_dict()
            given = [dataclasses.replace(m, state=deeper) for m in members]
        with pytest.raises(ValueError, match=f"belongs to another training, these differ: .*{what.rstrip('$')}"):
            StackTrainer(shape, given, recipe, checkpoint=path).run()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_planted_bits_come_back_in_every_dtype(dtype: torch.dtype) -> None:
    values = torch.tensor([1.5, -0.0, float("nan"), float("inf"), 3.0], dtype=dtype)
    mask = torch.tensor([True, True, True, False, False])
    free, bits = _bits_of(mask, values)
    trained = torch.tensor([2.0, 1.0, -4.0, float("-inf"), -0.0], dtype=dtype)
    now = trained.clone()
    now.view(free.dtype).bitwise_and_(free).bitwise_or_(bits)
    assert torch.equal(now.view(free.dtype), torch.where(mask, values, trained).view(free.dtype))


def test_clipping_bounds_each_members_gradient_norm_as_torch_does() -> None:
    trainer = StackTrainer(SHAPE, [member(0), member(1)], Recipe(epochs=1, batch=50, lr=1e-3, clip=0.05))
    for i in range(2):
        trainer.step.set_order(i, torch.arange(230), 0)
    trainer.step(50)
    for i in range(2):
        model = shaken_models(2)[i]
        lm_loss(model, member(i).train[:50]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(trainer.net.grads[name][i], parameter.grad, rtol=1e-3, atol=1e-7)


def test_training_stops_at_once_when_every_member_reaches_the_wanted_accuracy() -> None:
    model = LeanGPT2(SHAPE, torch_generator("p"))
    sequences = data.held_out_set(data.T1, "test", 0, 60)
    sequences[:, 3] = model.eval()(sequences[:, :3])[:, 2].argmax(-1)
    same = Member({}, model.state_dict(), sequences, sequences, sequences, ("p",))
    recipe = Recipe(epochs=9, batch=60, lr=1e-9, weight_decay=0.0, stop_at=1.0)
    assert len(train_stack(SHAPE, [same], recipe)[0].curve) == 1


@pytest.mark.parametrize(
    ("members", "recipe", "message"),
    [
        ([], RECIPE, "at least one member, got none"),
        ([member(0), member(1, rows=0)], RECIPE, "every member needs train rows, got none for member 1"),
        ([member(0), member(1, rows=20)], Recipe(1, 50, 1e-3, decay=True), r"equally many steps, got \[1, 5\]"),
        ([member(0)], Recipe(epochs=0, batch=5, lr=1e-3), "epochs and batch must be at least 1, got epochs=0"),
    ],
)
def test_stacks_that_make_no_sense_are_refused(members: list[Member], recipe: Recipe, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_stack(SHAPE, members, recipe)


def test_seeds_depend_on_every_part_and_its_type_and_on_nothing_else() -> None:
    assert seed_for(0, "T2", 3) == seed_for(0, "T2", 3) == 325900479077815252
    assert len({seed_for(1, 23), seed_for(12, 3), seed_for("1", 23), seed_for(1, 23, 0)}) == 4
    with pytest.raises(TypeError, match=r"parts must be int or str, got 0.5"):
        seed_for(0.5)  # type: ignore[arg-type]


class OnOneDevice(TorchDispatchMode):
    """Refuses operations that wait for the device, and tensors that lie elsewhere."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        for value in tree_leaves((args, kwargs, made)):
            assert not isinstance(value, torch.Tensor) or value.device.type == "meta", (func, value.device)
        return made


class NoOptimizer:
    """Stands in for AdamW, which has no fused step on the meta device."""

    def __init__(self, params: list[torch.Tensor], **settings: Any) -> None:
        assert all(value.grad is not None and value.grad.device == value.device for value in params)
        assert settings["lr"].device.type == "meta" and settings["fused"]
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}

    def step(self) -> None:
        """Does nothing."""


def test_a_step_stays_on_its_device_and_never_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph can hold: shown on the meta device, where nothing can be read. Also after members have left."""
    monkeypatch.setattr(torch.optim, "AdamW", NoOptimizer)
    members = [member(0), member(1, frozen=True, rows=95), member(2, frozen=True)]
    trainer = StackTrainer(DROPPING, members, dataclasses.replace(RECIPE, clip=1.0), device="meta")
    with OnOneDevice():
        trainer.step.eager(50)
    trainer.step.keep(torch.tensor([0, 2]))
    with OnOneDevice():
        trainer.step.eager(50)
    for name, value in trainer.step.tensors().items():
        assert value.device.type == "meta", name
    with OnOneDevice(), pytest.raises(AssertionError, match="cpu"):
        torch.zeros(3).add_(1)


class HostGraph:
    """Stands in for a CUDA graph: what is captured does not run, a replay runs it."""

    def __init__(self) -> None:
        self.num_replays = 0

    def replay(self) -> None:
        """The captured step."""
        self.num_replays += 1
        assert self.step is not None and self.members == self.step.net.members  # a graph of another stack is stale
        self.step.eager(self.step.batch)


def test_graphs_are_captured_anew_when_members_leave_and_give_the_numbers_of_single_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members = [member(0), member(1, frozen=True, rows=95), member(2, frozen=True)]
    trainer = StackTrainer(DROPPING, members, RECIPE)
    graphs = []

    @contextlib.contextmanager
    def capture(graph: Any) -> Iterator[None]:
        before = {name: value.clone() for name, value in trainer.step.tensors().items()}
        yield
        trainer.step.load(before)
        graph.step, graph.members = trainer.step, trainer.net.members
        graphs.append(graph)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", HostGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    trainer.step.device = torch.device("cuda")
    results = trainer.run()
    assert [graph.members for graph in graphs] == [3, 2]
    assert [graph.num_replays for graph in graphs] == [5, 8]  # 6 and 9 steps, the first of each before the capture
    for ours, theirs in zip(results, train_stack(DROPPING, members, RECIPE), strict=True):
        assert ours.best_epoch == theirs.best_epoch
        for a, b in zip(ours.curve, theirs.curve, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=5e-6)
        for name, value in theirs.state.items():
            torch.testing.assert_close(ours.state[name], value, rtol=0, atol=2e-4)
