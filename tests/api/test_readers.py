"""Checkpoints of NeuroSurgeon's three mask methods, reproduced to the bit in hard mode; plain masks; hostile files."""

import copy
import pickle
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from subnets import Subnet, mask_model, read_masks, read_neurosurgeon, read_neurosurgeon_scores, transfer
from torch import Tensor, nn

METHODS = ("continuous_sparsification", "hard_concrete", "magnitude_pruning")
PRUNED = 0.7


class ConvNet(nn.Module):
    """A convolution and a linear layer behind the signature that CircuitModel calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 6, 3), nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor, return_dict: bool = True):
        return OrderedDict(logits=self.fc(torch.relu(self.conv(x)).flatten(1)))


def gpt2() -> nn.Module:
    shape = dict(n_layer=2, n_head=2, n_embd=32, n_positions=12, vocab_size=23, initializer_range=0.3)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))


def bert() -> nn.Module:
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=23)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**shape, initializer_range=0.3))


def llama() -> nn.Module:
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=23)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, initializer_range=0.3))


TOKENS = dict(input_ids=torch.arange(24).view(2, 12) % 23)
GPT2_LAYERS = [f"transformer.h.{i}.{layer}" for i in (0, 1) for layer in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")]
CASES = {
    "gpt2": (gpt2, TOKENS, GPT2_LAYERS),
    "bert": (bert, TOKENS, ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.output.dense"]),
    "llama": (llama, TOKENS, ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]),
    "conv": (ConvNet, dict(x=torch.linspace(-1, 1, 144).view(2, 2, 6, 6)), ["conv", "fc"]),
}


def circuit_of(case: str, method: str, unit: str = "weight", mask_bias: bool = False):
    """(their masked model with random masks, the base model, its input, the masked layers)."""
    circuits = pytest.importorskip("NeuroSurgeon.Models", reason="NeuroSurgeon is not installed")
    make, inputs, layers = CASES[case]
    torch.manual_seed(1)
    base = make().eval()
    with torch.no_grad():
        [bias.add_(torch.randn(bias.shape), alpha=0.3) for bias in base.parameters() if bias.ndim == 1]
    settings = {
        "continuous_sparsification": {"mask_unit": unit, "mask_init_value": 0.0},
        "hard_concrete": {"mask_unit": unit, "mask_init_percentage": 0.5},
        "magnitude_pruning": {"prune_percentage": PRUNED},
    }[method]
    settings |= {"ablation": "none", "mask_bias": mask_bias}
    config = circuits.CircuitConfig(method, settings, layers, add_l0=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its temperature is of one method only
        circuit = circuits.CircuitModel(config, copy.deepcopy(base))
    with torch.no_grad():
        for name, parameter in circuit.named_parameters():
            if "mask_params" in name:
                parameter.normal_()
                parameter.view(-1)[:4] = torch.tensor([0.0, 1e-9, -1e-9, 3e-8])  # where rounding decides
    circuit.train(False)
    return circuit, base, inputs, layers


def logits(model: nn.Module, inputs: dict) -> Tensor:
    with torch.no_grad():
        return model(**inputs)["logits"]


def read(state, method: str, layers: list[str], mask_bias: bool = False) -> Subnet:
    by_magnitude = dict(prune_percentage=PRUNED, layers=layers, mask_bias=mask_bias)
    return read_neurosurgeon(state, method, **(by_magnitude if method == "magnitude_pruning" else {}))


@pytest.mark.parametrize("mask_bias", [False, True], ids=["", "biases too"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_the_subnet_computes_what_neurosurgeon_computes_in_hard_mode_to_the_bit(tmp_path, case, method, mask_bias):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these layers have no bias, it says
        circuit, base, inputs, layers = circuit_of(case, method, mask_bias=mask_bias)
    torch.save(circuit.state_dict(), tmp_path / "circuit.pt")
    subnet = read(tmp_path / "circuit.pt", method, layers, mask_bias)
    has_bias = [f"{name}.bias" for name in layers if mask_bias and base.get_submodule(name).bias is not None]
    assert set(subnet.masks) == {*(f"{name}.weight" for name in layers), *has_bias}
    theirs, full = logits(circuit, inputs), logits(base, inputs)
    with subnet.applied(base):
        ours = logits(base, inputs)
    assert torch.equal(ours, theirs) and not torch.equal(ours, full)
    assert subnet.num_kept() == int(circuit.compute_l0_statistics()["total_l0"])
    assert 0.2 < subnet.density() < 0.8 and subnet.provenance == {"method": f"NeuroSurgeon {method}"}
    assert subnet.with_weights(base).base_hash == subnet.base_hash  # the checkpoint's weights are base's


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("case", ["gpt2", "bert", "conv"])
def test_a_neurons_mask_stands_for_all_of_its_weights(case, method):
    circuit, base, inputs, layers = circuit_of(case, method, unit="neuron")
    subnet = read(circuit.state_dict(), method, layers)
    with subnet.applied(base):
        assert torch.equal(logits(base, inputs), logits(circuit, inputs))


@pytest.mark.parametrize("unit", ["weight", "neuron"])
def test_scores_go_on_as_masks_of_ours(unit):
    circuit, base, inputs, layers = circuit_of("bert", METHODS[0], unit)
    scores = read_neurosurgeon_scores(circuit.state_dict())
    masks = mask_model(base, targets=layers, init=scores, unit="row" if unit == "neuron" else unit)
    with masks.hard():
        assert torch.equal(logits(base, inputs), logits(circuit, inputs))
    subnet, expected = masks.subnet(), read_neurosurgeon(circuit.state_dict())
    assert all(torch.equal(subnet.masks[name], mask) for name, mask in expected.masks.items())
    assert expected.with_ranks(scores).top(0.1).num_kept() > 0


def test_a_probe_around_a_circuit_and_files_of_both_kinds_are_read(tmp_path):
    probing = pytest.importorskip("NeuroSurgeon.Probing", reason="NeuroSurgeon is not installed")
    circuit, base, _, layers = circuit_of("gpt2", METHODS[0])
    hooked = probing.ResidualUpdateModel(
        probing.ResidualUpdateModelConfig("gpt", [0], mlp=True, attn=False, updates=True, stream=False), circuit
    )
    outer = nn.ModuleDict({"wrapped_model": hooked, "probe": nn.Linear(2, 2)})
    state = outer.state_dict()
    assert any("to_hook" in name for name in state)
    expected = read(circuit.state_dict(), METHODS[0], layers)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "probe.pt")
    save_file({name: its.clone() for name, its in state.items()}, tmp_path / "probe.safetensors")
    for source in (tmp_path / "probe.pt", tmp_path / "probe.safetensors", state):
        subnet = read_neurosurgeon(source, base=base)
        assert list(subnet.masks) == list(expected.masks) and subnet.base_hash == expected.base_hash
        assert all(torch.equal(subnet.masks[name], mask) for name, mask in expected.masks.items())


def masked_state(*prefixes: str, other: str = "") -> dict[str, Tensor]:
    state = {}
    for prefix in prefixes:
        state |= {f"{prefix}fc.weight": torch.ones(2, 3), f"{prefix}fc.weight_mask_params": torch.eye(2, 3)}
    return state | ({f"{other}weight": torch.ones(1)} if other else {})


@pytest.mark.parametrize(
    ("prefix", "other", "name"),
    [
        ("", "", "fc.weight"),
        ("wrapped_model.", "", "fc.weight"),
        ("root_model.", "", "fc.weight"),
        ("root_model.wrapped_model.", "probe.", "fc.weight"),
        ("model.", "", "fc.weight"),  # all of it lies under model.: somebody's wrapper
        ("model.", "lm_head.", "model.fc.weight"),  # not all: a Llama's own
        ("wrapped_model.model.", "wrapped_model.lm_head.", "model.fc.weight"),
        ("model.wrapped_model.", "", "fc.weight"),
        ("encoder.", "", "encoder.fc.weight"),
    ],
)
def test_names_lose_what_wraps_the_model(prefix, other, name):
    subnet = read_neurosurgeon(masked_state(prefix, other=other))
    assert list(subnet.masks) == [name] and torch.equal(subnet.masks[name], torch.eye(2, 3).bool())


def test_base_decides_where_a_wrapper_ends():
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.ModuleDict({"fc": nn.Linear(3, 2)})

    inner = Inner()
    for prefix in ("model.", "wrapped_model.model.", "model.model."):
        assert list(read_neurosurgeon(masked_state(prefix), base=inner).masks) == ["model.fc.weight"]
    assert list(read_neurosurgeon(masked_state("model."), base=inner.model).masks) == ["fc.weight"]
    with pytest.raises(ValueError, match=r"not those of base: fc.weight; pass its base model"):
        read_neurosurgeon(masked_state(""), base=nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"the subnet does not fit the model; differently shaped: fc.weight"):
        read_neurosurgeon(masked_state(""), base=nn.ModuleDict({"fc": nn.Linear(4, 2)}))


def test_kept_values_of_the_checkpoint_can_be_planted_alone():
    state = {"fc.weight": torch.randn(2, 3), "fc.weight_mask_params": torch.tensor([[1.0, -1, 0], [-1, 1, 1]])}
    subnet = read_neurosurgeon(state, keep_values=True)
    target = nn.ModuleDict({"fc": nn.Linear(3, 2)})
    transfer(subnet, None, target)
    kept = state["fc.weight_mask_params"] > 0
    assert torch.equal(target["fc"].weight[kept], state["fc.weight"][kept]) and int(kept.sum()) == 3
    del state["fc.weight"]
    assert read_neurosurgeon(state).base_hash is None
    with pytest.raises(ValueError, match="keep_values=True needs the weights in the checkpoint"):
        read_neurosurgeon(state, keep_values=True)


@pytest.mark.parametrize(
    ("state", "arguments", "words"),
    [
        ({"fc.weight": torch.ones(2)}, {}, "holds no weight_mask_params, of fc.weight"),
        ({}, {}, "holds no weight_mask_params"),
        ({1: torch.ones(2)}, {}, "must hold a dict of name to tensor, got dict"),
        (masked_state(""), {"method": "lottery"}, "method must be one of"),
        (masked_state(""), {"prune_percentage": 0.5}, "are for magnitude_pruning"),
        (masked_state("") | {"fc.weight": torch.ones(3, 3)}, {}, r"have shape \[2, 3\], its weight \[3, 3\]"),
        (masked_state("") | {"fc.weight_mask_params": torch.full((2, 3), torch.nan)}, {}, "not so: fc.weight"),
        (masked_state("") | {"fc.weight_mask_params": torch.ones(2, 3).int()}, {}, "not so: fc.weight"),
        (masked_state(""), {"method": METHODS[2]}, "holds no masks, they follow from its weights"),
        (masked_state(""), {"method": METHODS[2], "prune_percentage": 2, "layers": ["fc"]}, r"in \[0, 1\], got 2"),
        (masked_state(""), {"method": METHODS[2], "prune_percentage": 0.2, "layers": ["a"]}, "holds no a.weight"),
        (
            {"fc.weight": torch.ones(2, dtype=torch.bfloat16)},
            {"method": METHODS[2], "prune_percentage": 0.2, "layers": ["fc"]},
            "quantile of fc.weight can't be taken",
        ),
    ],
)
def test_what_holds_no_masks_is_refused_in_words(state, arguments, words):
    with pytest.raises(ValueError, match=f"read_neurosurgeon: .*{words}"):
        read_neurosurgeon(state, **arguments)


@pytest.mark.parametrize("quantile", [0.0, 0.3, 1.0])
def test_magnitude_is_of_the_signed_weight_and_one_keeps_nothing(quantile):
    weight = torch.tensor([[-9.0, 2.0, 1.0, 0.5, 3.0]])
    subnet = read_neurosurgeon(
        {"wrapped_model.fc.weight": weight}, METHODS[2], prune_percentage=quantile, layers=["fc"], mask_bias=True
    )
    expected = {0.0: [1, 1, 1, 1, 1], 0.3: [0, 1, 1, 0, 1], 1.0: [0, 0, 0, 0, 0]}[quantile]
    assert subnet.masks["fc.weight"].int().tolist() == [expected] and list(subnet.masks) == ["fc.weight"]


def test_plain_masks_are_read_from_dicts_and_both_kinds_of_files(tmp_path):
    masks = {"a": torch.eye(3).bool(), "b": torch.tensor([True, False])}
    torch.save(masks, tmp_path / "m.pt")
    torch.save(OrderedDict(state_dict={name: nn.Parameter(m.float()) for name, m in masks.items()}), tmp_path / "n.pt")
    save_file(masks, tmp_path / "m.safetensors")
    numbers = {"a": torch.eye(3, dtype=torch.int64), "b": torch.tensor([1.0, 0.0])}
    for source in (masks, numbers, *(tmp_path / name for name in ("m.pt", "n.pt", "m.safetensors"))):
        subnet = read_masks(source)
        assert subnet.masks.keys() == masks.keys()
        assert all(torch.equal(subnet.masks[name], mask) for name, mask in masks.items())
    for bad in (*({"a": torch.tensor([odd])} for odd in (0.5, 2, torch.nan, 1 + 0j)), {}):
        with pytest.raises(ValueError, match="read_masks: every tensor must be a mask of parameter name to 0 or 1"):
            read_masks(bad)


class Runs:
    """What unpickling this would do: make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def rewritten(source: Path, target: Path, change, compression: int = zipfile.ZIP_STORED) -> Path:
    """A copy of an archive of torch.save with its pickle changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, change(data) if entry.filename.endswith("data.pkl") else data)
    return target


def test_no_file_runs_code_or_takes_memory_that_it_does_not_have(tmp_path):
    good, trap = tmp_path / "good.pt", tmp_path / "trap"
    torch.save({"a": torch.zeros(4)}, good)
    hostile = tmp_path / "hostile.pt"
    torch.save({"a": torch.ones(2), "b": Runs(trap)}, hostile)
    plain = tmp_path / "renamed.safetensors"
    plain.write_bytes(pickle.dumps(Runs(trap)))
    renamed = tmp_path / "hostile.safetensors"
    renamed.write_bytes(hostile.read_bytes())
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "expanded.pt")
    torch.save({"a": torch.zeros(10**12, device="meta")}, tmp_path / "meta.pt")
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("hello", "x")
    bytearray_ = b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R."
    deep = b"\x80\x02)\x85q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(90)) + b"."
    cases = {
        hostile: "its pickle names '.*open'", plain: "safetensors", renamed: "its pickle names",
        tmp_path / "expanded.pt": "with memory for all its 1000000000000 entries", tmp_path / "meta.pt": "names",
        tmp_path / "sparse.pt": "names", tmp_path / "list.pt": "must hold a dict of name to tensor, got list",
        tmp_path / "other.zip": "not one of torch.save",
        rewritten(good, tmp_path / "packed.pt", bytes, zipfile.ZIP_DEFLATED): "compressed archive",
        rewritten(good, tmp_path / "huge.pt", lambda data: bytearray_): "its pickle names 'builtins bytearray'",
        rewritten(good, tmp_path / "deep.pt", lambda data: deep): "refers to a tuple twice",
        rewritten(good, tmp_path / "a.pt", lambda data: data.replace(b"K\x04\x85", b"J\0\0\0\x70\x85")): "cannot read",
        rewritten(good, tmp_path / "cut.pt", lambda data: data[:20]): "cannot read",
    }  # fmt: skip
    assert read_masks(good).num_kept() == 0
    for path, words in cases.items():
        for reader in (read_masks, read_neurosurgeon):
            with pytest.raises(ValueError, match=f"{reader.__name__}: .*{words}"):
                reader(path)
    assert not trap.exists()
    with pytest.raises(FileNotFoundError, match="read_masks: there is no file"):
        read_masks(tmp_path / "nowhere")
