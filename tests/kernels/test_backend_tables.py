"""Which backend a call on a GPU asks first: what was measured on that GPU, as data, and the order before that."""

import json

import pytest
import torch

from benchmarks import tune
from benchmarks.cases import LayerCase
from subnet_kernels import dispatch
from subnet_kernels.backends.base import Call
from subnet_kernels.backends.triton import rules

BF16 = torch.bfloat16


@pytest.fixture
def h200(monkeypatch, tmp_path):
    """This machine as one with an H200 whose table lies in a folder of its own."""
    monkeypatch.setattr(rules, "TABLES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    rules.forget()
    dispatch.forget_choices()
    yield rules.table_path("NVIDIA H200")
    rules.forget()
    dispatch.forget_choices()


def first(op, num_weights=0, dtype=BF16, plan=None):
    return dispatch.order_of(Call(op, "cuda", BF16, dtype, "sigmoid", plan, num_weights=num_weights))[0].name


def test_before_any_measurement_passes_go_to_cuda_and_products_to_triton(h200):
    assert {op: first(op) for op in ("effective_weights", "mask_adamw", "add_penalty_grad")} == {
        "effective_weights": "cuda", "mask_adamw": "cuda", "add_penalty_grad": "cuda"
    }  # fmt: skip
    assert first("masked_linear") == first("masked_conv2d") == first("linear_step") == "triton"
    names = [b.name for b in dispatch.order_of(Call("masked_linear", "cuda", BF16, BF16, "sigmoid"))]
    assert names == ["triton", "cuda", "reference"]
    assert [b.name for b in dispatch.order_of(Call("mask_adamw", "cpu", BF16, BF16, "sigmoid"))] == ["cpu", "reference"]


def test_what_was_measured_on_this_gpu_wins_for_its_op_dtype_and_number_of_weights_alone(h200):
    entry = {"dtype": "bfloat16", "num_weights": 1 << 22, "us": {"triton": 1.0, "cuda": 2.0}}
    entries = [{**entry, "op": "mask_adamw", "backend": "triton"}, {**entry, "op": "masked_linear", "backend": "cuda"}]
    h200.write_text(json.dumps({"entries": [], "backends": entries}))
    rules.forget()
    assert first("mask_adamw", 1 << 22) == "triton" and first("mask_adamw", 1 << 21) == "cuda"
    assert first("mask_adamw", 1 << 22, torch.float16) == "cuda" and first("effective_weights", 1 << 22) == "cuda"
    assert first("masked_linear", 1 << 22) == first("masked_linear", 1 << 22, plan="cached") == "cuda"
    # a compiled backward pass does not know which of these two its forward pass had: both find one backend
    assert {first("masked_linear", 1 << 22, plan=plan) for plan in ("fused", "recompute")} == {"triton"}


def test_a_damaged_table_of_backends_is_named(h200):
    h200.write_text(json.dumps({"entries": [], "backends": [{"op": "mask_adamw"}]}))
    rules.forget()
    with pytest.raises(ValueError, match=r"nvidia-h200.json: not a table of backends .* subnets bench --tune"):
        first("mask_adamw", 1 << 22)


def test_tuning_times_every_op_on_each_backend_and_writes_the_faster_one(h200):
    """On the CPU's backends, with times made up: the names are what matters."""
    made_up = {"effective_weights": (3.0, 5.0), "add_penalty_grad": (7.0, 5.0), "masked_linear": (2.0, 9.0)}
    seen, next_times = [], iter(made_up.values())

    def times(functions):
        seen.append(list(functions))
        return dict(zip(functions, next(next_times), strict=True))

    pytest.importorskip("subnet_kernels._C", reason="the extension is not built")
    both = (dispatch.BACKENDS["cpu"], dispatch.BACKENDS["reference"])
    entries = tune.tune_backends(LayerCase((40, 24), (16, 24), "bf16"), "cpu", times, both, lambda text: None)
    assert [e["op"] for e in entries] == list(made_up) and seen == [["cpu", "reference"]] * 3
    assert all(e["num_weights"] == 1024 and e["dtype"] == "bfloat16" for e in entries)
    more = [{**entries[0], "us": {"cpu": 9.0, "reference": 1.0}}]  # another case of the same bucket: 12 against 6 us
    chosen = tune.fastest_backends(entries + more)
    assert [(e["op"], e["backend"]) for e in chosen] == [
        ("effective_weights", "reference"), ("add_penalty_grad", "reference"), ("masked_linear", "cpu")
    ]  # fmt: skip
    env = dict.fromkeys(("device", "torch", "triton", "commit"), "x")
    tune.write_table(h200, [], env, chosen)
    tune.write_table(h200, [], env, [{**chosen[2], "backend": "cuda"}])  # replaces one, keeps the others
    rules.forget()
    assert rules.preferred_backends("NVIDIA H200") == {
        ("effective_weights", "bfloat16", 1024): "reference", ("add_penalty_grad", "bfloat16", 1024): "reference",
        ("masked_linear", "bfloat16", 1024): "cuda",
    }  # fmt: skip
    assert rules.table("NVIDIA H200") == {}
