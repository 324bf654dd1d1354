"""What nvcc made of the CUDA C++ kernels, read from the built extension, without a GPU.

    python -m tests.kernels.cuda_ahead        # says it, kernel by kernel
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.kernels.compiled_table import Row, products_of

LOCAL = re.compile(r"\b(?:STL|LDL)(?:\.LU)?(?:\.(\d+))?\b")  # a load or store of a thread's stack and its bits


def extension() -> Path | None:
    """The built extension, if there is one."""
    spec = importlib.util.find_spec("subnet_kernels._C")
    return Path(spec.origin) if spec and spec.origin else None


def cuobjdump() -> str | None:
    """NVIDIA's reader of cubins: the CUDA toolkit's, or the one that comes with Triton."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec and spec.origin:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.exists() else None
    return found


def nvcc_version() -> str | None:
    """As 13.0.88, of the nvcc that a build here uses."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", said)
    return found[1] if found else None


def _read(option: str, file: Path) -> str:
    command = [str(cuobjdump()), option, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _names(mangled: list[str]) -> dict[str, str]:
    """Mangled -> the kernel's name and what it was instantiated with."""
    said = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return {name: _short(full) for name, full in zip(mangled, said.splitlines())}


def _short(demangled: str) -> str:
    name = demangled.replace("(anonymous namespace)::", "").replace("void ", "").replace("subnet::", "")
    if product := re.match(r"cutlass::\w+<kernels::(\w+)>", name):
        return product[1]
    return re.sub(r"\(\w+\)(\d)", r"\1", name.split("(const")[0].rsplit("(", 1)[0] if name.endswith(")") else name)


def _by_function(text: str, pattern: str) -> Iterator[tuple[int, str, str]]:
    """(architecture, mangled name, what is said about it)"""
    for section in re.split(r"^Fatbin elf code:$", text, flags=re.MULTILINE)[1:]:
        section = section.split("Fatbin ptx code:")[0]
        arch = re.search(r"arch = sm_(\d+)", section)
        parts = re.split(pattern, section, flags=re.MULTILINE)
        for name, said in zip(parts[1::2], parts[2::2]):
            yield int(arch[1]) if arch else 0, name, said


def rows(file: Path) -> list[Row]:
    """One for each kernel and architecture in the extension."""
    resources = {
        (arch, name): said for arch, name, said in _by_function(_read("-res-usage", file), r"^\s*Function (\S+):$")
    }
    found = []
    for arch, name, code in _by_function(_read("-sass", file), r"^\s*Function : (\S+)$"):
        usage = resources[arch, name]
        number = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "SHARED")}  # type: ignore[index]
        local = sum(int(bits or 32) // 8 for bits in LOCAL.findall(code))
        products = products_of(code).replace("fma", "")  # most are no products
        wgmma = re.findall(r"HGMMA\.(.*?);", code)
        is_serialised = bool(wgmma) and all("gsb0" in one for one in wgmma)  # ptxas waits for each of them (C7510)
        found.append((name, Row("cuda", "", "", arch, number["REG"], local, number["SHARED"], products, is_serialised)))
    names = _names(sorted({name for name, _ in found}))
    return sorted((row._replace(kernel=names[name]) for name, row in found), key=lambda row: (row.kernel, row.arch))


def main() -> int:
    file = extension()
    if file is None or cuobjdump() is None:
        print("no extension is built here, or there is no cuobjdump", file=sys.stderr)
        return 1
    for row in rows(file):
        print(*row, sep=",")
    return 0


if __name__ == "__main__":
    sys.exit(main())
