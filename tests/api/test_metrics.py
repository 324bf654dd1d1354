"""Shape bias, counted by hand."""

import numpy as np
import pytest
import torch
from subnets.metrics import shape_bias


def test_shape_bias_is_the_share_of_shape_among_shape_and_texture_decisions():
    #            shape  shape  texture  third  agree
    predicted = ["cat", "car", "dog", "oven", "bear"]
    shape = ["cat", "car", "cat", "cat", "bear"]
    texture = ["dog", "dog", "dog", "dog", "bear"]
    assert shape_bias(predicted, shape, texture) == 2 / 3


def test_images_whose_cues_agree_are_left_out():
    assert shape_bias([1, 1, 2], shape=[1, 1, 1], texture=[1, 1, 2]) == 0.0
    assert shape_bias([1, 1, 1], shape=[1, 1, 1], texture=[1, 1, 2]) == 1.0


def test_ids_may_come_as_lists_arrays_and_tensors():
    predicted, shape, texture = [0, 1, 2, 3], [0, 1, 1, 3], [1, 0, 2, 0]
    assert shape_bias(torch.tensor(predicted), np.array(shape), texture) == 0.75
    assert shape_bias([np.int64(i) for i in predicted], [torch.tensor(i) for i in shape], texture) == 0.75
    assert shape_bias(np.array(["a", "b"]), ["a", "a"], ["b", "b"]) == 0.5


@pytest.mark.parametrize(
    ("predicted", "shape", "texture", "error", "words"),
    [
        (["oven"], ["cat"], ["dog"], ValueError, "got none among 1 images whose cues differ"),
        (["cat"], ["cat"], ["cat"], ValueError, "got none among 0 images"),
        ([], [], [], ValueError, "got none among 0 images"),
        (["cat"], ["cat", "dog"], ["dog", "cat"], ValueError, "one entry per image"),
        ([0], ["cat"], ["dog"], TypeError, "names everywhere or ids everywhere"),
        ("cat", ["cat"], ["dog"], TypeError, "single text 'cat'"),
        ([0.5], [1], [2], TypeError, "names .* or ids"),
        ([1, "cat"], [1, 2], [2, 1], TypeError, "got int, str"),
        (torch.zeros(2, 3).long(), [1, 2], [2, 1], TypeError, "got list"),
    ],
)
def test_bad_input_is_refused_in_words(predicted, shape, texture, error, words):
    with pytest.raises(error, match=words):
        shape_bias(predicted, shape, texture)


def test_ties_of_shape_and_texture_decisions_are_half():
    assert shape_bias(["cat", "dog"], ["cat", "cat"], ["dog", "dog"]) == 0.5
    assert shape_bias([1, 2, 2, 1, 9], shape=[1, 1, 2, 2, 1], texture=[2, 2, 1, 1, 2]) == 0.5


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_a_whole_cue_conflict_set_is_judged_by_its_1200_images_whose_cues_differ(kind):
    """16 classes of shape and 16 of texture, five images of each pair: 80 of 1,280 agree."""
    names = [f"class {i}" for i in range(16)]
    shape = [s for s in names for t in names for _ in range(5)]
    texture = [t for s in names for t in names for _ in range(5)]
    # of each pair's five images three are decided by shape, one by texture and one by neither
    third = {(s, t): next(n for n in names if n not in (s, t)) for s in names for t in names}
    predicted = [(s, s, s, t, third[s, t])[i % 5] for i, (s, t) in enumerate(zip(shape, texture, strict=True))]
    assert shape_bias(kind(predicted), kind(shape), kind(texture)) == (3 * 240) / (3 * 240 + 240) == 0.75
    # counting the 80 images whose cues agree, as decided by shape, gives another number
    decided_by_shape = sum(p == s for p, s in zip(predicted, shape, strict=True))
    decided_by_texture = sum(p == t != s for p, s, t in zip(predicted, shape, texture, strict=True))
    assert decided_by_shape / (decided_by_shape + decided_by_texture) == 784 / 1024
