"""Folders of real images: listed, checked and split; packing.py makes an ImageSet of them.

    entries = list_imagenet("imagenet/train")          # or list_class_folders, list_cue_conflict
    train, evaluation = split(entries, most_per_class=1000)
    images = pack(train, 224, "cache/natural-train")   # packing.py

Every folder is checked as a whole before anything runs; an error lists all that is wrong, by name.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NoReturn

from subnets.experiments.vision.classes import CLASSES, class_of_synset
from subnets.experiments.vision.decoding import SUFFIXES

_SHOWN = 20
_CUES = re.compile(r"([a-z]+)(\d+)-([a-z]+)(\d+)")


@dataclass(frozen=True)
class Entry:
    """One image file with the class ids of its shape and of its texture (ids into `CLASSES`)."""

    path: Path
    shape: int
    texture: int

    @property
    def name(self) -> str:
        """Folder and file name, such as ``"airplane/airplane1-bicycle2.png"``: what messages and tables show."""
        return f"{self.path.parent.name}/{self.path.name}"


@dataclass(frozen=True)
class Cues:
    """What the name of a cue-conflict image says: ``airplane1-bicycle2`` has the shape of airplane 1, the texture of
    bicycle 2."""

    shape: str
    shape_instance: str
    texture: str
    texture_instance: str


def list_imagenet(folder: str | Path, *, complete: bool = True, lists: str | Path | None = None) -> list[Entry]:
    """The images of the 202 synsets of 16-class ImageNet in an ImageNet training folder, ``n01514859/*.JPEG`` in it.

    Synsets of no class are passed over. Sorted by class, folder and file name, whatever order the disk gives.

    Args:
        folder: where the synsets' folders are.
        complete: whether all 202 must be there, and all images in `lists`; False asks for one synset per class.
        lists: a folder with the published lists of images, airplane.txt and so on, one file name per line; others are
            passed over. They name 213,555 images, about four in five of these synsets'. None: all images.

    Raises:
        ValueError: no such folder, missing synsets, folders without images, empty (half-copied) files, listed images
            that are not there: all by name.

    Source of the lists: github.com/rgeirhos/generalisation-humans-DNNs, folder 16-class-ImageNet/image_names.
    """
    folders = _subfolders("list_imagenet", folder, "folders named by synset, such as n01514859, with images in them")
    found = {name: path for name, path in folders.items() if name in class_of_synset()}
    if not found:
        hint = f"; is it {Path(folder) / 'train'}?" if "train" in folders else ""
        raise ValueError(
            f"list_imagenet: {folder} must hold folders named by synset, such as n01514859, got "
            f"{', '.join(list(folders)[:5])}{hint}"
        )
    problems = []
    for class_id, name in enumerate(CLASSES):
        members = [synset for synset, owner in class_of_synset().items() if owner == class_id]
        missing = [synset for synset in members if synset not in found]
        if complete:
            problems += [f"{synset} ({name}): no such folder" for synset in missing]
        elif len(missing) == len(members):
            problems.append(
                f"{name}: none of its folders is there ({', '.join(members[:3])}{', ...' * (len(members) > 3)})"
            )
    entries = []
    for synset, path in sorted(found.items(), key=lambda item: (class_of_synset()[item[0]], item[0])):
        class_id = class_of_synset()[synset]
        entries += [Entry(file, class_id, class_id) for file in images_in(path, problems)]
    if lists is not None:
        entries = _only_listed(entries, Path(lists), problems, complete)
    if problems:
        refuse("list_imagenet", folder, problems, "a folder of images for each of the 202 synsets (classes.synsets())")
    return entries


def list_class_folders(folder: str | Path) -> list[Entry]:
    """The images in folders named by class, ``airplane/*.png`` and so on for all `CLASSES`; sorted by class and name.

    Raises:
        ValueError: no such folder, unknown or missing classes, classes without images, empty files: all by name.
    """
    entries, problems = _in_class_folders("list_class_folders", folder)
    if problems:
        refuse("list_class_folders", folder, problems, f"one folder of images per class: {', '.join(CLASSES)}")
    return entries


def list_cue_conflict(folder: str | Path) -> list[Entry]:
    """The images of a cue-conflict folder, ``airplane/airplane1-bicycle2.png`` (or jpg); sorted by class and name.

    The folder is the class of the shape, the file's name says shape and texture (`parse_cue_conflict`). Images whose
    cues agree are listed too: `metrics.shape_bias` leaves them out.

    Raises:
        ValueError: what `list_class_folders` refuses; names that don't parse or disagree with their folder: by name.

    Source: Geirhos et al. (ICLR 2019), folder stimuli of github.com/rgeirhos/texture-vs-shape.
    """
    listed, problems = _in_class_folders("list_cue_conflict", folder)
    entries = []
    for entry in listed:
        try:
            cues = parse_cue_conflict(entry.path)
        except ValueError as error:
            problems.append(f"{entry.name}: {str(error).partition(': ')[2]}")
            continue
        if cues.shape != CLASSES[entry.shape]:
            problems.append(f"{entry.name}: its name says {cues.shape}, its folder {CLASSES[entry.shape]}")
        entries.append(Entry(entry.path, entry.shape, CLASSES.index(cues.texture)))
    if problems:
        expected = "class folders with names such as airplane/airplane1-bicycle2.png (shape, then texture)"
        refuse("list_cue_conflict", folder, problems, expected)
    return entries


def parse_cue_conflict(path: str | Path) -> Cues:
    """What the name of a cue-conflict image says; folder and suffix play no part.

    Raises:
        ValueError: the name is not <class><number>-<class><number>.

    >>> parse_cue_conflict("airplane/airplane1-bicycle2.png")
    Cues(shape='airplane', shape_instance='airplane1', texture='bicycle', texture_instance='bicycle2')
    """
    match = _CUES.fullmatch(Path(path).stem)
    if not match or match[1] not in CLASSES or match[3] not in CLASSES:
        raise ValueError(f"parse_cue_conflict: name must be like airplane1-bicycle2, of the 16 classes, got {path}")
    return Cues(match[1], match[1] + match[2], match[3], match[3] + match[4])


def split(
    entries: Sequence[Entry], fraction: float = 0.9, seed: int = 0, most_per_class: int | None = None
) -> tuple[list[Entry], list[Entry]]:
    """Two lists without a common image, training and evaluation, every class in the same proportion.

    A class's images are put in the order of a hash of seed and file name (without suffix); training takes them from the
    front, evaluation from the back. So neither the listing's order nor the place of the folder matters, a folder of
    mean-pooled copies is split as its originals are, and a smaller `most_per_class` gives parts of the same two lists.
    Both lists keep `entries`' order.

    Args:
        entries: what a list_... function gave; classes are those of the shape.
        fraction: share of training images, strictly between 0 and 1; rounded per class, at least one image each.
        seed: of the hash.
        most_per_class: images of a class in both lists together; None: all. The paper: 1,000, at .9.

    Raises:
        ValueError: a fraction or number out of range, a class with a single image.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"split: fraction must be between 0 and 1, got {fraction}")
    if most_per_class is not None and most_per_class < 2:
        raise ValueError(f"split: most_per_class must be 2 or more, or None, got {most_per_class}")
    of_class: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        of_class[entry.shape].append(entry)
    single = [CLASSES[class_id] for class_id, members in of_class.items() if len(members) < 2]
    if single:
        raise ValueError(f"split: every class must have 2 images or more, got 1 of {', '.join(sorted(single))}")
    training: set[Entry] = set()
    evaluation: set[Entry] = set()
    for members in of_class.values():
        members = sorted(members, key=lambda entry: (_hash(f"{seed}/{entry.path.stem}"), str(entry.path)))
        num_training = _training_share(len(members), fraction)
        if most_per_class is not None and most_per_class < len(members):
            part = _training_share(most_per_class, fraction)
            members = members[:part] + members[len(members) - (most_per_class - part) :]
            num_training = part
        training.update(members[:num_training])
        evaluation.update(members[num_training:])
    return [entry for entry in entries if entry in training], [entry for entry in entries if entry in evaluation]


def refuse(function: str, place: object, problems: Sequence[str], expected: str) -> NoReturn:
    """Raises ValueError: the first problems by name, how many there are in all, and what was expected."""
    lines = [f"  {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"  ... and {len(problems) - _SHOWN} more")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise ValueError(f"{function}: {place} must hold {expected}, got {count}:\n" + "\n".join(lines))


def _training_share(count: int, fraction: float) -> int:
    return min(max(int(count * fraction + 0.5), 1), count - 1)


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _in_class_folders(function: str, folder: str | Path) -> tuple[list[Entry], list[str]]:
    folders = _subfolders(function, folder, "folders named by class, such as airplane")
    problems = [f"{name}: not one of the classes" for name in folders if name not in CLASSES]
    if len(problems) == len(folders):
        names = ", ".join(list(folders)[:5])
        raise ValueError(f"{function}: {folder} must hold folders named {', '.join(CLASSES)}, got {names}")
    problems += [f"{name}: no such folder" for name in CLASSES if name not in folders]
    entries = []
    for class_id, name in enumerate(CLASSES):
        if name in folders:
            entries += [Entry(path, class_id, class_id) for path in images_in(folders[name], problems)]
    return entries, problems


def _only_listed(entries: list[Entry], lists: Path, problems: list[str], complete: bool) -> list[Entry]:
    """The entries whose names, without suffix, are in the lists of their classes, <class>.txt."""
    kept = []
    for class_id, name in enumerate(CLASSES):
        try:
            wanted = {Path(line).stem for line in (lists / f"{name}.txt").read_text(encoding="utf-8").split()}
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{lists / name}.txt: can't be read ({error})")
            continue
        found = [entry for entry in entries if entry.shape == class_id and entry.path.stem in wanted]
        missing = sorted(wanted - {entry.path.stem for entry in found})
        if complete:
            problems += [f"{stem}: no such image, but it is in {name}.txt" for stem in missing]
        if not found:
            problems.append(f"{name}: no image is in {name}.txt")
        kept += found
    return kept


def _subfolders(function: str, folder: str | Path, expected: str) -> dict[str, Path]:
    """Name -> path of the folders in `folder`, sorted; hidden ones are passed over."""
    folder = Path(folder)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing there"
        raise ValueError(f"{function}: {folder} must be a folder with {expected}, got {got}")
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    if not found:
        raise ValueError(f"{function}: {folder} must be a folder with {expected}, got no folder in it")
    return found


def images_in(folder: Path, problems: list[str], *, is_leaf: bool = True) -> list[Path]:
    """The image files in one folder (not below it), sorted by name; hidden and other files are passed over.

    Adds to `problems` what is wrong: empty files, broken links, two files that differ in their suffix alone; and, where
    the folder is a leaf, folders in it and the lack of images.
    """
    found: dict[str, Path] = {}
    with os.scandir(folder) as listing:
        items = sorted((item for item in listing if not item.name.startswith(".")), key=lambda item: item.name)
    for item in items:
        path = folder / item.name
        if item.is_dir():
            if is_leaf:
                problems.append(f"{folder.name}/{item.name}: a folder where images were expected")
        elif path.suffix.lower() in SUFFIXES:
            if path.stem in found:
                problems.append(
                    f"{folder.name}/{item.name}: there is {found[path.stem].name} too, expected one of them"
                )
            found[path.stem] = path
            problem = _file_problem(item)
            if problem:
                problems.append(f"{folder.name}/{item.name}: {problem}")
    if is_leaf and not found:
        problems.append(f"{folder.name}: no images in it ({', '.join(SUFFIXES)})")
    return list(found.values())


def _file_problem(item: os.DirEntry[str]) -> str | None:
    try:
        return None if item.stat().st_size else "0 bytes: copied in part?"
    except OSError as error:
        return f"can't be read ({error.strerror}): a broken link?"
