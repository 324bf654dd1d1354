"""Thousands of damaged and hostile files: each is refused with ValueError or loaded as what was saved, nothing else is
raised, no code is run, and none takes time or memory."""

import json
import pickle
import random
import signal
import struct
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from subnets import Subnet, read_masks, read_neurosurgeon, subnet_file
from torch import nn

resource = pytest.importorskip("resource", reason="memory can't be limited here")
STATM = Path("/proc/self/statm")
pytestmark = pytest.mark.skipif(not STATM.exists(), reason="memory in use can't be read here")
SLOWEST = 10.0  # seconds; a load takes about a millisecond, and the machine may be busy
TRAP = Path("trap")


class Runs:
    def __reduce__(self):
        return (open, (str(TRAP), "w"))


@pytest.fixture(autouse=True)
def limits(tmp_path, monkeypatch) -> Iterator[None]:
    """256 MiB more than now, two minutes, and a folder in which a trap would show."""
    monkeypatch.chdir(tmp_path)
    in_use = int(STATM.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def give_up(*_) -> None:
        raise RuntimeError("a file hangs")

    handler = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(120)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 256 * 2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    assert not TRAP.exists()


def originals() -> list[Subnet]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 7))
    scores = {name: torch.randn(p.shape) for name, p in net.named_parameters()}
    masks = {name: s > 0 for name, s in scores.items()}
    plain = Subnet(masks, {"task": "ab mod 7", "lam": 1e-7, "of": [{"note": "ä"}]})
    return [plain, plain.with_weights(net.double()), plain.with_ranks(scores).with_weights(net.bfloat16())]


def same(a: Subnet, b: Subnet) -> bool:
    facts = [(list(s.masks), s.provenance, s.base_hash, s.weights is None, s.ranks is None) for s in (a, b)]
    if facts[0] != facts[1]:
        return False
    pairs = [(x, y) for what in ("masks", "weights", "ranks") for x, y in zip(*(  # of each parameter
        (getattr(s, what) or {}).values() for s in (a, b)), strict=True)]  # fmt: skip
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


# --- mutations: (random numbers, bytes of the file, bytes of another) -> bytes


def places(rng: random.Random, data: bytes, longest: int = 40) -> slice:
    start = rng.randrange(len(data))
    return slice(start, start + rng.randrange(1, longest))


def flip(rng, data, other) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def overwrite(rng, data, other) -> bytes:
    where = places(rng, data)
    return data[: where.start] + rng.randbytes(where.stop - where.start) + data[where.stop :]


def cut(rng, data, other) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(rng, data, other) -> bytes:
    at = rng.choice((0, 8, len(data), rng.randrange(len(data))))
    return data[:at] + rng.choice((rng.randbytes(rng.randrange(1, 30)), b"\0" * 8, other)) + data[at:]


def delete(rng, data, other) -> bytes:
    where = places(rng, data)
    return data[: where.start] + data[where.stop :]


def repeat(rng, data, other) -> bytes:
    where = places(rng, data)
    return data[: where.stop] + data[where] * rng.choice((1, 2, 50)) + data[where.stop :]


def splice(rng, data, other) -> bytes:
    at = rng.randrange(min(len(data), len(other)))
    return data[:at] + other[at:]


def length_of_header(rng, data, other) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    lengths = (0, 1, size - 1, size + 1, size * 2, len(data), 10**8, 2**31, 2**63, 2**64 - 1, rng.getrandbits(64))
    return struct.pack("<Q", rng.choice(lengths)) + data[8:]


def renamed_pickle(rng, data, other) -> bytes:
    return rng.choice((b"", data[:8])) + pickle.dumps(Runs(), rng.randrange(6)) + rng.choice((b"", data))


HUGE = (0, 1, -1, 2**31, 2**62, 2**63, 2**64, 10**30, 1.5, "3", None, [], True)
NAMES = (
    "", "../../../etc/passwd", "/dev/zero", "__metadata__", "values:0.weight", "ranks:", "\0", "a\nb", "é\u202e",
    "x" * 50_000,
)  # fmt: skip
TEXTS = (
    "", "{}", "[]", "null", "[" * 100_000, '{"a":' * 50_000, "9" * 10_000, '{"0.weight": [1e999]}', "NaN", "\ud83d", "2"
)  # fmt: skip


