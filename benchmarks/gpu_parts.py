"""The parts of gpu_check, in the order in which they run: what each checks or measures, and what it may cost."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from subnet_kernels.dispatch import BACKENDS

from . import cases, gpu_correctness, gpu_cuda, gpu_masks, gpu_sampled
from .models import MODEL_CASES, make_trainers, run_model
from .rows import ROOT, Row
from .runner import Settings, free_memory, run_kernel, run_layer
from .timing import TimingConfig

if TYPE_CHECKING:
    from .gpu_check import Check

TIMING = TimingConfig(num_rounds=31, min_rounds=11, budget_s=2.0)
_running: dict[str, subprocess.Popen[bytes]] = {}
GPU_TESTS = ("tests/kernels/test_gpu.py", "tests/kernels/test_triton.py", "tests/kernels/test_triton_sampled.py")
COMPILED_LINEAR = ("768x3072_m1024", "768x3072_m10240", "4096x11008_m4096", "512x128_m10240")  # those with aims first


def build(check: Check) -> None:
    """The extension, in place."""
    if check.device == "cpu":
        (check.out / "build.log").write_text("dry run: nothing is built\n")
        return check.skip("build", "dry run")
    code = check.run([sys.executable, "setup.py", "build_ext", "--inplace"], "build.log", 240)
    if code != 0:
        check.fail(f"build: {'took over 240 s' if code is None else f'exit code {code}'}, see build.log")
    from subnet_kernels.backends.native import has_cuda_kernels, load_error

    if load_error() is not None:
        check.fail(f"build: {load_error()}")
    elif not has_cuda_kernels():
        check.fail("build: the extension has no CUDA kernels (was nvcc found? see build.log)")


def correctness(check: Check) -> None:
    """Every op of every backend against fp64, on fresh random inputs and outputs filled with NaN."""
    for name in ("sanitizer", "tests"):  # nothing is timed here, and they mostly wait for compilers
        if name in check.selected and check.device == "cuda":
            _start(check, name)
    check.say("  reference backend")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # fp32 is meant
        check.take(gpu_correctness.reference_checks(check.device, check.seed))
    check.say("  the extension's effective weights")
    backend = "cuda" if check.device == "cuda" else "cpu"
    check.take(gpu_correctness.effective_weights_checks(backend, check.device, check.seed))
    if check.device == "cpu":
        return check.skip("graph replay, refusals and the triton backend", "dry run")
    check.take(gpu_correctness.refusal_check(check.device))
    check.take(gpu_correctness.graph_check("cuda", check.device, check.seed))
    check.say("  cuda backend")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check.take(gpu_cuda.cuda_checks(check.device, check.seed))
        check.take(gpu_cuda.layer_checks(check.device, check.seed))
        check.take(gpu_masks.checks(check.device, check.seed, BACKENDS["cuda"]))
    for name in ("cuda", "triton"):
        check.say(f"  sampled masks on {name}")
        check.take(gpu_sampled.checks(check.device, check.seed, BACKENDS[name]))
        check.take(gpu_sampled.graph_check(check.device, check.seed, BACKENDS[name]))
    check.say("  cuda backend's products")
    check.take(gpu_correctness.cuda_score_gradient_checks(check.seed))
    check.take(gpu_correctness.cuda_few_rows_checks(check.seed))
    check.say("  triton backend")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check.take(gpu_correctness.triton_checks(check.device, check.seed))
        check.take(gpu_correctness.step_checks(check.device, check.seed))
        check.take(gpu_masks.checks(check.device, check.seed, BACKENDS["triton"]))
        check.take(gpu_masks.product_checks(check.device, check.seed, BACKENDS["triton"]))
    check.take(gpu_correctness.effective_weights_checks("triton", check.device, check.seed))
    check.take(gpu_correctness.graph_check("triton", check.device, check.seed))


def _start(check: Check, name: str) -> subprocess.Popen[bytes] | None:
    """Start a part that is a process of its own, once; None where it can't run, which is said."""
    if name in _running:
        return _running[name]
    if check.device == "cpu":
        return check.skip(name, "dry run")
    if name == "tests" and find_spec("pytest") is None:
        return check.skip("tests", "pytest is not installed")
    tool = shutil.which("compute-sanitizer")
    if name == "sanitizer" and tool is None:
        return check.skip("compute-sanitizer", "it is not installed")
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *GPU_TESTS]
    script = [str(tool), "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_parts"]
    command = pytest if name == "tests" else [*script, str(check.seed)]
    with (check.out / f"{name}.log").open("w") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        _running[name] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        atexit.register(_running[name].kill)  # not left behind where this process ends early
    return _running[name]


