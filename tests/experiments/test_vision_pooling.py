"""Mean pooling: exact colours against a plain loop, segments from masks and from scikit-image, folders of images."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from subnets.experiments.vision import pooling
from subnets.experiments.vision.classes import CLASSES
from subnets.experiments.vision.folders import list_class_folders, split
from subnets.experiments.vision.pooling import mean_pool, pool_folder, segment, segments_from_masks
from torch import Tensor


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def plainly_pooled(image: Tensor, segments: Tensor) -> Tensor:
    """One image, one segment at a time, in fp64; halves up."""
    out = torch.zeros(image.shape, dtype=torch.float64)
    for number in segments.unique():
        where = segments == number
        out[:, where] = (image[:, where].double().mean(1, keepdim=True) + 0.5).floor()
    return out.to(torch.uint8)


def read(path: Path) -> Tensor:
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def save(path: Path, pixels: Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(path)
    return path


def two_halves(height: int, width: int) -> Tensor:
    """Left half around (200, 40, 40), right half around (30, 60, 190), with a texture of +-6."""
    pixels = torch.empty(3, height, width)
    pixels[:, :, : width // 2] = torch.tensor([200.0, 40, 40])[:, None, None]
    pixels[:, :, width // 2 :] = torch.tensor([30.0, 60, 190])[:, None, None]
    noise = torch.randint(-6, 7, (1, height, width), generator=torch.Generator().manual_seed(height))
    return (pixels + noise).to(torch.uint8)


# pixels


@pytest.mark.parametrize("numbers", [(0, 7), (-3, 2), (10**12, 10**12 + 5)], ids=["from 0", "negative", "far"])
def test_mean_pool_paints_what_a_plain_loop_paints(numbers: tuple[int, int]) -> None:
    images = random_images(4, 3, 31, 37)
    segments = torch.randint(*numbers, (4, 31, 37), generator=torch.Generator().manual_seed(1))
    expected = torch.stack([plainly_pooled(image, labels) for image, labels in zip(images, segments)])
    assert torch.equal(mean_pool(images, segments), expected)
    assert torch.equal(mean_pool(images[2], segments[2]), expected[2])
    far = segments.clone()
    far[far == numbers[0]] = -(10**9)  # numbers far apart, which are not to be tabulated
    assert torch.equal(mean_pool(images, far), expected)


def test_mean_pool_takes_any_integers_and_strides() -> None:
    images = random_images(2, 5, 7, 3).permute(0, 3, 1, 2)
    segments = torch.arange(35).reshape(5, 7).remainder(4).expand(2, 5, 7)
    expected = torch.stack([plainly_pooled(image, segments[0]) for image in images])
    for dtype in (torch.uint8, torch.int32, torch.int64):
        assert torch.equal(mean_pool(images, segments.to(dtype)), expected)
    every_pixel = torch.arange(35).reshape(1, 5, 7).expand(2, 5, 7)
    assert torch.equal(mean_pool(images, every_pixel), images)
    assert mean_pool(images[:0], segments[:0]).shape == (0, 3, 5, 7)


def test_means_are_rounded_with_halves_up_and_sums_do_not_overflow() -> None:
    image = torch.zeros(3, 1, 4, dtype=torch.uint8)
    image[0, 0] = torch.tensor([0, 1, 254, 255])
    pooled = mean_pool(image, torch.tensor([[5, 5, 9, 9]]))
    assert pooled[0, 0].tolist() == [1, 1, 255, 255]
    bright = torch.full((3, 2910, 2910), 255, dtype=torch.uint8)  # sums to 2.16e9: more than 31 bits hold
    bright[:, 0, 0] = 0
    assert (mean_pool(bright, torch.zeros(2910, 2910, dtype=torch.uint8)) == 255).all()


def test_mean_pool_refuses_other_shapes_and_dtypes() -> None:
    images = random_images(2, 3, 4, 5)
    with pytest.raises(TypeError, match="got torch.float32 and torch.int64"):
        mean_pool(images.float(), torch.zeros(2, 4, 5, dtype=torch.int64))
    with pytest.raises(TypeError, match="got torch.uint8 and torch.bool"):
        mean_pool(images, torch.zeros(2, 4, 5, dtype=torch.bool))
    for shape in ((4, 5), (2, 5, 4), (2, 1, 4, 5)):
        with pytest.raises(ValueError, match="segments the same without the channels"):
            mean_pool(images, torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="\\[2, 4, 4, 5\\]"):
        mean_pool(random_images(2, 4, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64))


# masks


def test_smaller_masks_lie_on_larger_ones_and_the_rest_is_one_segment() -> None:
    masks = torch.zeros(4, 4, 6, dtype=torch.bool)
    masks[0, 1:3, 1:3] = True  # 4 pixels, in mask 1
    masks[1, 0:4, 0:4] = True  # 16 pixels
    masks[2, 0:2, 3:5] = True  # 4 pixels, half on mask 1
    masks[3, 1:3, 2:4] = True  # 4 pixels, on all of them: the later of the same area is on top
    expected = [
        [2, 2, 2, 3, 3, 0],
        [2, 1, 4, 4, 3, 0],
        [2, 1, 4, 4, 0, 0],
        [2, 2, 2, 2, 0, 0],
    ]
    assert segments_from_masks(masks).tolist() == expected
    assert segments_from_masks(masks[:0]).tolist() == [[0] * 6] * 4
    covered_by_smaller = torch.stack([masks[1], masks[1].clone(), masks[0]])
    assert segments_from_masks(covered_by_smaller).unique().tolist() == [0, 2, 3]  # the first is hidden


def test_masks_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="must be torch.bool, got torch.uint8"):
        segments_from_masks(torch.zeros(1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="\\[K, H, W\\], got \\[4, 4\\]"):
        segments_from_masks(torch.zeros(4, 4, dtype=torch.bool))


# scikit-image


@pytest.mark.parametrize(("height", "width"), [(64, 64), (224, 300), (700, 500)])
def test_felzenszwalb_finds_the_two_halves_of_an_image_of_any_size(height: int, width: int) -> None:
    pytest.importorskip("skimage", reason="segmenting needs scikit-image")
    image = two_halves(height, width)
    segments = segment(image)
    assert segments.shape == (height, width) and segments.dtype == torch.int64
    left, right = segments == segments[0, 0], segments == segments[-1, -1]
    assert not (left & right).any()
    assert left.sum() + right.sum() >= 0.9 * height * width  # the blurred border makes segments of its own
    assert not left[:, width // 2 + 2 :].any() and not right[:, : width // 2 - 2].any()
    pooled = mean_pool(image, segments).int()
    assert (pooled[:, height // 2, 2] - torch.tensor([200, 40, 40])).abs().max() <= 4
    assert (pooled[:, height // 2, -3] - torch.tensor([30, 60, 190])).abs().max() <= 4


def test_slic_gives_about_as_many_segments_as_it_is_asked_for() -> None:
    pytest.importorskip("skimage", reason="segmenting needs scikit-image")
    image = two_halves(200, 200)
    for wanted in (20, 80):
        count = len(segment(image, "slic", n_segments=wanted).unique())
        assert 0.5 * wanted <= count <= 1.5 * wanted


def test_segment_refuses_unknown_names_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    image = two_halves(32, 32)
    with pytest.raises(ValueError, match="one of felzenszwalb, slic, got 'sam'"):
        segment(image, "sam")
    with pytest.raises(ValueError, match="parameters of slic are side, .*, got scale"):
        segment(image, "slic", scale=3)
    with pytest.raises(ValueError, match="min_size must be a whole number above 0, got 2.5"):
        segment(image, min_size=2.5)
    with pytest.raises(ValueError, match="scale must be a number above 0, got -1"):
        segment(image, scale=-1)
    with pytest.raises(ValueError, match="got torch.uint8 \\[32, 32\\]"):
        segment(image[0])
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImportError, match='pip install "subnet-kernels\\[vision\\]", or give masks from files'):
        segment(image)


# folders


def make_folder(folder: Path) -> Path:
    """Three images in two folders, one of them grey."""
    for i, name in enumerate(("cat/1.png", "cat/2.JPEG", "dog/a/3.png")):
        save(folder / name, two_halves(48 + i, 40))
    with Image.open(folder / "cat/1.png") as image:
        image.convert("L").save(folder / "cat/1.png")
    return folder


def test_a_folder_is_pooled_into_the_same_tree_once(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="segmenting needs scikit-image")
    source, pooled = make_folder(tmp_path / "images"), tmp_path / "pooled"
    assert pool_folder(source, pooled, min_size=20) == 3
    found = sorted(str(path.relative_to(pooled)) for path in pooled.rglob("*") if path.is_file())
    assert found == ["cat/1.png", "cat/2.png", "dog/a/3.png", "pooling.json"]
    for name, original in (("cat/2.png", "cat/2.JPEG"), ("dog/a/3.png", "dog/a/3.png")):
        image = read(source / original)
        assert torch.equal(read(pooled / name), mean_pool(image, segment(image, min_size=20)))
    record = json.loads((pooled / "pooling.json").read_text())
    assert (record["segmenter"], record["masks"], record["source"]) == ("felzenszwalb", None, str(source))
    assert record["parameters"] == {"side": 224, "scale": 300.0, "sigma": 0.8, "min_size": 20}
    assert pool_folder(source, pooled, min_size=20) == 0


def test_a_killed_call_goes_on_and_changed_images_are_made_again(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="segmenting needs scikit-image")
    source, pooled = make_folder(tmp_path / "images"), tmp_path / "pooled"
    pool_folder(source, pooled)
    expected = read(pooled / "cat/1.png")
    (pooled / "cat/1.png").rename(pooled / "cat/.1.png.tmp")  # what a kill leaves of an image
    (pooled / "cat/.1.png.tmp").write_bytes(b"half")
    assert pool_folder(source, pooled) == 1
    assert torch.equal(read(pooled / "cat/1.png"), expected)
    assert not (pooled / "cat/.1.png.tmp").exists()
    newer = (pooled / "cat/2.png").stat().st_mtime_ns + 10**9
    os.utime(source / "cat/2.JPEG", ns=(newer, newer))
    assert pool_folder(source, pooled) == 1


def test_an_image_that_the_segmenter_can_not_take_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage", reason="segmenting needs scikit-image")
    source = make_folder(tmp_path / "images")

    def failing(image: Tensor, segmenter: str, **parameters: float) -> Tensor:
        if image.shape[1] == 49:
            raise MemoryError("too large")
        return segment(image, segmenter, **parameters)

    monkeypatch.setattr(pooling, "segment", failing)
    with pytest.raises(ValueError, match="1 problem:\n  cat/2.JPEG: felzenszwalb failed \\(MemoryError: too large\\)"):
        pool_folder(source, tmp_path / "pooled", workers=1)
    assert (tmp_path / "pooled/cat/1.png").exists() and (tmp_path / "pooled/dog/a/3.png").exists()


def test_several_processes_make_the_same_images(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="segmenting needs scikit-image")
    source = make_folder(tmp_path / "images")
    (source / "dog/a/4.png").write_text("no image")
    for place, workers in (("one", 1), ("two", 2)):
        with pytest.raises(ValueError, match="got 1 problem:\n  dog/a/4.png: not an image"):
            pool_folder(source, tmp_path / place, workers=workers)
    for name in ("cat/1.png", "cat/2.png", "dog/a/3.png"):
        assert torch.equal(read(tmp_path / "one" / name), read(tmp_path / "two" / name))


def test_a_destination_made_in_another_way_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="segmenting needs scikit-image")
    source, pooled = make_folder(tmp_path / "images"), tmp_path / "pooled"
    pool_folder(source, pooled)
    with pytest.raises(ValueError, match="made in another way \\(parameters: .*300.0.* there, .*100.*now\\)"):
        pool_folder(source, pooled, scale=100)
    with pytest.raises(ValueError, match="made in another way \\(segmenter: felzenszwalb there, slic now"):
        pool_folder(source, pooled, segmenter="slic")
    shutil.copytree(source, tmp_path / "copy")
    with pytest.raises(ValueError, match="made in another way \\(source: "):
        pool_folder(tmp_path / "copy", pooled)
    (source / "cat/1.png").unlink()
    with pytest.raises(ValueError, match="got 1 problem:\n  cat/1.png: no such image in the source"):
        pool_folder(source, pooled)


def test_bad_places_are_refused_before_any_work(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="segmenting needs scikit-image")
    source = make_folder(tmp_path / "images")
    for destination in (source, source / "pooled", tmp_path):
        with pytest.raises(ValueError, match="source and destination must lie apart"):
            pool_folder(source, destination)
    with pytest.raises(ValueError, match="source must be a folder, got nothing there"):
        pool_folder(tmp_path / "nowhere", tmp_path / "pooled")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must hold images, got none"):
        pool_folder(tmp_path / "empty", tmp_path / "pooled")
    save(tmp_path / "mine" / "photo.png", two_halves(32, 32))
    with pytest.raises(ValueError, match="must be empty or hold a pooling.json, got other files"):
        pool_folder(source, tmp_path / "mine")
    (source / "cat/4.png").write_bytes(b"")
    save(source / "cat/2.png", two_halves(32, 32))
    with pytest.raises(ValueError) as error:
        pool_folder(source, tmp_path / "pooled")
    assert "cat/2.png: there is 2.JPEG too" in str(error.value) and "cat/4.png: 0 bytes" in str(error.value)
    assert not (tmp_path / "pooled").exists()


def make_masks(folder: Path) -> dict[str, Tensor]:
    """Masks for `make_folder`: npz, npz and a label map. Returns segments by name of the pooled image."""
    segments = {}
    for i, name in enumerate(("cat/1", "cat/2", "dog/a/3")):
        masks = torch.zeros(2, 48 + i, 40, dtype=torch.bool)
        masks[0, :30, :25] = True
        masks[1, 5:10, 5:10] = True
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        segments[f"{name}.png"] = segments_from_masks(masks)
        if i < 2:
            np.savez(path.with_suffix(".npz"), masks=masks.numpy())
        else:
            Image.fromarray(segments[f"{name}.png"].numpy().astype(np.uint16) * 300).save(path.with_suffix(".png"))
    return segments


def test_masks_from_files_take_the_place_of_a_segmenter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)  # not needed here
    source, pooled = make_folder(tmp_path / "images"), tmp_path / "pooled"
    segments = make_masks(tmp_path / "masks")
    assert pool_folder(source, pooled, masks=tmp_path / "masks") == 3
    for name, original in (("cat/2.png", "cat/2.JPEG"), ("dog/a/3.png", "dog/a/3.png")):
        assert torch.equal(read(pooled / name), mean_pool(read(source / original), segments[name]))
    record = json.loads((pooled / "pooling.json").read_text())
    assert (record["segmenter"], record["masks"]) == ("masks", str(tmp_path / "masks"))
    with pytest.raises(ValueError, match="parameters must be left out where masks are given, got scale"):
        pool_folder(source, pooled, masks=tmp_path / "masks", scale=3)


def test_missing_masks_are_listed_before_any_work(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "images")
    make_masks(tmp_path / "masks")
    (tmp_path / "masks/cat/1.npz").unlink()
    (tmp_path / "masks/dog/a/3.png").unlink()
    with pytest.raises(ValueError) as error:
        pool_folder(source, tmp_path / "pooled", masks=tmp_path / "masks")
    assert f"cat/1.png: no {tmp_path / 'masks/cat/1.npz'} (or .png)" in str(error.value)
    assert f"dog/a/3.png: no {tmp_path / 'masks/dog/a/3.npz'}" in str(error.value)
    assert not (tmp_path / "pooled").exists()


def test_masks_that_do_not_fit_are_listed_and_the_others_used(tmp_path: Path) -> None:
    source, pooled, masks = make_folder(tmp_path / "images"), tmp_path / "pooled", tmp_path / "masks"
    make_masks(masks)
    for name in ("cat/5.png", "cat/6.png", "cat/7.png", "cat/8.png", "cat/9.png"):
        save(source / name, two_halves(32, 32))
    np.savez(masks / "cat/5.npz", masks=np.zeros((2, 32, 31), bool))
    np.savez(masks / "cat/6.npz", masks=np.zeros((2, 32, 32), np.float32))
    np.savez(masks / "cat/7.npz", other=np.zeros(3))
    (masks / "cat/8.npz").write_bytes(b"no archive")
    save(masks / "cat/9.png", two_halves(32, 32))
    with pytest.raises(ValueError) as error:
        pool_folder(source, pooled, masks=masks)
    assert str(error.value).splitlines()[1:4] == [
        "  cat/5.png: 5.npz must have the image's size [32, 32], got [32, 31]",
        "  cat/6.png: 6.npz must hold masks as bool [K, H, W], got torch.float32 [2, 32, 32]",
        "  cat/7.png: 7.npz must hold an array 'masks', got other",
    ]
    assert "cat/8.png: 8.npz is unreadable" in str(error.value)
    assert "cat/9.png: 9.png must have one channel of segment numbers, got mode RGB" in str(error.value)
    assert (pooled / "dog/a/3.png").exists() and not (pooled / "cat/5.png").exists()
    np.savez(masks / "cat/1.npz", masks=np.zeros((0, 48, 40), bool))  # changed since
    newer = (pooled / "cat/1.png").stat().st_mtime_ns + 10**9
    os.utime(masks / "cat/1.npz", ns=(newer, newer))
    with pytest.raises(ValueError, match="got 5 problems"):
        pool_folder(source, pooled, masks=masks)
    assert len(read(pooled / "cat/1.png").flatten(1).unique(dim=1).T) == 1  # all of it is one segment now


def test_pooled_class_folders_are_listed_and_split_as_their_originals(tmp_path: Path) -> None:
    for name in CLASSES:
        for i in range(4):
            save(tmp_path / "images" / name / f"{name}{i}.jpg", two_halves(20, 20))
            (tmp_path / "masks" / name).mkdir(parents=True, exist_ok=True)
            np.savez(tmp_path / "masks" / name / f"{name}{i}.npz", masks=np.zeros((0, 20, 20), bool))
    pool_folder(tmp_path / "images", tmp_path / "pooled", masks=tmp_path / "masks")
    originals, pooled = list_class_folders(tmp_path / "images"), list_class_folders(tmp_path / "pooled")
    assert [entry.shape for entry in pooled] == [entry.shape for entry in originals]
    for part, part_pooled in zip(split(originals, 0.5), split(pooled, 0.5)):
        assert [entry.path.stem for entry in part] == [entry.path.stem for entry in part_pooled]
        assert len(part) == 32


def test_only_the_images_of_a_split_are_pooled_and_more_can_follow(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="segmenting needs scikit-image")
    source, pooled = tmp_path / "images", tmp_path / "pooled"
    for name in CLASSES:
        for i in range(3):
            save(source / name / f"{i}.png", two_halves(20, 20))
    some = split(list_class_folders(source), 0.5, most_per_class=2)
    assert pool_folder(source, pooled, entries=[*some[0], *some[1]]) == 32
    there = list_class_folders(pooled)
    assert {entry.name for entry in there} == {entry.name for part in some for entry in part}
    assert [{entry.name for entry in part} for part in split(there, 0.5)] == [{e.name for e in part} for part in some]
    assert pool_folder(source, pooled) == 16  # the others
    with pytest.raises(ValueError, match="entries must lie below source"):
        pool_folder(source, pooled, entries=there)
