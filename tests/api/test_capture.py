"""CapturedStep as far as it goes without a GPU: what it refuses, and that warming up trains nothing.

tests/kernels/test_gpu.py captures and replays.
"""

from __future__ import annotations

import copy

import pytest
import torch
from subnets import CapturedStep, MaskSet, mask_model
from subnets.capture import put_back
from torch import Tensor, nn

from subnet_kernels.optim import MaskAdamW


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


class Training:
    """A masked network, its capturable optimizer with lam as a tensor, beta annealed on the device, and a step."""

    def __init__(self) -> None:
        self.model = network()
        self.masks: MaskSet = mask_model(self.model)
        self.lam = torch.tensor(1e-2)
        self.optimizer: MaskAdamW = self.masks.adamw(lr=0.05, lam=self.lam, capturable=True)
        self.masks.anneal(to=100, steps=9, every=2, on_device=True)
        self.x = torch.randn(16, 6)

    def step(self) -> Tensor:
        loss = self.model(self.x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lam.mul_(1.1)
        return loss.detach()

    def everything(self) -> list[Tensor]:
        """Whatever a step changes, copied."""
        states = [self.optimizer.state[scores] for scores in self.masks.scores().values()]
        tensors = [
            *self.model.state_dict().values(), self.masks._state.beta, self.masks._state.schedule.count, self.lam,
            *(value for state in states for _, value in sorted(state.items())),
        ]  # fmt: skip
        return [tensor.detach().clone() for tensor in tensors]


@pytest.mark.parametrize("num_before", [0, 2])
def test_what_runs_inside_put_back_trains_nothing(num_before):
    training = Training()
    for _ in range(num_before):
        training.step()
    (training.model(training.x).sum()).backward()  # gradients of nobody's step
    twin = copy.deepcopy(training.model)
    before = training.everything()
    ids = [id(scores) for scores in training.masks.scores().values()]
    with torch.random.fork_rng(devices=[]), put_back(training.masks, training.optimizer):
        assert all(p.grad is None for p in training.model.parameters())
        changed = [training.step() for _ in range(3)]
        assert changed[0] != changed[1]
    after = training.everything()
    assert [id(scores) for scores in training.masks.scores().values()] == ids
    assert all(p.grad is None for p in training.model.parameters())
    assert len(after) >= len(before)
    if num_before:
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    else:  # the optimizer's state was made inside, and is what its first step would make
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False))
        assert len(after) == len(before) + 6 and not any(bool(tensor.any()) for tensor in after[len(before) :])
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), training.model.state_dict().values()))
    training.masks.check_fresh()


def test_steps_after_put_back_are_those_without_it():
    results = []
    for is_warmed_up in (False, True):
        training = Training()
        if is_warmed_up:
            with torch.random.fork_rng(devices=[]), put_back(training.masks, training.optimizer):
                for _ in range(3):
                    training.step()
        torch.manual_seed(5)
        losses = [training.step() for _ in range(6)]
        results.append([*losses, *training.everything()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert float(results[0][-1].abs().max()) > 0


def test_put_back_puts_back_after_an_exception():
    training = Training()
    training.step()
    before = training.everything()
    with pytest.raises(KeyError), put_back(training.masks, training.optimizer):
        training.step()
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(before, training.everything(), strict=True))


def test_what_cannot_be_captured_is_refused_in_words():
    training = Training()
    masks, step, optimizer = training.masks, training.step, training.optimizer
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs all masks on one CUDA device, they are on cpu"):
            CapturedStep(masks, step, optimizer)
    with pytest.raises(ValueError, match=r"not capturable; make it with adamw\(..., capturable=True\)"):
        CapturedStep(masks, step, masks.adamw())
    with pytest.raises(TypeError, match="Adam or AdamW .*got SGD"):
        CapturedStep(masks, step, torch.optim.SGD(masks.scores().values(), 0.1))
    with pytest.raises(TypeError, match="masks must be a MaskSet, got Sequential"):
        CapturedStep(training.model, step, optimizer)
    with pytest.raises(TypeError, match="step must be a function"):
        CapturedStep(masks, 3, optimizer)
    for bad in (0, 1.5):
        with pytest.raises(ValueError, match="num_warmups must be an int >= 1"):
            CapturedStep(masks, step, optimizer, num_warmups=bad)
    with masks.collect_penalty(), pytest.raises(ValueError, match="open collect_penalty"):
        CapturedStep(masks, step, optimizer)
    for block in (masks.hard, masks.disabled):
        with block(), pytest.raises(ValueError, match="hard or disabled"):
            CapturedStep(masks, step, optimizer)
    masks.anneal(to=9, steps=3)
    with pytest.raises(ValueError, match=r"anneal\(..., on_device=True\)"):
        CapturedStep(masks, step, optimizer)
    assert optimizer.state == {}  # nothing ran


class Replayed:
    """Stands for torch.cuda.CUDAGraph: a replay that changes scores as one does, leaving no version."""

    def __init__(self, masks: MaskSet) -> None:
        self.masks, self.count = masks, 0

    def replay(self) -> None:
        self.count += 1
        for scores in self.masks.scores().values():
            scores.data.add_(0.1)


def captured(training: Training) -> CapturedStep:
    """One as its constructor leaves it after a capture."""
    run = object.__new__(CapturedStep)
    run._masks, run._optimizer = training.masks, training.optimizer
    run._written = [training.masks._state.beta, *training.masks.scores().values()]
    run._graph, run._result = Replayed(training.masks), torch.zeros(())
    run._remember([])
    return run


def test_a_call_refuses_a_graph_that_no_longer_fits():
    def load_optimizer(training):
        training.optimizer.load_state_dict(training.optimizer.state_dict())

    changes = [
        (lambda t: t.masks.harden(), "hard or disabled now"),
        (lambda t: t.masks.anneal(to=100, steps=9, every=2, on_device=True), "schedule is another"),
        (lambda t: t.masks.anneal(to=100, steps=9), "schedule is another"),
        (load_optimizer, "state was loaded"),
        (lambda t: t.model.double(), "moved or removed"),
        (lambda t: t.masks.unmask(), "moved or removed"),
    ]
    for change, message in changes:
        training = Training()
        run = captured(training)
        assert run() is run._result and run._graph.count == 1
        change(training)
        with pytest.raises(RuntimeError, match=message):
            run()
        assert run._graph.count == 1
    training = Training()
    run = captured(training)
    state = training.masks.state_dict()
    training.masks.beta = 3.0
    training.masks.load_state_dict(state)  # in place: the graph goes on from there
    run()


def test_a_call_counts_as_a_change_of_scores_for_a_pending_backward_pass():
    training = Training()
    run = captured(training)
    loss = training.model(training.x).sum()
    run()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