def _wait(check: Check, name: str) -> int | None:
    """The exit code of a started part; None if it is out of time (it is stopped) or can't run, which is said."""
    process = _start(check, name)
    if process is None:
        return None
    try:
        return process.wait(max(check.left_s(), 1.0))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        check.skip(name, f"its time was up, see {name}.log")
        return None
    finally:
        del _running[name]


def sanitizer(check: Check) -> None:
    """compute-sanitizer memcheck over the kernels' checks; it and the tests start beside the correctness part."""
    code = _wait(check, "sanitizer")
    if code is None:
        return
    if "Device not supported" in (check.out / "sanitizer.log").read_text():
        check.skip("compute-sanitizer", "it does not support this device")
    elif code != 0:
        check.fail(f"compute-sanitizer memcheck: exit code {code}, see sanitizer.log")
    else:
        check.say("  memcheck found nothing")


def tests(check: Check) -> None:
    """The tests marked gpu."""
    code = _wait(check, "tests")
    if code == 5:
        check.skip("tests", "none is marked gpu")
    elif code is not None and code != 0:
        check.fail(f"tests: pytest's exit code {code}, see tests.log")
    elif code == 0:
        check.say("  passed")


def ceilings(check: Check) -> None:
    """Copy bandwidth (large, beyond the cache; and of a layer's size) and product rates."""
    for num_bytes in (1 << 32 if check.device == "cuda" else 1 << 27, 1 << 24):
        check.ceilings.bytes_per_s(num_bytes)
    for dtype in (torch.bfloat16, torch.float32):
        check.ceilings.flops_per_s(dtype)
    for name, value in check.ceilings.known().items():
        check.say(f"  {name} {value:.4g}")


def _time_each(check: Check, jobs: list[tuple[Any, Callable[[], list[Row]]]], least_s: float = 15) -> None:
    """Run the jobs while the part has time; what does not run is said, what raises is said and the rest goes on."""
    for case, job in jobs:
        if check.left_s() < least_s and check.device == "cuda":
            check.skip(case.name, "no time left")
            continue
        try:
            check.rows += job()
        except Exception as error:
            check.fail(f"{case.name}: {type(error).__name__}: {error}")
        free_memory(check.device)
        check.say(f"  {case.name}: {check.left_s():.0f} s left to this part")
        check.save()


def _settings(check: Check, *more: str) -> Settings:
    """Everything that needs no compiler; ``more`` names further baselines."""
    is_gpu = check.device == "cuda"
    found = ("neurosurgeon",) if find_spec("NeuroSurgeon") else ()
    plans = ("ours_fused", "ours_cached") if is_gpu else ()
    return Settings(
        check.device, TIMING if is_gpu else DRY_TIMING, ("eager", *more, "linear", *found), ("ours", "ours_op", *plans),
        ("eager", *more, "finetune", "finetune_amp", "ours"), modes=("eager", "graph") if is_gpu else ("eager",),
        say=lambda text: check.say(f"  {text}"), fail=check.fail,
    )  # fmt: skip


