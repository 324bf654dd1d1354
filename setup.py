"""Builds the extension subnet_kernels._C; everything else is in pyproject.toml.

One file, subnet_kernels/_C.abi3.so, serves Python >= 3.10 and PyTorch >= 2.11 (LibTorch stable ABI). The CPU part needs
g++ (or $CXX); csrc/cuda is added where nvcc is found ($CUDA_HOME/bin or PATH), which needs no GPU and no CUDA build of
PyTorch, and csrc/cuda/gemm where the headers of CUTLASS are found too. Without PyTorch or without a compiler the
package is built without the extension and runs on its reference.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH_TARGET = "0x020b000000000000"  # PyTorch 2.11
CPU_CAPABILITIES = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
CUDA_ARCHS = ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"]
# The products on CUTLASS: kernel -> (source in csrc/cuda/gemm, dtypes of factors and weight, tile). Up to a minute of
# compiler each. sm_90a code runs on compute capability 9.0 alone, sm_80's anywhere from 8.0 on.
GEMMS = {
    "sm90_bf16_pingpong": ("score_gradient_sm90", "bf16", "bf16", "pingpong"),
    "sm90_bf16_wide": ("score_gradient_sm90", "bf16", "bf16", "wide"),
    "sm90_bf16_stream_k": ("score_gradient_sm90", "bf16", "bf16", "stream_k"),
    "sm90_fp16_pingpong": ("score_gradient_sm90", "fp16", "fp16", "pingpong"),
    "sm90_bf16_fp32_pingpong": ("score_gradient_sm90", "bf16", "fp32", "pingpong"),
    "sm80_bf16_stream_k": ("score_gradient_sm80", "bf16", "bf16", "stream_k"),
    "sm80_fp16_stream_k": ("score_gradient_sm80", "fp16", "fp16", "stream_k"),
    "sm80_bf16_fp32_stream_k": ("score_gradient_sm80", "bf16", "fp32", "stream_k"),
}
GEMM_ARCHS = {
    "sm90": ["arch=compute_90a,code=sm_90a"],
    "sm80": ["arch=compute_80,code=sm_80", "arch=compute_80,code=compute_80"],
}
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden -cudart=static".split()
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wno-psabi".split()


def find_compiler() -> list[str] | None:
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(shlex.split(name)[0]):
            return shlex.split(name)
    return None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def find_cutlass() -> Path | None:
    """Where CUTLASS's headers are: in $CUTLASS_HOME, the package nvidia-cutlass, or build/cutlass, a copy for machines
    without network."""
    spec = find_spec("cutlass_library")
    places = [Path(spec.origin).parent / "source"] if spec and spec.origin else []
    home = os.environ.get("CUTLASS_HOME")
    for place in [Path(home)] if home else [*places, Path("build/cutlass")]:
        if (place / "include" / "cutlass" / "cutlass.h").is_file():
            return (place / "include").resolve()
    return None


def gemm_command(nvcc: str, cutlass: Path, kernel: str) -> list[str]:
    source, dtype, weight_dtype, tile = GEMMS[kernel]
    archs = [part for arch in GEMM_ARCHS[kernel.split("_")[0]] for part in ("-gencode", arch)]
    names = {"KERNEL": kernel, "DTYPE": dtype, "WEIGHT_DTYPE": weight_dtype, "TILE": tile}
    return [
        nvcc, *NVCC_FLAGS, "-DNDEBUG", "--expt-relaxed-constexpr", "-isystem", str(cutlass), *archs,
        *(f"-DSUBNET_{name}={value}" for name, value in names.items()), "-MD", "-c", f"csrc/cuda/gemm/{source}.cu",
    ]  # fmt: skip


def object_commands(
    cxx: list[str], nvcc: str | None, cutlass: Path | None, torch_dir: Path, out: Path
) -> dict[str, list[str]]:
    """Object file -> the command that makes it."""
    is_x86 = sysconfig.get_platform().endswith(("x86_64", "amd64"))
    defines = ["-DSUBNET_X86"] if is_x86 else []
    torch_flags = [f"-isystem{torch_dir}/include", f"-isystem{sysconfig.get_path('include')}"]
    gemms = GEMMS if nvcc and cutlass else {}
    bindings = ["binding", *(["binding_cuda"] if nvcc else []), *(["binding_gemm"] if gemms else [])]
    commands = {
        **{f"{out}/{name}.o": [*cxx, *CXX_FLAGS, *defines, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *torch_flags,
                               "-c", f"csrc/{name}.cpp"] for name in bindings},
        f"{out}/capability.o": [*cxx, *CXX_FLAGS, *defines, "-c", "csrc/cpu/capability.cpp"],
    }  # fmt: skip
    for capability, flags in CPU_CAPABILITIES.items():
        if capability != "portable" and not is_x86:
            continue
        for source in sorted(Path("csrc/cpu").glob("*.cpp")):
            if source.stem != "capability":
                define = f"-DSUBNET_CAPABILITY={capability}"
                commands[f"{out}/{source.stem}.{capability}.o"] = [
                    *cxx, *CXX_FLAGS, *flags, "-Wno-maybe-uninitialized", *defines, define, "-c", str(source),
                ]  # fmt: skip
    if nvcc:
        archs = [part for arch in CUDA_ARCHS for part in ("-gencode", arch)]
        for source in sorted(Path("csrc/cuda").glob("*.cu")):
            commands[f"{out}/{source.stem}.cuda.o"] = [
                nvcc, *NVCC_FLAGS, *archs, "-c", str(source),
            ]  # fmt: skip
    if nvcc and cutlass:  # first, as they take longest
        slow = {f"{out}/{kernel}.gemm.o": gemm_command(nvcc, cutlass, kernel) for kernel in gemms}
        commands = slow | commands
    return {target: [*command, "-o", target] for target, command in commands.items()}


def read_by(listed: Path) -> list[Path]:
    """The files that a compiler read, as its -MD lists them."""
    return [Path(name) for name in listed.read_text().split(":", 1)[1].replace("\\\n", " ").split()]


def key_of(command: list[str], listed: Path) -> str:
    read = [path.read_bytes() if path.exists() else b"" for path in read_by(listed)]
    return hashlib.sha256(shlex.join(command).encode() + b"".join(read)).hexdigest()


def compile_object(target: str, command: list[str]) -> None:
    """Run the command that makes an object file; one with -MD, which takes a minute, only if something that it reads
    has changed since."""
    listed, key = Path(target).with_suffix(".d"), Path(target).with_suffix(".key")
    if os.path.exists(target) and key.exists() and key.read_text() == key_of(command, listed):
        return
    key.unlink(missing_ok=True)
    start = time.time()
    subprocess.run(command, check=True)
    if "-MD" in command and all(path.stat().st_mtime < start for path in read_by(listed)):  # none changed meanwhile
        key.write_text(key_of(command, listed))


def cuda_library_flags(nvcc: str) -> list[str]:
    root = Path(nvcc).resolve().parent.parent
    if os.environ.get("CUDA_HOME"):
        root = Path(os.environ["CUDA_HOME"])
    found = sorted(root.glob("**/libcudart_static.a"))
    if not found:  # nvcc may be a script that calls the real one: ask it
        dry = subprocess.run([nvcc, "--dryrun", "-cudart=static", "x.o"], capture_output=True, text=True).stderr
        folders = [flag.strip('"') for flag in dry.split() if flag.startswith(('"-L', "-L"))]
        return [*(folder.strip('"') for folder in folders), "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    return [f"-L{found[0].parent}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]


class BuildExtension(build_ext):
    """Compiles in parallel, links, and puts the new file in place by renaming, so that a running import is safe."""

    def run(self) -> None:  # setuptools' own would compile elsewhere and copy, which is not safe under a running import
        for ext in self.extensions:
            self.build_extension(ext)

    def build_extension(self, ext: Extension) -> None:
        torch_spec, cxx = find_spec("torch"), find_compiler()
        missing = "PyTorch is not installed here" if not torch_spec else "no C++ compiler was found" if not cxx else ""
        if not missing:
            try:
                return self.compile(ext, cxx, Path(torch_spec.origin).parent)
            except (OSError, subprocess.CalledProcessError) as error:
                missing = f"the compiler failed ({error})"
        if self.inplace:  # what an earlier build left is of other sources
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        message = f"subnet-kernels: built without the extension, because {missing}."
        if self.inplace and not getattr(self, "editable_mode", False):
            sys.exit(message)  # `setup.py build_ext --inplace` asks for the extension and nothing else
        print(message, file=sys.stderr)

    def compile(self, ext: Extension, cxx: list[str], torch_dir: Path) -> None:
        nvcc = find_nvcc()
        out = Path(self.build_temp)
        out.mkdir(parents=True, exist_ok=True)
        commands = object_commands(cxx, nvcc, find_cutlass() if nvcc else None, torch_dir, out)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(compile_object, commands, commands.values()):
                pass
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".new")
        # libtorch.so pulls in libtorch_cuda where that exists; without --no-as-needed the linker would drop it.
        libraries = [f"-L{torch_dir}/lib", "-Wl,--no-as-needed", "-ltorch", *(cuda_library_flags(nvcc) if nvcc else [])]
        subprocess.run([*cxx, "-shared", "-s", *commands, *libraries, "-o", str(fresh)], check=True)
        os.replace(fresh, target)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


setup(
    ext_modules=[Extension("subnet_kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
