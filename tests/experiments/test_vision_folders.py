"""Folders of real images: what is listed, refused, split and packed. Images are made here, but for the last tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from subnets.experiments.vision import packing
from subnets.experiments.vision.classes import CLASSES, class_of_synset, synsets
from subnets.experiments.vision.decoding import BadImage, read_rgb
from subnets.experiments.vision.folders import (
    Entry,
    list_class_folders,
    list_cue_conflict,
    list_imagenet,
    parse_cue_conflict,
    split,
)
from subnets.experiments.vision.packing import pack

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(path: Path, color: tuple[int, ...] | int = RED, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


def noise(path: Path, width: int, height: int, seed: int = 0) -> np.ndarray:
    """Saves and returns uint8 [H, W, 3]."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def off(image: Image.Image, at: tuple[int, int], color: tuple[int, ...]) -> int:
    """By how much the pixel at (x, y) differs from the colour, at most."""
    return int(np.abs(np.asarray(image, dtype=int)[at[1], at[0]] - color).max())


def make_class_folders(folder: Path, per_class: int = 1) -> Path:
    for name in reversed(CLASSES):
        for i in range(per_class):
            save(folder / name / f"{i}.png", (i, CLASSES.index(name), 0))
    return folder


def noisy_entries(folder: Path, count: int) -> list[Entry]:
    """Different images of class 3, small enough to be packed at once."""
    for i in range(count):
        noise(folder / "bird" / f"{i:02}.png", 20, 20, seed=i)
    return [Entry(folder / "bird" / f"{i:02}.png", 3, 3) for i in range(count)]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that `pack` decodes from here on."""
    names: list[str] = []

    def counting(path: Path) -> Image.Image:
        names.append(path.name)
        return read_rgb(path)

    monkeypatch.setattr(packing, "read_rgb", counting)
    return names


# classes


def test_the_mapping_has_202_synsets_in_16_classes() -> None:
    counts = {name: len(members) for name, members in synsets().items()}
    assert counts == {
        "airplane": 1, "bear": 4, "bicycle": 2, "bird": 49, "boat": 5, "bottle": 7, "car": 3, "cat": 6,
        "chair": 4, "clock": 3, "dog": 109, "elephant": 2, "keyboard": 2, "knife": 1, "oven": 1, "truck": 3,
    }  # fmt: skip
    assert list(counts) == list(CLASSES) == sorted(CLASSES)
    assert len(class_of_synset()) == 202  # no synset in two classes
    known = {"n02690373": "airplane", "n02056570": "bird", "n02123045": "cat", "n02113978": "dog", "n04467665": "truck"}
    assert {synset: CLASSES[class_of_synset()[synset]] for synset in known} == known


# listing


def make_imagenet(folder: Path) -> Path:
    picture = save(folder.parent / "picture.jpeg")
    for synset in [*reversed(class_of_synset()), "n01440764"]:  # a tench too, of no class
        (folder / synset).mkdir(parents=True)
        for i in (2, 1):
            shutil.copy(picture, folder / synset / f"{synset}_{i}.JPEG")
    return folder


def test_imagenet_is_listed_by_class_and_name_and_other_synsets_are_passed_over(tmp_path: Path) -> None:
    entries = list_imagenet(make_imagenet(tmp_path / "train"))
    assert len(entries) == 404
    assert Counter(CLASSES[entry.shape] for entry in entries) == {n: 2 * len(m) for n, m in synsets().items()}
    assert [entry.path.name for entry in entries[:3]] == ["n02690373_1.JPEG", "n02690373_2.JPEG", "n02132136_1.JPEG"]
    assert [entry.shape for entry in entries] == sorted(entry.shape for entry in entries)
    assert all(entry.texture == entry.shape for entry in entries)


def test_an_incomplete_imagenet_is_refused_by_name_unless_asked_for(tmp_path: Path) -> None:
    folder = make_imagenet(tmp_path / "train")
    shutil.rmtree(folder / "n02085782")
    (folder / "n02056570" / "n02056570_1.JPEG").write_bytes(b"")
    with pytest.raises(ValueError) as error:
        list_imagenet(folder)
    assert "n02085782 (dog): no such folder" in str(error.value)
    assert "n02056570/n02056570_1.JPEG: 0 bytes" in str(error.value)
    assert "got 2 problems" in str(error.value)
    (folder / "n02056570" / "n02056570_1.JPEG").unlink()
    assert len(list_imagenet(folder, complete=False)) == 404 - 3
    for synset in synsets()["bear"]:
        shutil.rmtree(folder / synset)
    with pytest.raises(
        ValueError, match="bear: none of its folders is there \\(n02132136, n02133161, n02134084, ...\\)"
    ):
        list_imagenet(folder, complete=False)


def test_the_published_lists_say_which_images_count(tmp_path: Path) -> None:
    folder, lists = make_imagenet(tmp_path / "train"), tmp_path / "image_names"
    lists.mkdir()
    for name, members in synsets().items():
        (lists / f"{name}.txt").write_text("".join(f"{synset}_2.JPEG\n" for synset in members))
    entries = list_imagenet(folder, lists=lists)
    assert [entry.path.stem for entry in entries] == [f"{synset}_2" for synset in class_of_synset()]
    (lists / "truck.txt").unlink()
    (lists / "oven.txt").write_text("n04111531_3.JPEG\n")
    with pytest.raises(ValueError) as error:
        list_imagenet(folder, lists=lists)
    assert "truck.txt: can't be read" in str(error.value)
    assert "  n04111531_3: no such image, but it is in oven.txt\n  oven: no image is in oven.txt" in str(error.value)
    (lists / "truck.txt").write_text("n04467665_1.JPEG\nn04467665_9.JPEG")
    (lists / "oven.txt").write_text("n04111531_1.JPEG\n")
    assert len(list_imagenet(folder, complete=False, lists=lists)) == 202 - 2


def test_the_folder_above_the_synsets_gets_a_hint(tmp_path: Path) -> None:
    make_imagenet(tmp_path / "train")
    with pytest.raises(ValueError, match=f"is it {tmp_path / 'train'}\\?"):
        list_imagenet(tmp_path)


@pytest.mark.parametrize("function", [list_imagenet, list_class_folders, list_cue_conflict])
def test_a_missing_or_empty_folder_or_a_file_is_refused(tmp_path: Path, function) -> None:
    with pytest.raises(ValueError, match="must be a folder with .*got nothing there"):
        function(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must be a folder with .*got a file"):
        function(save(tmp_path / "file.png"))
    with pytest.raises(ValueError, match="got no folder in it"):
        function(tmp_path)
    (tmp_path / "zebra").mkdir()
    with pytest.raises(ValueError, match="got zebra"):
        function(tmp_path)


def test_class_folders_are_listed_in_the_fixed_order_and_other_files_passed_over(tmp_path: Path) -> None:
    folder = make_class_folders(tmp_path / "images", per_class=2)
    (folder / "airplane" / "README.txt").write_text("about")
    (folder / "airplane" / ".hidden.png").write_bytes(b"")
    (folder / ".cache").mkdir()
    entries = list_class_folders(folder)
    assert [entry.shape for entry in entries] == [i for i in range(16) for _ in range(2)]
    assert [entry.name for entry in entries[:3]] == ["airplane/0.png", "airplane/1.png", "bear/0.png"]


def test_all_that_is_wrong_with_class_folders_is_listed_in_one_error(tmp_path: Path) -> None:
    folder = make_class_folders(tmp_path / "images")
    save(folder / "zebra" / "0.png")
    shutil.rmtree(folder / "truck")
    (folder / "oven" / "0.png").unlink()
    (folder / "dog" / "1.png").write_bytes(b"")
    (folder / "dog" / "2.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "car" / "more").mkdir()
    save(folder / "cat" / "0.jpg")
    with pytest.raises(ValueError) as error:
        list_class_folders(folder)
    assert str(error.value).splitlines()[1:] == [
        "  zebra: not one of the classes",
        "  truck: no such folder",
        "  car/more: a folder where images were expected",
        "  cat/0.png: there is 0.jpg too, expected one of them",
        "  dog/1.png: 0 bytes: copied in part?",
        "  dog/2.png: can't be read (No such file or directory): a broken link?",
        "  oven: no images in it (.bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp)",
    ]
    assert "airplane, bear, bicycle" in str(error.value) and "got 7 problems" in str(error.value)


def make_cue_conflict(folder: Path) -> Path:
    for i, name in enumerate(CLASSES):
        save(folder / name / f"{name}1-{CLASSES[(i + 1) % 16]}2.png")
        save(folder / name / f"{name}10-{name}3.jpg")
    return folder


def test_cue_conflict_folders_give_shape_by_folder_and_texture_by_name(tmp_path: Path) -> None:
    entries = list_cue_conflict(make_cue_conflict(tmp_path / "images"))
    assert [(entry.shape, entry.texture) for entry in entries[:4]] == [(0, 1), (0, 0), (1, 2), (1, 1)]
    assert [entry.name for entry in entries[-2:]] == ["truck/truck1-airplane2.png", "truck/truck10-truck3.jpg"]
    cues = parse_cue_conflict(entries[-1].path)
    assert (cues.shape, cues.shape_instance, cues.texture, cues.texture_instance) == (
        "truck", "truck10", "truck", "truck3",
    )  # fmt: skip


def test_cue_conflict_names_that_do_not_parse_or_disagree_are_listed(tmp_path: Path) -> None:
    folder = make_cue_conflict(tmp_path / "images")
    for name in ("dog1-cat2.png", "cat1.png", "cat1-zebra2.png", "cat-dog1.png"):
        save(folder / "cat" / name)
    with pytest.raises(ValueError) as error:
        list_cue_conflict(folder)
    text = str(error.value)
    assert "cat/dog1-cat2.png: its name says dog, its folder cat" in text
    for name in ("cat1.png", "cat1-zebra2.png", "cat-dog1.png"):
        assert f"  cat/{name}: name must be like airplane1-bicycle2" in text
    assert "got 4 problems" in text
    with pytest.raises(ValueError, match="parse_cue_conflict: name must be like airplane1-bicycle2"):
        parse_cue_conflict("cat1_dog2.png")


# splitting


def entries_of(counts: dict[int, int], root: str = "a", suffix: str = ".JPEG") -> list[Entry]:
    return [Entry(Path(root, CLASSES[c], f"{c}_{i}{suffix}"), c, c) for c, n in counts.items() for i in range(n)]


def stems(entries: list[Entry]) -> set[str]:
    return {entry.path.stem for entry in entries}


def test_split_has_the_same_share_in_every_class_and_no_image_twice() -> None:
    entries = entries_of({0: 1300, 4: 870, 15: 3, 9: 2})
    train, evaluation = split(entries, 0.9, most_per_class=1000)
    assert Counter(entry.shape for entry in train) == {0: 900, 4: 783, 15: 2, 9: 1}
    assert Counter(entry.shape for entry in evaluation) == {0: 100, 4: 87, 15: 1, 9: 1}
    assert not stems(train) & stems(evaluation)
    assert train == [entry for entry in entries if entry in set(train)]  # in the order of entries


def test_split_depends_on_file_names_alone() -> None:
    counts = {0: 50, 1: 70}
    train, evaluation = split(entries_of(counts))
    elsewhere = entries_of(counts, root="elsewhere", suffix=".png")[::-1]
    train_there, evaluation_there = split(elsewhere)
    assert stems(train_there) == stems(train) and stems(evaluation_there) == stems(evaluation)
    assert stems(split(elsewhere, seed=1)[1]) != stems(evaluation)
    first = [entry.path.stem for entry in entries_of({0: 50})[:45]]
    assert stems(train) != set(first)  # not the listing's first 90 %


def test_fewer_images_per_class_are_parts_of_the_same_two_lists() -> None:
    entries = entries_of({0: 200, 1: 90})
    train, evaluation = split(entries)
    fewer_train, fewer_evaluation = split(entries, most_per_class=40)
    assert Counter(entry.shape for entry in fewer_train) == {0: 36, 1: 36}
    assert stems(fewer_train) < stems(train) and stems(fewer_evaluation) < stems(evaluation)
    again = split([*fewer_evaluation, *fewer_train])  # as when these alone were mean-pooled
    assert stems(again[0]) == stems(fewer_train) and stems(again[1]) == stems(fewer_evaluation)


def test_split_refuses_what_it_can_not_split() -> None:
    with pytest.raises(ValueError, match="got 1 of bear, car"):
        split(entries_of({0: 2, 6: 1, 1: 1}))
    with pytest.raises(ValueError, match="fraction must be between 0 and 1, got 1.0"):
        split(entries_of({0: 2}), 1.0)
    with pytest.raises(ValueError, match="most_per_class must be 2 or more, or None, got 1"):
        split(entries_of({0: 2}), most_per_class=1)


# decoding


def test_the_centre_of_the_image_is_cut_out(tmp_path: Path) -> None:
    pixels = noise(tmp_path / "bird" / "wide.png", 512, 256)
    images = pack([Entry(tmp_path / "bird" / "wide.png", 3, 3)], 224, tmp_path / "cache").images
    assert images.shape == (1, 3, 224, 224)
    assert np.array_equal(images[0].numpy(), pixels[16:240, 144:368].transpose(2, 0, 1))
    whole = pack([Entry(tmp_path / "bird" / "wide.png", 3, 3)], 256, tmp_path / "whole", crop=1.0).images
    assert np.array_equal(whole[0].numpy(), pixels[:, 128:384].transpose(2, 0, 1))


def test_one_step_gives_what_resizing_and_cutting_give(tmp_path: Path) -> None:
    noise(tmp_path / "bird" / "tall.png", 300, 600)
    with Image.open(tmp_path / "bird" / "tall.png") as image:
        resized = image.resize((64, 128), Image.Resampling.BICUBIC)  # shorter side 56 / (224 / 256) = 64
    expected = np.asarray(resized.crop((4, 36, 60, 92))).transpose(2, 0, 1).astype(int)
    images = pack([Entry(tmp_path / "bird" / "tall.png", 3, 3)], 56, tmp_path / "cache").images
    assert np.abs(images[0].numpy().astype(int) - expected).max() <= 1


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    size = (16, 16)
    cases = {
        "grey.png": (Image.new("L", size, 77), (77, 77, 77)),
        "bilevel.png": (Image.new("1", size, 1), (255, 255, 255)),
        "palette.png": (
            Image.new("RGB", size, (9, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE),
            (9, 200, 30),
        ),
        "alpha.png": (Image.new("RGBA", size, (255, 0, 0, 127)), (255, 128, 128)),  # over white
        "grey_alpha.png": (Image.new("LA", size, (0, 255)), (0, 0, 0)),
        "cmyk.tif": (Image.new("CMYK", size, (0, 255, 255, 0)), RED),
        "sixteen.png": (Image.fromarray(np.full((16, 16), 0x8080, np.uint16)), (128, 128, 128)),
        "sixteen.tif": (Image.fromarray(np.full((16, 16), 0xFFFF, np.uint16)), (255, 255, 255)),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        rgb = read_rgb(tmp_path / name)
        assert rgb.mode == "RGB"
        assert rgb.getpixel((5, 5)) == expected, name
    Image.new("RGB", size, GREEN).save(tmp_path / "key.png", transparency=GREEN)
    assert read_rgb(tmp_path / "key.png").getpixel((5, 5)) == (255, 255, 255)
    Image.new("CMYK", (16, 16), (0, 0, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    assert off(read_rgb(tmp_path / "cmyk.jpg"), (5, 5), (255, 255, 0)) <= 3


def test_images_are_turned_upright_and_suffixes_play_no_part(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))  # left red, right blue
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", format="JPEG", exif=exif, quality=100, subsampling=0)
    upright = read_rgb(tmp_path / "turned.png")
    assert upright.size == (20, 40)
    assert off(upright, (10, 5), RED) <= 3 and off(upright, (10, 35), BLUE) <= 3


def make_bad_files(folder: Path) -> dict[str, str]:
    """Name -> what the error must say."""
    noise(folder / "whole.jpg", 64, 64)
    data = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "whole.jpg").unlink()
    (folder / "text.png").write_text("no image")
    save(folder / "tiny.png", size=(200, 12))
    Image.fromarray(np.zeros((32, 32), np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((32, 32), 70000, np.int32)).save(folder / "integers.tif")
    return {
        "truncated.jpg": "unreadable (OSError: image file is truncated",
        "text.png": "not an image",
        "tiny.png": "200x12 pixels, 16 or more a side expected",
        "float.tif": "floating-point pixels, 8 or 16 bits expected",
        "integers.tif": "32-bit pixels from 70000 to 70000, 8 or 16 bits expected",
    }


def test_bad_files_are_all_listed_at_the_end_and_the_good_ones_stay(tmp_path: Path, decoded: list[str]) -> None:
    good = noisy_entries(tmp_path, 3)
    bad = make_bad_files(tmp_path / "bird")
    entries = [*(Entry(tmp_path / "bird" / name, 3, 3) for name in bad), *good]
    with pytest.raises(ValueError) as error:
        pack(entries, 8, tmp_path / "cache", crop=1.0)
    for name, problem in bad.items():
        assert f"  bird/{name}: {problem}" in str(error.value)
    assert "got 5 problems" in str(error.value) and "16 pixels or more a side" in str(error.value)
    assert not (tmp_path / "cache" / "index.json").exists()
    decoded.clear()
    with pytest.raises(ValueError, match="got 5 problems"):
        pack(entries, 8, tmp_path / "cache", crop=1.0)
    assert sorted(decoded) == sorted(bad)  # the good ones stay, the bad ones may have been mended
    decoded.clear()
    images = pack(good, 8, tmp_path / "cache", crop=1.0)
    assert decoded == []
    assert torch.equal(images.images, pack(good, 8, tmp_path / "other", crop=1.0).images)
    with pytest.raises(BadImage, match="not an image"):
        read_rgb(tmp_path / "bird" / "text.png")


def test_of_many_bad_files_twenty_are_named(tmp_path: Path) -> None:
    paths = [save(tmp_path / "bird" / f"{i:02}.png", size=(8, 8)) for i in range(25)]
    with pytest.raises(ValueError) as error:
        pack([Entry(path, 3, 3) for path in paths], 8, tmp_path / "cache")
    assert str(error.value).count("8x8 pixels") == 20
    assert "bird/19.png" in str(error.value) and "... and 5 more" in str(error.value)


# the cache


def test_a_packed_folder_is_an_image_set_over_the_mapped_file(tmp_path: Path) -> None:
    folder = make_class_folders(tmp_path / "images", per_class=2)
    entries = list_class_folders(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = pack(entries, 16, tmp_path / "cache")
    assert images.classes == CLASSES and images.names[:2] == ("airplane/0.png", "airplane/1.png")
    assert images.shape.tolist() == images.texture.tolist() == [i for i in range(16) for _ in range(2)]
    assert images.images[:, 1, 3, 3].tolist() == images.shape.tolist()  # green is the class, red the number
    assert images.images[:, 0, 8, 8].tolist() == [0, 1] * 16
    stored = np.load(tmp_path / "cache" / "images.npy", allow_pickle=False)
    assert np.array_equal(stored, images.images.numpy())
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path / "cache" / "images.npy") in maps.read_text()
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    stat = entries[1].path.stat()
    assert (index["format"], index["size"], index["crop"]) == (1, 16, 0.875)
    assert index["files"][1] == [str(entries[1].path), "airplane", "airplane", stat.st_size, stat.st_mtime_ns]


def test_a_second_call_decodes_nothing(tmp_path: Path, decoded: list[str]) -> None:
    entries = noisy_entries(tmp_path, 5)
    first = pack(entries, 8, tmp_path / "cache").images
    assert sorted(decoded) == [f"{i:02}.png" for i in range(5)]
    decoded.clear()
    assert torch.equal(pack(entries, 8, tmp_path / "cache").images, first)
    assert decoded == []


def test_files_that_changed_are_told_and_decoded_again_alone(
    tmp_path: Path, decoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    entries = noisy_entries(tmp_path, 5)
    pack(entries, 8, tmp_path / "cache")
    noise(entries[2].path, 20, 20, seed=99)
    os.utime(entries[2].path, ns=(1, 1))  # even where clocks are coarse
    decoded.clear()
    images = pack(entries, 8, tmp_path / "cache").images
    assert decoded == ["02.png"]
    assert "1 of 5 images have come or changed since they were packed" in capsys.readouterr().err
    assert torch.equal(images, pack(entries, 8, tmp_path / "other").images)


def test_files_that_came_and_went_move_rows_without_decoding_them_again(tmp_path: Path, decoded: list[str]) -> None:
    entries = noisy_entries(tmp_path, 6)
    pack(entries[1:], 8, tmp_path / "cache")
    decoded.clear()
    changed = [entries[0], *entries[2:4], entries[5]]
    images = pack(changed, 8, tmp_path / "cache")
    assert decoded == ["00.png"]
    assert torch.equal(images.images, pack(changed, 8, tmp_path / "other").images)
    assert images.names == ("bird/00.png", "bird/02.png", "bird/03.png", "bird/05.png")
    decoded.clear()
    pack(changed[::-1], 8, tmp_path / "cache")  # another order
    assert decoded == []
    assert torch.equal(pack(changed[::-1], 8, tmp_path / "cache").images, images.images.flip(0))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["images.npy", "index.json", "keys.npy"]


def test_another_size_or_crop_is_packed_anew(tmp_path: Path) -> None:
    entries = noisy_entries(tmp_path, 3)
    pack(entries, 8, tmp_path / "cache")
    for size, crop in ((8, 1.0), (10, 1.0)):
        images = pack(entries, size, tmp_path / "cache", crop=crop).images
        assert torch.equal(images, pack(entries, size, tmp_path / f"{size}", crop=crop).images)


KILLED = """
import os, signal, sys
from pathlib import Path
from subnets.experiments.vision import packing
from subnets.experiments.vision.folders import Entry
packing._ROWS_AT_ONCE = 4
read, calls = packing.read_rgb, []
def slow(path):
    calls.append(path)
    if len(calls) == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(path)
