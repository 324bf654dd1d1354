"""Every Triton kernel in every shipped config compiles for sm_80 and sm_90, without a GPU, into what it should be."""

from __future__ import annotations

import pytest

from subnet_kernels.backends.triton import TritonBackend, load_error

if load_error() is not None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if TritonBackend._is_interpreted():
    pytest.skip("interpreted kernels can't be compiled in the same process", allow_module_level=True)

import triton

from subnet_kernels.backends.triton import (
    convolution,
    elementwise,
    linear_step,
    mask_adamw,
    masked_product,
    sampled,
    score_gradient,
    units,
)
from tests.kernels.compiled_table import HOW_TO_RENEW, TRITON, read_table
from tests.kernels.triton_ahead import ARCHS, MASKED, ODD, SHARED_LIMIT, builds, compile_ahead

BUILDS = {f"{build.name} {build.dtype}": build for build in builds()}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", BUILDS)
def test_no_spills_tensor_cores_where_they_belong_and_the_committed_table(name, arch):
    build = BUILDS[name]
    row = compile_ahead(build, arch)
    assert row.spilled_bytes == 0 or (ODD in build.label and build.kernel is not linear_step.linear_step_kernel), row
    assert row.shared_bytes <= SHARED_LIMIT[arch] and not row.is_serialised, row
    if build.is_gemm:
        wgmma = "wgmma from registers" if row.kernel.startswith(MASKED) else "wgmma from shared memory"
        assert row.products == ("fma" if "ieee" in build.label else wgmma if arch == 90 else "mma"), row
    if triton.__version__ != TRITON:
        return  # another compiler, another number of registers
    key = (row.kernel, row.dtype, str(arch))
    committed = [r for r in read_table("triton") if (r["kernel"], r["dtype"], r["arch"]) == key]
    assert committed == [row.as_text()], HOW_TO_RENEW


def test_no_kernel_is_left_out():
    modules = (convolution, elementwise, linear_step, mask_adamw, masked_product, sampled, score_gradient, units)
    written = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert written == {build.kernel.__name__ for build in BUILDS.values()}


def test_the_table_holds_nothing_else():
    keys = {(r["kernel"], r["dtype"], r["arch"]) for r in read_table("triton")}
    assert keys == {(build.name, build.dtype, str(arch)) for build in BUILDS.values() for arch in ARCHS}
