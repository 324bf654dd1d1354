"""The file of a subnet: what it holds, and that nothing damaged is ever loaded."""

import base64
import json
import os
import random
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from subnets import subnet_file
from subnets.subnet import Subnet
from subnets.subnet_file import weights_hash
from torch import nn

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).to(dtype)


def make_subnet() -> Subnet:
    generator = torch.Generator().manual_seed(1)
    masks = {"1.weight": torch.rand(3, 5, generator=generator) < 0.5, "0.weight": torch.rand(5, 7) < 0.3}
    return Subnet(masks, {"task": "ab mod 7", "seed": 3, "lam": 1e-7, "note": "ä"})


def contents(path) -> tuple[dict, dict]:
    with safe_open(str(path), "pt") as file:
        return dict(file.metadata()), {name: file.get_tensor(name).clone() for name in list(file.keys())}


def same(a: Subnet, b: Subnet) -> bool:
    if list(a.masks) != list(b.masks) or a.provenance != b.provenance or a.base_hash != b.base_hash:
        return False
    if (a.weights is None) != (b.weights is None):
        return False
    tensors = [(a.masks[name], b.masks[name]) for name in a.masks]
    tensors += [(a.weights[name], b.weights[name]) for name in a.weights or ()]
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in tensors)


def test_a_file_is_one_packed_tensor_per_name_with_shapes_and_provenance(tmp_path):
    subnet = make_subnet()
    subnet.save(tmp_path / "s.safetensors")
    metadata, tensors = contents(tmp_path / "s.safetensors")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "0.weight": (torch.uint8, (5,)),
        "1.weight": (torch.uint8, (2,)),
    }
    bit = [int(byte) >> i & 1 for byte in tensors["1.weight"] for i in range(8)]
    assert bit == [*subnet.masks["1.weight"].flatten().int().tolist(), 0]
    assert json.loads(metadata["shapes"]) == {"1.weight": [3, 5], "0.weight": [5, 7]}
    assert json.loads(metadata["provenance"]) == subnet.provenance
    assert metadata["format_version"] == "1" and metadata["base_hash"] == ""
    assert same(Subnet.load(tmp_path / "s.safetensors"), subnet)


@pytest.mark.parametrize("dtype", DTYPES)
def test_saving_with_weights_keeps_only_the_kept_values_in_c_order_and_dtype(tmp_path, dtype):
    net, subnet, path = make_net(dtype), make_subnet(), tmp_path / "s.safetensors"
    subnet.save(path, weights=net)
    _, tensors = contents(path)
    for name, mask in subnet.masks.items():
        kept = [w for w, m in zip(net.get_parameter(name).flatten(), mask.flatten(), strict=True) if m]
        assert tensors[f"values:{name}"].dtype == dtype and torch.equal(tensors[f"values:{name}"], torch.stack(kept))
    loaded = Subnet.load(path)
    assert loaded.base_hash == weights_hash({"0.weight": net[0].weight, "1.weight": net[1].weight})
    assert same(loaded, subnet.with_weights(net)) and subnet.weights is None
    loaded.save(tmp_path / "again.safetensors")  # the values it carries are written again
    assert same(Subnet.load(tmp_path / "again.safetensors"), loaded)


def test_the_hash_sees_every_bit_name_and_dtype_but_not_strides():
    weight = torch.randn(4, 6)
    base = weights_hash({"a": weight})
    assert weights_hash({"a": weight.t().contiguous().t()}) == base
    assert weights_hash({"b": weight}) != base and weights_hash({"a": weight.view(6, 4)}) != base
    assert weights_hash({"a": weight.view(torch.int32)}) != base
    changed = weight.clone()
    changed.view(torch.int32)[3, 5] ^= 1
    assert weights_hash({"a": changed}) != base
    assert weights_hash({"a": weight, "b": changed}) == weights_hash({"b": changed, "a": weight})