packing.read_rgb = slow
packing.pack([Entry(Path(path), 3, 3) for path in sys.argv[2:]], 8, sys.argv[1], workers=1)
"""


def test_a_killed_call_is_not_taken_for_whole_and_goes_on_where_it_was(tmp_path: Path, decoded: list[str]) -> None:
    entries = noisy_entries(tmp_path, 15)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "cache"), *(str(entry.path) for entry in entries)]
    path = os.pathsep.join(str(folder) for folder in sys.path if folder)
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode == -signal.SIGKILL
    assert (tmp_path / "cache" / "images.npy").exists() and not (tmp_path / "cache" / "index.json").exists()
    images = pack(entries, 8, tmp_path / "cache").images
    assert sorted(decoded) == [f"{i:02}.png" for i in range(8, 15)]  # two lots of four were noted
    assert torch.equal(images, pack(entries, 8, tmp_path / "other").images)


def test_a_call_ended_half_way_through_changed_files_is_not_taken_for_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = noisy_entries(tmp_path, 4)
    old = pack(entries, 8, tmp_path / "cache").images.clone()
    before = [(entry.path.read_bytes(), entry.path.stat().st_mtime_ns) for entry in entries]
    for i, entry in enumerate(entries):
        noise(entry.path, 20, 20, seed=50 + i)
        os.utime(entry.path, ns=(1, 1))

    def ended(path: Path) -> Image.Image:
        if path == entries[2].path:
            raise KeyboardInterrupt
        return read_rgb(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packing, "read_rgb", ended)
        pack(entries, 8, tmp_path / "cache", workers=1)
    for entry, (data, changed) in zip(entries, before):
        entry.path.write_bytes(data)
        os.utime(entry.path, ns=(changed, changed))
    assert torch.equal(pack(entries, 8, tmp_path / "cache").images, old)


@pytest.mark.parametrize("name", ["images.npy", "keys.npy", "index.json"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, name: str) -> None:
    entries = noisy_entries(tmp_path, 4)
    expected = pack(entries, 8, tmp_path / "cache").images.clone()
    damaged = tmp_path / "cache" / name
    data = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(data[: len(data) - 7])
    assert torch.equal(pack(entries, 8, tmp_path / "cache").images, expected)


def test_pack_refuses_what_it_can_not_pack(tmp_path: Path) -> None:
    entries = noisy_entries(tmp_path, 2)
    with pytest.raises(ValueError, match="at least one image, got none"):
        pack([], 8, tmp_path / "cache")
    with pytest.raises(ValueError, match="got 0 and 0.875"):
        pack(entries, 0, tmp_path / "cache")
    with pytest.raises(ValueError, match="got 8 and 1.5"):
        pack(entries, 8, tmp_path / "cache", crop=1.5)
    with pytest.raises(ValueError, match="cache must be a folder, got the file"):
        pack(entries, 8, entries[0].path)
    entries[1].path.unlink()
    with pytest.raises(ValueError, match="bird/01.png: No such file or directory"):
        pack(entries, 8, tmp_path / "cache")


def test_a_disk_without_room_is_said_before_anything_is_decoded(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="needs 0.0 GB, got 0.0 GB free"):
        pack(noisy_entries(tmp_path, 2), 8, tmp_path / "cache")
    assert decoded == []


# real images


def test_the_published_cue_conflict_images_are_listed_and_packed(shared_data: Path, tmp_path: Path) -> None:
    entries = list_cue_conflict(shared_data / "cue-conflict" / "style-transfer-preprocessed-512")
    assert len(entries) == 1280
    assert sum(entry.shape == entry.texture for entry in entries) == 80
    assert Counter(entry.shape for entry in entries) == dict.fromkeys(range(16), 80)
    assert Counter(entry.texture for entry in entries) == dict.fromkeys(range(16), 80)
    some = entries[::40]
    images = pack(some, 224, tmp_path / "cache", crop=1.0)  # they have 224 pixels: nothing to resize
    for i, entry in enumerate(some):
        with Image.open(entry.path) as image:
            assert np.array_equal(images.images[i].numpy(), np.asarray(image).transpose(2, 0, 1))
    instances = Counter(parse_cue_conflict(entry.path).shape_instance for entry in entries)
    assert len(instances) == 160 and sum(instances.values()) == 1280
