"""What setup.py decides: where CUTLASS's headers are, what its kernels are called, which objects are made anew."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def setup_py():
    """The functions and tables of setup.py, without running its setup()."""
    names: dict = {}
    exec(compile((ROOT / "setup.py").read_text().split("class BuildExtension")[0], "setup.py", "exec"), names)
    return names


def headers(folder: Path) -> Path:
    (folder / "include" / "cutlass").mkdir(parents=True)
    (folder / "include" / "cutlass" / "cutlass.h").touch()
    return (folder / "include").resolve()


def test_cutlass_is_where_the_variable_says_or_nowhere(tmp_path, monkeypatch):
    find = setup_py()["find_cutlass"]
    monkeypatch.chdir(tmp_path)
    copy = headers(tmp_path / "build" / "cutlass")
    monkeypatch.setenv("CUTLASS_HOME", str(tmp_path / "own"))
    assert find() is None  # a variable that leads nowhere is no reason to take other headers
    own = headers(tmp_path / "own")
    assert find() == own != copy


def test_a_copy_in_build_serves_where_the_package_is_not_installed(tmp_path, monkeypatch):
    names = setup_py()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUTLASS_HOME", raising=False)
    names["find_spec"] = lambda name: None
    assert names["find_cutlass"]() is None
    copy = headers(tmp_path / "build" / "cutlass")
    assert names["find_cutlass"]() == copy


def test_the_products_have_the_same_names_in_setup_py_and_in_the_header():
    header = (ROOT / "csrc" / "cuda" / "gemm" / "score_gradient.h").read_text()
    assert set(re.findall(r"kernel\((\w+)\)", header)) == set(setup_py()["GEMMS"])


def test_a_product_is_compiled_for_its_own_architecture_and_without_asserts():
    names = setup_py()
    for kernel, (source, dtype, weight_dtype, tile) in names["GEMMS"].items():
        command = names["gemm_command"]("nvcc", Path("/headers"), kernel)
        archs = [part for part in command if part.startswith("arch=")]
        if kernel.startswith("sm90"):
            assert archs == ["arch=compute_90a,code=sm_90a"]
        else:
            assert archs == ["arch=compute_80,code=sm_80", "arch=compute_80,code=compute_80"]
        assert kernel.startswith(source[-4:]) and kernel.endswith(tile)
        assert kernel == "_".join(dict.fromkeys([source[-4:], dtype, weight_dtype, tile]))
        assert {"-DNDEBUG", f"-DSUBNET_KERNEL={kernel}", f"-DSUBNET_DTYPE={dtype}"} <= set(command)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_an_object_is_made_anew_when_something_that_it_reads_or_its_command_changed(tmp_path, monkeypatch):
    compile_object = setup_py()["compile_object"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.h").write_text("#define A 1\n")
    (tmp_path / "a.cpp").write_text('#include "a.h"\nint a() { return A; }\n')
    runs = tmp_path / "runs"
    (tmp_path / "compiler").write_text('#!/bin/sh\necho run >> runs\nexec g++ "$@"\n')
    (tmp_path / "compiler").chmod(0o755)

    def number_of_runs(*more: str) -> int:
        compile_object("a.o", ["./compiler", *more, "-MD", "-c", "a.cpp", "-o", "a.o"])
        return len(runs.read_text().splitlines())

    assert [number_of_runs(), number_of_runs()] == [1, 1]
    (tmp_path / "a.h").write_text("#define A 2\n")
    assert [number_of_runs(), number_of_runs()] == [2, 2]
    assert [number_of_runs("-O1"), number_of_runs("-O1")] == [3, 3]
    (tmp_path / "a.o").unlink()
    assert number_of_runs("-O1") == 4