WRITTEN_BY_VERSION_1 = (  # of {"weight": [[1, 0, 1], [0, 0, 1]]} over [[1., 2, 3], [4, 5, 6]], before ranks existed
    "sAEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJwcm92ZW5hbmNlIjoie1widGFza1wiOiBcInRcIiwgXCJzZWVkXCI6IDN9IiwiZm9y"
    "bWF0X3ZlcnNpb24iOiIxIiwiY2hlY2tzdW0iOiJkZmJjYzkyNWJmZTMxM2IzNDRmN2M3YjgzYTdmNDM4MGJkM2NiOTBjYTRlOGVk"
    "YzllZjM5NmRlYTlkOWIzYTExIiwiZm9ybWF0Ijoic3VibmV0cy5TdWJuZXQiLCJzaGFwZXMiOiJ7XCJ3ZWlnaHRcIjogWzIsIDNd"
    "fSIsImJhc2VfaGFzaCI6IjgxOTlkY2UyMDFkYjFmYzJhNjk0ZmUzOWEwY2IyY2VmODg1NmRiMjNiMTNkMzEwMzlkYTdhNmEyM2I1"
    "MTg0ZjYifSwidmFsdWVzOndlaWdodCI6eyJkdHlwZSI6IkYzMiIsInNoYXBlIjpbM10sImRhdGFfb2Zmc2V0cyI6WzAsMTJdfSwi"
    "d2VpZ2h0Ijp7ImR0eXBlIjoiVTgiLCJzaGFwZSI6WzFdLCJkYXRhX29mZnNldHMiOlsxMiwxM119fSAgICAgICAAAIA/AABAQAAA"
    "wEAl"
)


def test_a_file_of_the_first_version_loads(tmp_path):
    (tmp_path / "s").write_bytes(base64.b64decode(WRITTEN_BY_VERSION_1))
    loaded = Subnet.load(tmp_path / "s")
    assert loaded.masks["weight"].int().tolist() == [[1, 0, 1], [0, 0, 1]] and loaded.ranks is None
    assert loaded.weights["weight"].tolist() == [1, 3, 6] and loaded.provenance == {"task": "t", "seed": 3}
    assert loaded.base_hash == weights_hash({"weight": torch.tensor([[1.0, 2, 3], [4, 5, 6]])})


def test_saving_with_another_network_than_remembered_is_refused(tmp_path):
    net, path = make_net(), tmp_path / "s.safetensors"
    subnet = make_subnet().with_weights(net)
    other = make_net()
    with torch.no_grad():
        other[0].weight.add_(1)
    with pytest.raises(ValueError, match="must be the network that the subnet was found in"):
        subnet.save(path, weights=other)
    with pytest.raises(ValueError, match=r"does not fit the model; missing from the model: 1.weight"):
        make_subnet().save(path, weights=nn.Sequential(nn.Linear(7, 5)))
    with torch.no_grad():
        net[0].weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"must be finite.*: 0.weight"):
        make_subnet().save(path, weights=net)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    make_subnet().save(path)
    before = path.read_bytes()

    def half(file):
        os.ftruncate(file, 40)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", half)
        (~make_subnet()).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_saved_file_has_the_permissions_of_an_ordinary_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    make_subnet().save(tmp_path / "s")
    assert stat.S_IMODE(os.stat(tmp_path / "s").st_mode) == stat.S_IMODE(os.stat(tmp_path / "plain").st_mode)


def test_no_truncated_file_loads(tmp_path):
    path = tmp_path / "s.safetensors"
    make_subnet().save(path, weights=make_net())
    data = path.read_bytes()
    for length in [*range(0, 40), *range(40, len(data), 17), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"Subnet.load: cannot load .*s.safetensors: "):
            Subnet.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="Subnet.load: cannot load"):
        Subnet.load(path)


def test_no_file_with_a_flipped_bit_loads_as_something_else(tmp_path):
    path = tmp_path / "s.safetensors"
    subnet = make_subnet().with_weights(make_net())
    subnet.save(path)
    data = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = Subnet.load(path)
        except ValueError as error:
            assert "cannot load" in str(error) and "\n" not in str(error)
            refused += 1
        else:  # bytes without meaning, such as blanks in the header
            assert same(loaded, subnet)
    assert refused > 0.97 * len(data)