def _layers(check: Check, chosen: list[cases.LayerCase], settings: Settings) -> None:
    _time_each(check, [(c, lambda c=c: run_layer(c, settings, check.ceilings)) for c in chosen])


def _kernels(check: Check, chosen: list[cases.KernelCase], settings: Settings) -> None:
    _time_each(check, [(c, lambda c=c: run_kernel(c, settings, check.ceilings)) for c in chosen])


def _models(check: Check, settings: dict[str, Settings]) -> None:
    jobs = [(c, lambda c=c: run_model(c, settings[c.name], check.ceilings)) for c in MODEL_CASES if c.name in settings]
    _time_each(check, jobs, 40)


def score_gradient(check: Check) -> None:
    """The score gradient inside its product, as product and pass, and the vendor's product alone."""
    chosen = cases.SCORE_GRADIENT_CASES
    if check.device == "cpu":
        chosen = [cases.KernelCase("score_gradient", ((40, 24),), "bf16", num_tokens=16)]
    _kernels(check, chosen, _settings(check, *(("compile",) if check.device == "cuda" else ())))


def linear(check: Check) -> None:
    """Linear layers at the named shapes, launched and as CUDA graphs; compiled where an aim asks for it."""
    if check.device == "cpu":
        return _layers(check, [TINY_LINEAR], _settings(check))
    is_compiled = {c.name: any(part in c.name for part in COMPILED_LINEAR) for c in cases.GPU_LINEAR_CASES}
    for wants in (True, False):
        chosen = [c for c in cases.GPU_LINEAR_CASES if is_compiled[c.name] == wants and c.dtype == "bf16"]
        _layers(check, chosen, _settings(check, *(("compile",) if wants else ())))


def stretch(check: Check) -> None:
    """The step in the backward pass (variant F) beside ours apart (B): alone, then in steps of linear layers."""
    settings = _settings(check, "compile")
    if check.device == "cpu":
        small = [c for c in cases.LINEAR_CASES if c.name == "linear_512x128_m256_bf16"]
        ours = ("ours", "ours_in_backward", "ours_lean")
        return _layers(check, small, replace(settings, ours=ours, phases=("step",)))
    _kernels(check, cases.LINEAR_STEP_CASES, settings)
    ours = ("ours", "ours_in_backward", "ours_lean")
    chosen = [c for c in cases.GPU_LINEAR_CASES if c.dtype == "bf16" and c.x_shape[0] >= 1024]
    _layers(check, chosen, replace(settings, ours=ours, phases=("step",)))


def gpt2(check: Check) -> None:
    """A step of GPT-2 small; compiled at the smaller batch."""
    if check.device == "cpu":
        return _models(check, {"gpt2_tiny_2x16": _settings(check)})
    _models(check, {"gpt2_4x64": _settings(check, "compile"), "gpt2_8x1024": _settings(check)})


def resnet(check: Check) -> None:
    """A step of ResNet-18, also beside its convolutions' training without mask and NeuroSurgeon."""
    name, more = ("resnet18_tiny_b2", ()) if check.device == "cpu" else ("resnet18_b256", ("compile",))
    settings = _settings(check, *more)
    found = ("neurosurgeon",) if "neurosurgeon" in settings.baselines else ()
    _models(check, {name: replace(settings, models=("unmasked", *found, *settings.models))})


def profile(check: Check) -> None:
    """Where a step of GPT-2 small and of ResNet-18 spends its time: torch's profiler, kernel by kernel."""
    names = ("gpt2_4x64", "resnet18_b256") if check.device == "cuda" else ("gpt2_tiny_2x16",)
    tables = []
    for case in (c for c in MODEL_CASES if c.name in names):
        trainers, *_ = make_trainers(case, replace(_settings(check), models=("ours", "finetune_amp")))
        for trainer in trainers:
            activity = torch.profiler.ProfilerActivity
            with torch.profiler.profile(activities=[getattr(activity, check.device.upper())]) as profiler:
                for _ in range(3):
                    trainer.step()
                if check.device == "cuda":
                    torch.cuda.synchronize()
            table = profiler.key_averages().table(f"self_{check.device}_time_total", row_limit=40)
            tables.append(f"{case.name} {trainer.name}, 3 steps, launched\n{table}")
        del trainers
        free_memory(check.device)
    (check.out / "profile.txt").write_text("\n\n".join(tables) + "\n")


