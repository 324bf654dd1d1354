"""Packed masks: layout by hand, round trips at awkward sizes, errors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subnet_kernels import packing
from subnet_kernels.packing import pack_mask, unpack_mask


@pytest.fixture(autouse=True, params=["native", "python"])
def path(request, monkeypatch):
    """Run every test on the compiled operators where they exist, and always on the Python path."""
    if request.param == "python":
        monkeypatch.setattr(packing.native, "is_available", lambda: False)
    elif not packing.native.is_available():
        pytest.skip("the extension is not built here")
    return request.param


def test_element_i_is_bit_i_mod_8_of_byte_i_div_8():
    for i in range(20):
        mask = torch.zeros(20, dtype=torch.bool)
        mask[i] = True
        expected = [0, 0, 0]
        expected[i // 8] = 1 << (i % 8)
        assert pack_mask(mask).tolist() == expected


def test_order_is_the_c_order_of_the_shape_whatever_the_strides():
    mask = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    assert pack_mask(mask).tolist() == [0b01100001, 0]
    assert pack_mask(mask.t().contiguous().t()).tolist() == [0b01100001, 0]
    assert pack_mask(mask.t()).tolist() == [0b00001011, 0]
    channels_last = (torch.rand(3, 5, 2, 2) < 0.5).to(memory_format=torch.channels_last)
    assert torch.equal(pack_mask(channels_last), pack_mask(channels_last.contiguous()))
    assert torch.equal(unpack_mask(pack_mask(channels_last), channels_last.shape), channels_last)


@settings(max_examples=60, deadline=None)
@given(bits=st.lists(st.booleans(), max_size=130))
def _check_against_numpy(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_mask(mask)
    assert packed.numpy().tolist() == np.packbits(np.array(bits, dtype=bool), bitorder="little").tolist()
    assert torch.equal(unpack_mask(packed, (len(bits),)), mask)


def test_packing_equals_numpy_little_endian_packbits_and_round_trips():
    _check_against_numpy()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (9,), (3, 0, 2), (5, 13), (2, 3, 5, 7), (1031,)])
def test_round_trip_at_odd_and_empty_shapes(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8 and packed.shape == ((mask.numel() + 7) // 8,)
    unpacked = unpack_mask(packed, shape)
    assert unpacked.dtype == torch.bool and unpacked.is_contiguous() and torch.equal(unpacked, mask)


def test_every_byte_unpacks_to_its_bits():
    packed = torch.arange(256, dtype=torch.uint8)
    bits = unpack_mask(packed, (256, 8))
    assert (bits.long() * 2 ** torch.arange(8)).sum(1).tolist() == list(range(256))


def test_a_strided_packed_tensor_unpacks_to_its_own_bytes():
    packed = torch.tensor([3, 99, 128, 99], dtype=torch.uint8)[::2]
    assert unpack_mask(packed, (16,)).nonzero().flatten().tolist() == [0, 1, 15]


@pytest.mark.parametrize("num", [1, 5, 7, 9, 15])
def test_a_set_padding_bit_is_refused(num):
    packed = pack_mask(torch.ones(num, dtype=torch.bool))
    for bit in range(num % 8, 8):
        damaged = packed.clone()
        damaged[-1] |= 1 << bit
        with pytest.raises(ValueError, match="padding bits"):
            unpack_mask(damaged, (num,))


def test_wrong_sizes_and_types_are_refused_in_words():
    packed = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"must have shape \[3\] for a mask of shape \[17\], got \[2\]"):
        unpack_mask(packed, (17,))
    with pytest.raises(ValueError, match=r"must have shape \[1\]"):
        unpack_mask(packed, (8,))
    with pytest.raises(ValueError, match=r"got \[1, 2\]"):
        unpack_mask(packed.view(1, 2), (16,))
    with pytest.raises(TypeError, match="uint8 tensor"):
        unpack_mask(packed.int(), (16,))
    with pytest.raises(TypeError, match="sequence of integers"):
        unpack_mask(packed, 16)
    with pytest.raises(ValueError, match="non-negative"):
        unpack_mask(packed, (-1, 16))
    with pytest.raises(TypeError, match=r"bool tensor, got a torch.float32 tensor"):
        pack_mask(torch.rand(3))
    with pytest.raises(TypeError, match="got list"):
        pack_mask([True])


def test_both_paths_of_unpacking_agree():
    packed = torch.arange(256, dtype=torch.uint8)
    shifted = ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().view(-1)[:2045]
    assert torch.equal(packing.unpack_bits(packed, 2045), shifted)
    assert packing.unpack_bits(packed.to("meta"), 2045).shape == (2045,)