def header(rng, data, other) -> bytes:
    """An edit of the header's JSON that leaves it JSON, with the right length in front."""
    size = struct.unpack("<Q", data[:8])[0]
    head, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in head if name != "__metadata__"]
    name, another = rng.choice(names), rng.choice(names)
    match rng.randrange(11):
        case 0:
            head[name]["dtype"] = rng.choice(("F64", "F32", "F8_E4M3", "F4", "BOOL", "I64", "C64", "U4", "", 3, None))
        case 1:
            head[name]["shape"] = [rng.choice(HUGE) for _ in range(rng.randrange(4))]
        case 2:
            head[name]["data_offsets"] = [rng.choice((*HUGE, rng.randrange(99))) for _ in range(rng.randrange(1, 4))]
        case 3:
            head[name], head[another] = head[another], head[name]
        case 4:
            head[name]["data_offsets"] = head[another]["data_offsets"]
        case 5:
            del head[name]
        case 6:
            head[rng.choice(NAMES)] = head.pop(name)
        case 7:
            del head["__metadata__"][rng.choice(list(head["__metadata__"]))]
        case 8:
            head["__metadata__"][rng.choice((*head["__metadata__"], *NAMES))] = rng.choice((*TEXTS, 3, None, {}))
        case 9:
            head["__metadata__"] = rng.choice(({}, [], None, "x", {"format": "subnets.Subnet"}))
        case _:
            head = rng.choice(([], 3, {}, {"a": {}}, {"__metadata__": head["__metadata__"]}, [[[[head]]]]))
    text = json.dumps(head).replace("\\ud83d", rng.choice(("\\ud83d", "x"))).encode()
    if rng.random() < 0.1:
        text = rng.choice((text * 2, b"[" * 200_000, text + b" " * 64, text.replace(b'"', b"'"), b"\xff" + text))
    return struct.pack("<Q", len(text)) + text + rest


MUTATIONS = (flip, overwrite, cut, insert, delete, repeat, splice, length_of_header, renamed_pickle, *(header,) * 5)


def load(read: Callable[[Path], Subnet], path: Path, words: str) -> Subnet | None:
    """What a file gives, or None if it is refused as it should be."""
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torch meets in a broken pickle
            return read(path)
    except ValueError as error:
        message = str(error)
        assert message.startswith(words) and "\n" not in message and len(message) < 1500, message[:2000]
        assert "allocate" not in message and "memory" not in message.lower().replace("with memory for", ""), message
        return None
    finally:
        assert time.perf_counter() - began < SLOWEST


@pytest.mark.parametrize("reader", ["load", "from_pretrained"])
def test_a_mutated_subnet_file_is_refused_or_loaded_as_it_was(tmp_path, reader):
    path, subnets = tmp_path / "subnet.safetensors", originals()
    files = []
    for subnet in subnets:
        subnet.save(path)
        files.append(path.read_bytes())
    where, count = (path, 2400) if reader == "load" else (tmp_path, 300)
    refused = intact = 0
    for seed in range(count):
        rng = random.Random(f"{reader} {seed}")
        which = rng.randrange(len(files))
        mutated = rng.choice(MUTATIONS)(rng, files[which], rng.choice(files))
        path.write_bytes(mutated)
        loaded = load(lambda _: getattr(Subnet, reader)(where), path, f"Subnet.load: cannot load {path}: ")
        if loaded is None:
            refused += 1
        else:
            intact += 1
            assert any(same(loaded, subnet) for subnet in subnets), seed  # a splice may give another one back whole
    print(f"\n{reader}: {count} files, {refused} refused, {intact} loaded as they were")
    assert refused + intact == count and refused > 0.9 * count


