"""Slots and captures of CUDA graphs: what is trusted where. Captures are simulated; tests/kernels/test_gpu.py has real
ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from subnets import mask_model
from torch import Tensor, nn

from subnet_kernels import capturing
from subnet_kernels.capturing import capture_scope
from subnet_kernels.ops.effective_weight import effective_weights_raw


@pytest.fixture
def capture(monkeypatch):
    """``with capture():`` a capture of our own tool; ``with capture(is_foreign=True):`` somebody else's."""
    is_capturing = False
    monkeypatch.setattr(capturing, "is_capturing", lambda tensor: is_capturing)

    @contextmanager
    def simulated(is_foreign: bool = False) -> Iterator[list[Tensor] | None]:
        nonlocal is_capturing
        is_capturing = True
        try:
            if is_foreign:
                yield None
            else:
                with capture_scope() as kept:
                    yield kept
        finally:
            is_capturing = False

    return simulated


class Case:
    """A masked layer, its input, the right output now, and damage to what its slot holds: an output of NaN shows that
    the slot was trusted."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 4)
        self.masks = mask_model(self.layer, init=lambda name, weight: torch.randn(weight.shape))
        self.x = torch.randn(3, 5)

    def damage(self) -> None:
        with torch.no_grad():
            self.layer._slot.w_eff.fill_(float("nan"))

    def trusts(self, run=None) -> bool:
        """Whether the next use takes what the slot holds; else it gives the right output."""
        if self.layer._slot.w_eff is not None:
            self.damage()
        out = (self.layer if run is None else run)(self.x)
        if bool(out.isnan().all()):
            return True
        w_eff = self.layer.weight * torch.sigmoid(self.layer.beta * self.layer.scores)
        assert torch.allclose(out, torch.nn.functional.linear(self.x, w_eff, self.layer.bias), atol=1e-6)
        return False

    def replay(self) -> None:
        """What a replay does: scores change, version counters do not."""
        self.layer.scores.data.neg_()


def test_without_captures_a_slot_is_trusted_even_after_a_write_that_leaves_no_trace():
    case = Case()
    assert not case.trusts() and case.trusts()
    case.masks.refresh()
    case.replay()
    with pytest.raises(RuntimeError, match="stale effective weights in weight"):
        case.masks.check_fresh()


def test_in_our_capture_only_what_was_made_in_it_is_trusted_in_memory_of_its_own(capture):
    case = Case()
    case.layer(case.x)
    outside = case.layer._slot.w_eff
    for _ in range(2):  # nor does a second graph trust the first one
        with capture():
            assert not case.trusts()
            inside = case.layer._slot.w_eff
            assert inside.data_ptr() != outside.data_ptr()
            assert case.trusts() and case.layer._slot.w_eff is inside
            case.masks.step()  # no schedule: nothing
            with torch.no_grad():
                case.layer.scores.mul_(0.5)
            assert not case.trusts() and case.layer._slot.w_eff is inside
        outside = inside


def test_in_a_foreign_capture_every_use_refreshes_in_new_memory(capture):
    case = Case()
    case.layer(case.x)
    buffers = [case.layer._slot.w_eff]
    with capture(is_foreign=True):
        for _ in range(3):
            assert not case.trusts()
            buffers.append(case.layer._slot.w_eff)
        case.masks.refresh()
        assert not case.trusts()
    assert len({buffer.data_ptr() for buffer in buffers}) == 4


@pytest.mark.parametrize("is_foreign", [False, True])
def test_after_a_capture_every_use_outside_refreshes_since_replays_leave_no_trace(capture, is_foreign):
    case = Case()
    case.layer(case.x)
    with capture(is_foreign):
        case.layer(case.x)
        inside = case.layer._slot.w_eff
    for _ in range(2):
        assert not case.trusts() and not case.trusts()
        assert case.layer._slot.w_eff.data_ptr() != inside.data_ptr()  # the graph's memory is not written
        case.masks.refresh()
        case.replay()
        case.masks.check_fresh()
    case.layer.cuda() if torch.cuda.is_available() else case.layer.cpu()
    case.x = case.x.to(case.layer.weight.device)
    assert not case.trusts() and not case.trusts()


@pytest.mark.parametrize("what", ["adamw", "sgd", "schedule"])
def test_a_captured_optimizer_or_schedule_alone_ends_trust_outside(capture, what):
    case = Case()
    case.masks.anneal(to=4, steps=3, on_device=True)
    scores = list(case.masks.scores().values())
    make = {"adamw": lambda: case.masks.adamw(lam=0.1), "sgd": lambda: torch.optim.SGD(scores, 0.1)}
    step = case.masks.step if what == "schedule" else make[what]().step
    case.layer(case.x)
    assert case.trusts()
    with capture(is_foreign=True):
        step()
    assert not case.trusts() and not case.trusts()


def test_refresh_in_a_capture_fills_every_slot_once_for_all_uses_at_the_warm_ups_addresses(capture, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 5))
    masks = mask_model(model)
    addresses = []

    def raw(weights, scores, beta, kind, dtype, out, backend):
        addresses.append([tensor.data_ptr() for tensor in (*weights, *scores, *out)])
        return effective_weights_raw(weights, scores, beta, kind, dtype, out, backend)

    monkeypatch.setattr("subnets.masking.effective_weights_raw", raw)
    x, slots = torch.randn(3, 5), [model[0]._slot, model[2]._slot]
    masks.refresh()
    with capture_scope() as kept:
        for _ in range(2):
            masks.refresh()
            model(x).sum().backward()
        with capture(is_foreign=True):  # which it is not, inside the scope
            masks.refresh()
            made = [(slot.w_eff.data_ptr(), slot.w_eff._version, slot.penalty._version) for slot in slots]
            for _ in range(3):
                model(x).sum().backward()
            assert [(slot.w_eff.data_ptr(), slot.w_eff._version, slot.penalty._version) for slot in slots] == made
        assert all(any(tensor is slot.w_eff for tensor in kept) for slot in slots)
    outside, *inside = addresses
    assert inside == [inside[0]] * 3 and inside[0] != outside  # the table of the warm-up serves the capture
    with capture():
        masks.refresh()
        made = [(slot.w_eff.data_ptr(), slot.w_eff._version, slot.penalty._version) for slot in slots]
        for _ in range(3):
            model(x).sum().backward()
        assert [(slot.w_eff.data_ptr(), slot.w_eff._version, slot.penalty._version) for slot in slots] == made
        assert slots[0].penalty.item() == pytest.approx(30 * torch.sigmoid(torch.tensor(-0.1)).item())
    monkeypatch.setattr("subnets.masking.effective_weights_raw", None)  # its table of addresses would be copied
    with capture(is_foreign=True):
        masks.refresh()


def test_a_compiled_graph_follows_the_same_rules(capture):
    torch._dynamo.reset()
    case = Case()
    case.layer(case.x)  # buffers for the graph
    compiled = torch.compile(case.layer, backend="aot_eager")
    assert case.trusts(compiled) and case.trusts(compiled)
    with capture() as kept:
        assert not case.trusts(compiled) and case.trusts(compiled)
        assert any(tensor is case.layer._slot.w_eff for tensor in kept)  # from outside: lives as long as the graph
    with capture(is_foreign=True):
        assert not case.trusts(compiled) and not case.trusts(compiled)
    assert not case.trusts(compiled) and not case.trusts(compiled)


def test_a_copy_of_a_captured_layer_is_trusted_as_any_other(capture):
    import copy

    case = Case()
    with capture():
        case.layer(case.x)
    case.layer = copy.deepcopy(case.layer)
    assert not case.trusts() and case.trusts()


def test_scopes_have_numbers_of_their_own_end_with_an_exception_and_do_not_nest(capture):
    x = torch.zeros(1)
    seen = [capturing.capture_number(x)]
    for _ in range(2):
        with pytest.raises(KeyError), capture():
            seen.append(capturing.capture_number(x))
            raise KeyError
    with capture(is_foreign=True):
        seen.append(capturing.capture_number(x))
    with capture_scope():
        seen.append(capturing.capture_number(x))  # nothing is captured yet
        with pytest.raises(RuntimeError, match="entered twice"), capture_scope():
            pass
    assert seen[0] == seen[4] == 0 and seen[3] == capturing.FOREIGN
    assert seen[1] > 0 and seen[2] > 0 and seen[1] != seen[2]