def optimizer(check: Check) -> None:
    """The optimizer's pass over memory on each backend and torch's fused AdamW, beside the copy bandwidth."""
    names, sizes = ("cuda", "triton"), (512 * 128, 3072 * 768, 4096 * 11008, 8192 * 28672)
    if check.device == "cpu":
        names, sizes = ("cpu",), (4096,)
    for num in sizes:
        backends = tuple(BACKENDS[name] for name in names)
        check.rows += gpu_cuda.run_adamw(num, _settings(check), check.ceilings, backends)
        free_memory(check.device)
        check.save()


def masks(check: Check) -> None:
    """Eight masks over one weight in one call beside a call each: the passes over memory, and the score gradients of a
    linear layer inside their batched product."""
    names, sizes = ("cuda", "triton"), ((512, 128), (768, 3072), (4096, 11008))
    if check.device == "cpu":
        names, sizes = ("cpu",), ((16, 24),)
    for n, k in sizes:
        backends = tuple(BACKENDS[name] for name in names)
        check.rows += gpu_masks.run_masks(n, k, _settings(check), check.ceilings, backends)
        free_memory(check.device)
        check.save()


def sampled(check: Check) -> None:
    """Eight Gumbel masks in a linear layer: its training step beside eager and compiled masks and a layer without mask;
    then the passes over memory alone."""
    is_gpu = check.device == "cuda"
    case = cases.LayerCase((768, 3072), (10240, 3072), "bf16") if is_gpu else TINY_SAMPLED
    settings = _settings(check, *(("compile",) if is_gpu else ()))
    _time_each(check, [(case, lambda: gpu_sampled.run_layer(case, settings, check.ceilings))])
    backends = tuple(BACKENDS[name] for name in (("cuda", "triton") if is_gpu else ("cpu",)))
    n, k = case.weight_shape
    check.rows += gpu_sampled.run_passes(n, k, settings, check.ceilings, backends)
    check.save()


def bulk(check: Check) -> None:
    """The arithmetic network in bulk: transfer runs in a stack against one at a time, discoveries against one."""
    from . import discovery_bulk, transfer  # the experiment's libraries, which no other part needs

    common = ["--device", check.device, "--threads", str(torch.get_num_threads())]
    if check.device == "cpu":
        transfers, discoveries = [(1, 2)], [(1, 2, "1,2")]
        few = ["--rounds", "1", "--steps", "1"], ["--batch", "10", "--steps", "2"]
    else:
        transfers, discoveries = [(2, 16), (2, 128), (12, 128)], [(4, 8, "1,8"), (12, 8, "1,8")]
        few = ["--rounds", "7"], []
    for layers, runs in transfers:
        csv = check.out / f"transfer_{layers}layers_{runs}runs.csv"
        transfer.main(["--layers", f"{layers}", "--runs", f"{runs}", *few[0], *common, "--csv", str(csv)])
    for layers, members, at_once in discoveries:
        csv = check.out / f"discovery_bulk_{layers}layers.csv"
        sizes = ["--layers", f"{layers}", "--members", f"{members}", "--at-once", at_once]
        with warnings.catch_warnings():
            discovery_bulk.main([*sizes, *few[1], *common, "--csv", str(csv)])


def conv(check: Check) -> None:
    """ResNet-18's convolutions, channels_last first; not compiled: the model's step is."""
    chosen = cases.GPU_CONV_CASES
    if check.device == "cpu":
        chosen = [
            cases.LayerCase((8, 4, 3, 3), (2, 4, 6, 6), "bf16", {"padding": 1}, is_last) for is_last in (True, False)
        ]
    _layers(check, chosen, _settings(check))