def forged(rng: random.Random, metadata: dict, tensors: dict) -> None:
    """An edit of what the checksum covers, which is made right afterwards."""
    names = list(tensors)
    name, another = rng.choice(names), rng.choice(names)
    sizes = json.dumps({n: [rng.choice(HUGE[:8]) for _ in range(rng.randrange(4))] for n in ("0.weight", *NAMES[:3])})
    shapes = json.loads(metadata["shapes"])
    match rng.randrange(9):
        case 0:
            metadata["shapes"] = rng.choice((*TEXTS, sizes))
        case 1:
            shapes[rng.choice((*shapes, *NAMES))] = [rng.choice(HUGE) for _ in range(rng.randrange(4))]
            metadata["shapes"] = json.dumps(shapes)
        case 2:
            metadata["provenance"] = rng.choice((*TEXTS, '{"a": ' + "[" * 900 + "]" * 900 + "}", '{"a": Infinity}'))
        case 3:
            tensors[name], tensors[another] = tensors[another], tensors[name]
        case 4:
            tensors[name] = tensors[name].view(torch.uint8)
        case 5:
            odd = (torch.zeros(0), torch.zeros(()), torch.zeros(3, 3), torch.full((5,), torch.nan))
            tensors[name] = rng.choice(odd)
        case 6:
            tensors[rng.choice(NAMES[:8]).replace("\0", "") + name] = torch.zeros(2, dtype=torch.uint8)
        case 7:
            del tensors[name]
        case _:
            metadata[rng.choice(("base_hash", "format_version"))] = rng.choice(("1", "2", "", "x" * 1000))


def test_a_forged_file_with_a_right_checksum_is_refused_or_whole(tmp_path):
    path, subnets = tmp_path / "s", originals()
    refused = whole = 0
    for seed in range(600):
        rng = random.Random(seed)
        subnets[seed % 3].save(path)
        with safe_open(path, "pt") as file:
            metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name).clone() for name in file.keys()}
        forged(rng, metadata, tensors)
        metadata = {name: text.encode(errors="replace").decode() for name, text in metadata.items()}
        metadata["checksum"] = subnet_file._checksum(metadata, tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
        loaded = load(Subnet.load, path, f"Subnet.load: cannot load {path}: ")
        if loaded is None:
            refused += 1
            continue
        whole += 1
        loaded.save(path)
        assert same(Subnet.load(path), loaded)
        assert all(len(values) == int(loaded.masks[name].sum()) for name, values in (loaded.weights or {}).items())
    print(f"\n600 forgeries, {refused} refused, {whole} loaded whole")
    assert refused > 300 and whole > 30


def checkpoint() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weights = {"wrapped_model.fc.weight": torch.randn(5, 7), "wrapped_model.fc.bias": torch.randn(5)}
    return weights | {"wrapped_model.fc.weight_mask_params": torch.randn(5, 1)}


def in_the_pickle(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """An archive of torch.save that is whole but for its pickle."""
    path, again = Path("old.zip"), Path("new.zip")
    path.write_bytes(data)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = rng.choice((flip, flip, flip, overwrite, cut, insert, delete, repeat))(rng, content, content)
            elif rng.random() < 0.1:
                content = rng.choice((b"", content * 2, content[:-1]))
            new.writestr(entry.filename, content)
    return again.read_bytes()


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("read", [read_masks, read_neurosurgeon], ids=lambda read: read.__name__)
def test_a_mutated_file_of_somebody_elses_is_refused_or_a_subnet(tmp_path, read, kind):
    masks = {"a": torch.eye(5).bool(), "b.c": torch.ones(9, 3)}
    contents, path, other = masks if read is read_masks else checkpoint(), tmp_path / "file", tmp_path / "other"
    for name, its in ((path, contents), (other, {"b": torch.ones(3)})):
        torch.save(its, name) if kind == "torch" else save_file(its, name, {"x": "1", "shapes": "2"})
    data, another = path.read_bytes(), other.read_bytes()
    assert read(path).num_kept() > 0
    mutations = [m for m in MUTATIONS if m is not header] + [header if kind == "safetensors" else in_the_pickle] * 8
    loaded = 0
    for seed in range(500):
        rng = random.Random(f"{read.__name__} {kind} {seed}")
        path.write_bytes(rng.choice(mutations)(rng, data, another))
        subnet = load(read, path, f"{read.__name__}: ")
        if subnet is not None:
            loaded += 1
            assert sum(mask.numel() for mask in subnet.masks.values()) < 10_000
    print(f"\n{read.__name__} {kind}: 500 files, {500 - loaded} refused, {loaded} loaded")
    assert 20 < loaded < 400
