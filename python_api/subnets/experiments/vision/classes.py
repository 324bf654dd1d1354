"""The 16 classes of the vision experiment, in an order that no directory decides, and ImageNet's synsets of each."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

CLASSES = (
    "airplane", "bear", "bicycle", "bird", "boat", "bottle", "car", "cat",
    "chair", "clock", "dog", "elephant", "keyboard", "knife", "oven", "truck",
)  # fmt: skip
"""Class names; a class id is the place in this tuple."""


@cache
def class_of_synset() -> dict[str, int]:
    """WordNet id -> class id for the 202 synsets of 16-class ImageNet, such as ``"n02690373" -> 0``."""
    return {synset: CLASSES.index(name) for name, members in synsets().items() for synset in members}


def synsets() -> dict[str, list[str]]:
    """Class name -> WordNet ids of its synsets in ILSVRC-2012, 202 in all; sorted, classes in `CLASSES`' order.

    Source: Geirhos et al. (NeurIPS 2018), 16-class ImageNet, whose image lists name 213,555 training images, not all of
    these synsets' (`folders.list_imagenet` can keep to them). Its list of synsets has five kinds of truck more (fire
    engine, minivan, pickup, police van, tow truck), of which the image lists hold nothing.
    """
    return _listed("synsets")


def outputs() -> dict[str, list[int]]:
    """Class name -> which of the 1,000 outputs of an ImageNet classifier count as the class, 207 in all.

    Outputs stand for ILSVRC-2012's synsets in sorted order. Here the five kinds of truck are in, as in the published
    evaluation of ImageNet networks (Geirhos et al., ICLR 2019).
    """
    return _listed("outputs")


def _listed(key: str) -> dict[str, list[Any]]:
    mapping = json.loads((Path(__file__).parent / "imagenet16.json").read_text(encoding="utf-8"))[key]
    return {name: list(mapping[name]) for name in CLASSES}