def kernels(check: Check) -> None:
    """effective_weights, effective_weight and the flat score gradient alone."""
    chosen = [c for c in cases.KERNEL_CASES if c.op.startswith(("effective_weight", "grad_scores"))]
    if check.device == "cpu":
        chosen = cases.select(chosen, ["weight_512x128"], quick=True)
    _kernels(check, chosen, _settings(check, *(("compile",) if check.device == "cuda" else ())))


def more(check: Check) -> None:
    """What compiles for long: the models again with ours compiled too, the other linear layers, max-autotune."""
    if check.device == "cpu":
        return _layers(check, [TINY_LINEAR], replace(_settings(check, "compile", "compile_max"), phases=("forward",)))
    with_ours = _settings(check, "compile", "ours_compile")
    steps = replace(_settings(check, "compile", "compile_max"), phases=("step",), modes=("graph",))
    named = [c for c in cases.GPU_LINEAR_CASES if any(part in c.name for part in COMPILED_LINEAR)]
    _models(check, {"gpt2_4x64": with_ours})
    _layers(check, named, steps)
    _models(check, {"gpt2_8x1024": with_ours, "resnet18_b256": with_ours})
    rest = [c for c in cases.GPU_LINEAR_CASES if c not in named]
    _layers(check, rest, replace(steps, baselines=("eager", "compile")))


TINY_SAMPLED = cases.LayerCase((24, 40), (32, 40), "bf16")
TINY_LINEAR = cases.LayerCase((40, 24), (16, 24), "bf16")
DRY_TIMING = TimingConfig(num_rounds=3, min_rounds=3, budget_s=0.5)


@dataclass(frozen=True)
class Part:
    """least_s: what must be left for it to start; most_s: what it may take."""

    name: str
    run: Callable[[Check], None]
    least_s: float
    most_s: float


PARTS = (
    Part("build", build, 0, 260),
    Part("correctness", correctness, 20, 150),
    Part("tests", tests, 10, 60),
    Part("sanitizer", sanitizer, 10, 30),
    Part("ceilings", ceilings, 10, 30),
    Part("optimizer", optimizer, 15, 40),
    Part("masks", masks, 15, 60),
    Part("sampled", sampled, 20, 90),
    Part("bulk", bulk, 20, 120),
    Part("score_gradient", score_gradient, 15, 60),
    Part("linear", linear, 20, 130),
    Part("stretch", stretch, 20, 120),
    Part("gpt2", gpt2, 40, 150),
    Part("resnet", resnet, 40, 90),
    Part("profile", profile, 40, 60),
    Part("kernels", kernels, 20, 60),
    Part("conv", conv, 20, 60),
    Part("more", more, 40, 300),
)


def sanitizer_script(seed: int) -> int:
    """What runs under compute-sanitizer: the kernels' checks, small."""
    checks = [
        *gpu_correctness.effective_weights_checks("cuda", "cuda", seed),
        *gpu_cuda.cuda_checks("cuda", seed),
        *gpu_masks.checks("cuda", seed, BACKENDS["cuda"], ((33, 131), (0, 5))),
        *gpu_sampled.checks("cuda", seed, BACKENDS["cuda"], large=()),
        *gpu_correctness.cuda_score_gradient_checks(seed, is_large=False),
        *gpu_correctness.triton_checks("cuda", seed, is_large=False, dtypes=("bf16",)),
        *gpu_correctness.step_checks("cuda", seed, is_large=False, dtypes=("bf16",)),
    ]
    worst = max(ratio for _, ratio in checks)
    print(f"worst error {worst:.3g} of the allowed one")
    return 0 if worst <= 1 else 1


if __name__ == "__main__":
    sys.exit(sanitizer_script(int(sys.argv[1])))
