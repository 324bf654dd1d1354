"""What nvcc made of the CUDA C++ kernels in the built extension is what it should be, without a GPU."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest

from tests.kernels import cuda_ahead
from tests.kernels.compiled_table import HOW_TO_RENEW, NVCC, Row, read_table
from tests.packaging.test_setup import setup_py

if shutil.which("nvcc") is None:
    pytest.skip("there is no nvcc, so the extension has no CUDA kernels", allow_module_level=True)
if cuda_ahead.cuobjdump() is None:
    pytest.skip("there is no cuobjdump to read them with", allow_module_level=True)

ROOT = Path(__file__).parents[2]
ARCHS = (80, 90)


@functools.cache
def built() -> tuple[Row, ...]:
    file = cuda_ahead.extension()
    assert file is not None, "nvcc is here, so the extension must be built: make setup"
    return tuple(cuda_ahead.rows(file))


def gemms() -> list[str]:
    return [f"score_gradient_{name}" for name in setup_py()["GEMMS"]]


def has_cutlass() -> bool:
    return setup_py()["find_cutlass"]() is not None


def test_no_kernel_spills_or_has_its_wgmma_serialised():
    assert built()
    assert [row for row in built() if row.spilled_bytes or row.is_serialised] == []


def test_products_run_on_tensor_cores_and_each_is_built_for_its_own_architecture():
    if not has_cutlass():
        pytest.skip("the headers of CUTLASS are not here: make cutlass fetches them")
    found = {(row.kernel, row.arch): row.products for row in built() if row.products}
    few_rows = {key for key in found if key[0].startswith("masked_linear_kernel<")}
    assert len(few_rows) == 2 * 3 * 2 * len(ARCHS)  # dtypes, tiles of rows of x, warps along the rows of weight
    wanted = {(n, 90): "wgmma from shared memory" for n in gemms() if "sm90" in n}
    wanted |= {(n, 80): "mma" for n in gemms() if "sm80" in n} | dict.fromkeys(few_rows, "mma")
    assert found == wanted


def test_every_kernel_in_the_sources_is_in_the_extension_for_every_architecture():
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        kernels = {word.split("(")[0] for word in source.read_text().split() if "_kernel(" in word}
        assert kernels, source
        for kernel in kernels:
            archs = {row.arch for row in built() if row.kernel.split("<")[0] == kernel}
            assert archs == set(ARCHS), (source, kernel)


def test_the_built_kernels_are_those_of_the_committed_table():
    if cuda_ahead.nvcc_version() != NVCC:
        pytest.skip(f"the table is of nvcc {NVCC}, here is {cuda_ahead.nvcc_version()}")
    committed = read_table("cuda")
    if not has_cutlass():
        committed = [row for row in committed if not row["products"]]
    assert [row.as_text() for row in built()] == committed, HOW_TO_RENEW




def test_a_disassembly_is_read_as_it_is_written():
    spilled = "STL [R1+0x4], R3 ;\nLDL.64 R2, [R1] ;\nLDL.LU.128 R4, [R1+0x10] ;\nSTG.E [R2.64], R5 ;"
    assert sum(int(bits or 32) // 8 for bits in cuda_ahead.LOCAL.findall(spilled)) == 4 + 8 + 16
    assert cuda_ahead._short("void cutlass::device_kernel<subnet::kernels::one>(subnet::kernels::one::Params)") == "one"
    assert cuda_ahead._short("void subnet::(anonymous namespace)::k<(subnet::Kind)1>(subnet::P)") == "k<1>"
