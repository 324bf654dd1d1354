"""`subnets run vision` end to end, small: files, what is planted, a killed run that ends in the same numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from subnets.experiments.vision import run as pipeline
from subnets.experiments.vision.conditions import CONDITIONS
from subnets.experiments.vision.config import PRESETS, VisionConfig, make_config
from subnets.experiments.vision.data import FolderData, GeneratedData, open_data
from subnets.experiments.vision.stages import base_stage, discovery_stage, replicates
from subnets.experiments.vision.transfers import planned_runs
from subnets.subnet import Subnet
from subnets.training.files import load_tensors, read_csv, read_json

TINY = {
    "width": "4", "image_size": "32", "sizes": "32,64", "transfer_seeds": "1", "base_images": "96", "base_epochs": "2",
    "discovery_images": "96", "discovery_epochs": "3", "discovery_lr": "0.1", "transfer_epochs": "2",
    "conditions": ",".join(CONDITIONS), "num_held_out": "32", "bf16": "false", "subnet_controls": "1",
    "device": "cpu", "workers": "1",
}  # fmt: skip


def tiny(**changes: str) -> VisionConfig:
    return make_config("quick", {**TINY, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision") / "run"
    pipeline.run(tiny(), folder)
    return folder


def test_every_run_has_a_row_with_its_measures(finished: Path):
    rows = read_csv(finished / "results.csv")
    assert [(row["condition"], int(row["num_images"])) for row in rows] == [
        (c, n) for n in (32, 64) for c in CONDITIONS
    ]
    for row in rows:
        assert 0 <= float(row["natural"]) <= 1 and 0 <= float(row["mean_pooled"]) <= 1
        by_shape, by_texture = float(row["shape_decisions"]), float(row["texture_decisions"])
        expected = by_shape / (by_shape + by_texture) if by_shape + by_texture else math.nan
        assert float(row["shape_bias"]) == pytest.approx(expected, abs=2e-6, nan_ok=True)
    stages = {row["stage"] for row in read_csv(finished / "metrics.csv")}
    assert stages == {"base", "discovery", "transfer"}
    assert (finished / "report.html").stat().st_size > 10_000


def test_planted_weights_are_the_bases_to_the_bit_and_samples_are_as_many(finished: Path):
    base, subnet = load_tensors(finished / "base.safetensors")[0], Subnet.load(finished / "subnet.safetensors")
    equal = {}
    for condition in CONDITIONS:
        state = load_tensors(finished / "transfers" / f"{condition}-n64-base0-seed0.safetensors")[0]
        assert all(torch.equal(state[name][mask], base[name][mask]) for name, mask in subnet.masks.items()) == (
            condition == "subnet"
        )
        equal[condition] = [int((state[name] == base[name]).sum()) for name in subnet.masks]
    assert sum(equal["subnet"]) > 100
    assert equal["sampled"] == equal["subnet"] == [int(mask.sum()) for mask in subnet.masks.values()]
    assert equal["random_init"] == equal["full_model"] == [0] * 20


@pytest.mark.parametrize("stage", ["base", "discovery", "transfer of the subnet", "transfer of the sample"])
def test_a_killed_run_goes_on_and_ends_in_the_same_numbers(
    finished: Path, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from subnets.discovery import loop
    from subnets.experiments.vision import classifier_training

    def killed(function, calls: int):
        count = [0]

        def call(*args, **kw):
            count[0] += 1
            function(*args, **kw)
            if count[0] == calls:
                raise KeyboardInterrupt

        return call

    with monkeypatch.context() as broken:
        if stage == "discovery":  # after the checkpoint of its second epoch
            broken.setattr(loop._Run, "epoch", killed(loop._Run.epoch, 2))
        else:  # checkpoints: two of the base, then two of each transfer network: the subnet's first, the sample's first
            calls = {"base": 1, "transfer of the subnet": 3, "transfer of the sample": 7}[stage]
            broken.setattr(classifier_training, "_save", killed(classifier_training._save, calls))
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(tiny(), tmp_path / "run")
    assert list((tmp_path / "run").rglob("*.checkpoint.safetensors"))
    pipeline.run(tiny(), tmp_path / "run")
    drop = ("images_per_second",)
    expected, found = ([{k: v for k, v in row.items() if k not in drop} for row in read_csv(folder / "results.csv")]
                       for folder in (finished, tmp_path / "run"))  # fmt: skip
    assert found == expected
    assert (tmp_path / "run" / "subnet.safetensors").exists()
    ours, theirs = (Subnet.load(folder / "subnet.safetensors").masks for folder in (finished, tmp_path / "run"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_networks_trained_side_by_side_are_those_trained_one_by_one(tmp_path: Path):
    """One thread either way: the same numbers; and the second worker's base and subnet come from files."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        small = {"sizes": "32", "conditions": "subnet,sampled,random_init"}
        for workers in ("1", "2"):
            pipeline.run(tiny(workers=workers, **small), tmp_path / workers)
    finally:
        torch.set_num_threads(threads)
    one, two = (load_tensors(tmp_path / w / "transfers" / "subnet-n32-base0-seed0.safetensors")[0] for w in ("1", "2"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    drop = ("images_per_second",)
    rows = [
        [{k: v for k, v in row.items() if k not in drop} for row in read_csv(tmp_path / w / "results.csv")]
        for w in "12"
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 3


def test_a_finished_run_trains_nothing_again_and_another_config_is_refused(finished: Path):
    files = {path: path.stat().st_mtime_ns for path in (finished / "transfers").iterdir()}
    pipeline.run(tiny(), finished)
    assert files == {path: path.stat().st_mtime_ns for path in (finished / "transfers").iterdir()}
    with pytest.raises(ValueError, match="transfer_lr: 0.002 there, 0.1 now"):
        pipeline.run(tiny(transfer_lr="0.1"), finished)


def test_the_report_of_an_unfinished_run_says_what_is_missing(finished: Path, tmp_path: Path):
    import shutil

    part = tmp_path / "part"
    shutil.copytree(finished, part)
    (part / "transfers" / "subnet-n64-base0-seed0.json").unlink()
    text = pipeline.report(part)
    assert "1 of 12" in text and "missing" in text


def test_replicates_have_networks_of_their_own(tmp_path: Path):
    config = tiny(base_seeds="2", transfer_seeds="2")
    pairs = [(run.base_seed, run.seed) for run in planned_runs(config, (32,)) if run.condition == "subnet"]
    assert pairs == [(0, 0), (0, 1), (1, 1)]
    first, second = replicates(config, GeneratedData(config), tmp_path)
    assert first.config.seed == 0 != second.config.seed
    name = "network.resnet.embedder.embedder.convolution.weight"
    assert not torch.equal(first.model().state_dict()[name], second.model().state_dict()[name])


def test_images_of_different_stages_differ_and_transfer_sizes_are_nested():
    data = GeneratedData(tiny())
    few, many = data.transfer(32, 0).images, data.transfer(64, 0).images
    assert torch.equal(few, many[:32]) and not torch.equal(many[:32], data.transfer(32, 1).images)
    sets = [data.base, data.discovery, data.discovery_held_out, *data.tests.values(), data.transfer(64, 0)]
    seen = [image.numpy().tobytes() for one in sets for image in one.images]
    assert len(set(seen)) == len(seen)


def test_a_vit_goes_the_whole_way(tmp_path: Path):
    config = tiny(architecture="vit", width="8", heads="2", depth="1", sizes="32", conditions="subnet,sampled")
    [replicate] = replicates(config, GeneratedData(config), tmp_path)
    subnet = discovery_stage(replicate, base_stage(replicate))
    assert "network.classifier.weight" in subnet.masks and len(subnet.masks) == 8
    assert read_json(tmp_path / "discovery.json")["density"] == subnet.density()


def conflict_folder(folder: Path, classes: tuple[str, ...], instances: int = 3) -> Path:
    """Small photographs named as Geirhos et al. name theirs: every class with the texture of the next two."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for k, shape in enumerate(classes):
        (folder / shape).mkdir(parents=True)
        for i in range(1, instances + 1):
            for step in range(3):
                texture = f"{classes[(k + step) % 16]}{(i + step) % 3 + 1}"
                pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).resize((48, 48)).save(folder / shape / f"{shape}{i}-{texture}.png")
    return folder


def test_test_photographs_share_no_instance_with_training_photographs(tmp_path: Path):
    pytest.importorskip("skimage", reason="mean pooling of photographs needs scikit-image")
    from subnets.experiments.vision.classes import CLASSES

    conflict = conflict_folder(tmp_path / "images", CLASSES)
    config = make_config("cue-conflict", {**TINY, "conflict": str(conflict), "sizes": ""})
    data = open_data(config, tmp_path / "cache", show=False)
    for fold in range(3):
        one = data.of_replicate(fold)
        names = {
            rows: [Path(one.photographs.images.names[i]).stem.split("-") for i in getattr(one, rows)]
            for rows in ("train_rows", "test_rows")
        }
        assert names["train_rows"] and names["test_rows"]
        for cue in (0, 1):
            train, test = ({parts[cue] for parts in names[rows]} for rows in ("train_rows", "test_rows"))
            assert not train & test
    [smallest] = data.sizes()
    assert smallest == min(len(data.of_replicate(fold).train_rows) for fold in range(3))
    many = make_config("cue-conflict", {**TINY, "conflict": str(conflict), "sizes": "4096"})
    with pytest.raises(ValueError, match=f"sizes must be at most the {smallest} training images"):
        open_data(many, tmp_path / "cache", show=False).sizes()
    labels = data.transfer(10**6, 0)
    texture_shown = labels.shape != data.base.shape
    assert torch.equal(labels.shape[texture_shown], labels.texture[texture_shown]) and 0 < texture_shown.sum()


def test_presets_are_whole_and_contradictions_are_refused(tmp_path: Path):
    assert make_config("quick").source == "generated"
    folder = {"images": str(tmp_path), "conflict": str(tmp_path)}
    published = make_config("imagenet", folder)
    recipe = (published.discovery_lr, published.discovery_batch, published.discovery_epochs, published.lam,
              published.score_init, published.beta_end, published.transfer_lr, published.transfer_batch,
              published.transfer_epochs, published.norms, published.inherit, published.width)  # fmt: skip
    assert recipe == (1e-3, 32, 100, 1e-8, -0.1, 100.0, 1e-3, 128, 20, "frozen", "unmasked", 64)
    for preset in PRESETS:
        config = make_config(
            preset, folder if preset == "imagenet" else {} if preset != "cue-conflict" else {"conflict": str(tmp_path)}
        )
        assert VisionConfig.from_json(config.to_json()) == config
    for changes, message in (
        ({"conditions": "subnet,magic"}, "conditions must be among"), ({"sizes": "8"}, "at least 16 images"),
        ({"inherit": "all"}, "inherit must be one of unmasked, norms, none"), ({"style": "2"}, "style must be in"),
        ({"pooled": str(tmp_path)}, "left out where images is not given"), ({"sizes": ""}, "sizes must be given"),
        ({"norms": "frozen"}, "norms must be 'trained' where inherit is 'none'"), ({"beta_end": "0.5"}, "at least 1"),
        ({"lam": "nan"}, "lam must be finite"), ({"width": "0"}, "width must be at least 1"),
        ({"images": "/nowhere", "conflict": "/nowhere"}, "a folder that exists"),
        ({"images": str(tmp_path)}, "conflict must be"), ({"beta": "2"}, "key must be one of"),
        ({"architecture": "vgg"}, "architecture must be one of resnet18, vit"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make_config("quick", changes)
    with pytest.raises(ValueError, match="preset 'imagenet' needs --set images=FOLDER --set conflict=FOLDER"):
        make_config("imagenet")


def test_folders_of_photographs_go_the_whole_way(tmp_path: Path):
    pytest.importorskip("skimage", reason="mean pooling of photographs needs scikit-image")
    from PIL import Image
    from subnets.experiments.vision.classes import CLASSES

    generator = torch.Generator().manual_seed(0)
    for name in CLASSES:
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).resize((48, 48)).save(tmp_path / "images" / name / f"{i}.png")
    folders = {"images": str(tmp_path / "images"), "conflict": str(conflict_folder(tmp_path / "conflict", CLASSES))}
    config = tiny(**folders, sizes="64", conditions="subnet,random_init")
    data = FolderData(config, tmp_path / "cache", show=False)
    tests, train = set(data.tests["natural"].names), set(data.base.names)
    assert len(train) + len(tests) == 192 and not tests & train
    pooled = {Path(name).with_suffix("") for name in (*data.discovery.names, *data.discovery_held_out.names)}
    assert not pooled & {Path(name).with_suffix("") for name in tests}
    pipeline.run(config, tmp_path / "run")
    assert len(read_csv(tmp_path / "run" / "results.csv")) == 2


def test_a_users_mean_pooled_images_stay_on_the_side_of_their_twins(tmp_path: Path):
    """Fewer of them, so that a split of their own would cut elsewhere."""
    from PIL import Image
    from subnets.experiments.vision.classes import CLASSES

    for name in CLASSES:
        for i in range(20):
            for kind in ("images", "pooled") if i % 3 else ("images",):
                (tmp_path / kind / name).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (48, 48), (i, 2, 3)).save(tmp_path / kind / name / f"{i}.png")
    folders = {kind: str(tmp_path / kind) for kind in ("images", "pooled")}
    config = tiny(**folders, conflict=str(conflict_folder(tmp_path / "conflict", CLASSES)), sizes="64")
    data = FolderData(config, tmp_path / "cache", show=False)
    train, pooled_tests = set(data.base.names), set(data.tests["mean_pooled"].names)
    assert set(data.discovery.names) | set(data.discovery_held_out.names) <= train
    assert pooled_tests and pooled_tests <= set(data.tests["natural"].names)
    Image.new("RGB", (48, 48)).save(tmp_path / "pooled" / "cat" / "stranger.png")
    with pytest.raises(ValueError, match="mean-pooled twins, by class and name(?s:.*)cat/stranger.png"):
        FolderData(config, tmp_path / "cache", show=False)