def test_random_bytes_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "foreign"
    rng = random.Random(1)
    for length in (0, 1, 8, 9, 100, 1000):
        path.write_bytes(rng.randbytes(length))
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            Subnet.load(path)
    path.write_bytes((12).to_bytes(8, "little") + b"[1, 2, 3, 4]")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Subnet.load(path)
    for metadata in (None, {"format": "pt"}):
        save_file({"0.weight": torch.zeros(3)}, str(path), metadata)
        with pytest.raises(ValueError, match="safetensors file of something else; pass a file written by Subnet.save"):
            Subnet.load(path)
    with pytest.raises(FileNotFoundError, match=r"Subnet.load: there is no file"):
        Subnet.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"it is a folder; Subnet.from_pretrained reads one"):
        Subnet.load(tmp_path)


def forge(path, change) -> None:
    """Write a file whose checksum is right and whose contents `change` has altered."""
    make_subnet().save(path, weights=make_net())
    metadata, tensors = contents(path)
    change(metadata, tensors)
    metadata["checksum"] = subnet_file._checksum(metadata, tensors)
    save_file(tensors, str(path), metadata)


def set_padding_bit(metadata, tensors):
    tensors["1.weight"][-1] |= 128


FORGERIES = {
    "another version": (lambda m, t: m.update(format_version="3"), "version is '3', this version reads '1' and '2'"),
    "padding bit": (set_padding_bit, "padding bits"),
    "other shape": (lambda m, t: m.update(shapes='{"1.weight": [4, 5], "0.weight": [5, 7]}'), r"shape \[3\]"),
    "negative shape": (lambda m, t: m.update(shapes='{"1.weight": [-3, -5], "0.weight": [5, 7]}'), "non-negative"),
    "shapes of something": (lambda m, t: m.update(shapes="[1, 2]"), "contradict"),
    "shapes cut": (lambda m, t: m.update(shapes='{"1.weight":'), "contradict"),
    "a mask missing": (lambda m, t: t.pop("0.weight"), "contradict"),
    "values missing": (lambda m, t: t.pop("values:0.weight"), "other parameters than masks"),
    "a tensor too many": (lambda m, t: t.update(extra=torch.zeros(1)), "other parameters than masks"),
    "too few values": (
        lambda m, t: t.update({"values:0.weight": t["values:0.weight"][1:].clone()}),
        "floating-point numbers in one dimension",
    ),
    "a mask of floats": (lambda m, t: t.update({"0.weight": torch.zeros(5)}), "uint8"),
    "an unknown entry": (lambda m, t: m.update(more="x"), "checksum"),
    "no provenance": (lambda m, t: m.pop("provenance"), "checksum"),
    "a list as provenance": (lambda m, t: m.update(provenance="[]"), "contradict"),
    "no masks at all": (lambda m, t: (m.update(shapes="{}"), t.clear()), "contradict"),
}


@pytest.mark.parametrize(("change", "words"), FORGERIES.values(), ids=FORGERIES.keys())
def test_contents_that_contradict_each_other_are_refused_despite_a_right_checksum(tmp_path, change, words):
    path = tmp_path / "s.safetensors"
    forge(path, change)
    with pytest.raises(ValueError, match=words):
        Subnet.load(path)


def test_a_name_that_the_file_keeps_for_values_is_refused_when_it_clashes(tmp_path):
    mask = torch.ones(2, dtype=torch.bool)
    subnet = Subnet({"a": mask, "values:a": mask}, weights={"a": torch.ones(2), "values:a": torch.ones(2)})
    with pytest.raises(ValueError, match="no parameter may be named 'values:...' or 'ranks:...'"):
        subnet.save(tmp_path / "s")


def test_a_checkpoint_of_another_library_is_sent_to_its_reader(tmp_path):
    torch.save({"0.weight": torch.ones(2, 2, dtype=torch.bool)}, tmp_path / "masks.pt")
    with pytest.raises(ValueError, match="damaged, cut or foreign; other people's checkpoints are read by read_neuro"):
        Subnet.load(tmp_path / "masks.pt")
