"""Many bit masks over one weight, without gradient."""

import pytest
import torch
import torch.nn.functional as F

from subnet_kernels import pack_mask, packed_linear

SHAPES = [(1, 1), (3, 5), (16, 16), (7, 33), (300, 1201)]  # the last is taken in blocks


def case(shape, num, rows, dtype=torch.float32):
    torch.manual_seed(0)
    masks = torch.rand(num, *shape) < 0.4
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    return weight, bias, masks, torch.stack([pack_mask(mask) for mask in masks]), torch.randn(rows, shape[1]).to(dtype)


@pytest.mark.parametrize("shared", [False, True], ids=["own rows", "shared rows"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_product_with_each_masked_weight(shape, shared):
    weight, bias, masks, packed, x = case(shape, 3, 6)
    out = packed_linear(x, weight, packed, bias, shared_input=shared).double().chunk(3)
    for made, part, mask in zip(out, [x] * 3 if shared else x.chunk(3), masks, strict=True):
        masked = weight.double() * mask
        allowed = 2**-21 * F.linear(part.double().abs(), masked.abs(), bias.double().abs())  # of sums in fp32
        assert ((made - F.linear(part.double(), masked, bias.double())).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num", [1, 7, 8, 15, 16, 17, 31, 33, 1000, 70_001])
def test_the_kernel_keeps_the_weights_whose_bit_is_set(dtype, num):
    pytest.importorskip("subnet_kernels._C", reason="the extension is not built")
    from tests.kernels.native_inputs import CAPABILITIES, capability

    torch.manual_seed(num)
    weight, mask = torch.randn(num).to(dtype), torch.rand(num) < 0.5
    for name in CAPABILITIES:
        out = torch.full((num,), torch.nan, dtype=dtype)
        with capability(name):
            torch.ops.subnet_native.packed_weight(weight, pack_mask(mask), out)
        assert torch.equal(out, torch.where(mask, weight, torch.zeros((), dtype=dtype)))


def test_bad_input_is_refused():
    weight, bias, _, packed, x = case((4, 6), 2, 4)
    with pytest.raises(ValueError, match=r"packed must be uint8 \[T, 3\], rows of pack_mask for weight \[4, 6\], got"):
        packed_linear(x, weight, packed[:, :2], bias)
    with pytest.raises(ValueError, match="must be a multiple of the 2 masks"):
        packed_linear(x[:3], weight, packed, bias)
    with pytest.raises(ValueError, match=r"needs weight \[N, K\] and x"):
        packed_linear(x[:, :5], weight, packed, bias)
    with pytest.raises(RuntimeError, match="is for evaluation and has no gradient"):
        packed_linear(x.requires_grad_(), weight, packed, bias)
