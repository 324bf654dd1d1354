"""The committed table of what the compilers made of every GPU kernel, Triton's and CUDA C++'s.

    python -m tests.kernels.compiled_table         # writes compiled_kernels.csv anew; needs nvcc and CUTLASS
    python -m tests.kernels.compiled_table cuda    # the rows of one language alone
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("compiled_kernels.csv")
NVCC = "13.0.88"  # whose registers stand in the table; another compiler, another number
TRITON = "3.7.1"
HOW_TO_RENEW = "run `python -m tests.kernels.compiled_table` and commit the table if this was meant"


class Row(NamedTuple):
    """One kernel in one configuration. products: "wgmma" and where its left operand lies, "mma", "fma", or "" for a
    kernel that is no matrix product. spilled_bytes: of the instructions that store to and load from local memory.
    shared_bytes: in CUDA C++ the static ones, and 1024 of the system's on sm_90."""

    language: str
    kernel: str
    dtype: str
    arch: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    products: str
    is_serialised: bool

    def as_text(self) -> dict[str, str]:
        return {name: str(value) for name, value in self._asdict().items()}


def read_table(language: str) -> list[dict[str, str]]:
    """The rows of one language, "triton" or "cuda"."""
    with TABLE.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["language"] == language]


def products_of(code: str) -> str:
    """Row.products of a disassembly; "fma" where no tensor core takes part."""
    wgmma = re.findall(r"HGMMA\.\S+ R\d+, (\S+?)[,.]", code)
    if wgmma:
        return "wgmma from registers" if all(left.startswith("R") for left in wgmma) else "wgmma from shared memory"
    return "mma" if re.search(r"\bHMMA\.", code) else "fma"


def triton_rows() -> list[Row]:
    from tests.kernels.triton_ahead import ARCHS, builds, compile_ahead

    return [compile_ahead(build, arch) for build in builds() for arch in ARCHS]


def cuda_rows() -> list[Row]:
    from tests.kernels import cuda_ahead

    extension = cuda_ahead.extension()
    if extension is None:
        raise SystemExit("the extension is not built: make setup")
    return cuda_ahead.rows(extension)


def main(languages: list[str]) -> None:
    makers = {"triton": triton_rows, "cuda": cuda_rows}
    rows = []
    for language, make in makers.items():
        rows += [row.as_text() for row in make()] if language in (languages or makers) else read_table(language)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, Row._fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(TABLE.read_text(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
