"""``subnets bench --tune``: at named shapes on this GPU, time the tiles of the Triton products and the backends op by
op, and write its table.

Every candidate runs through the ordinary call, as a CUDA graph, after its result was compared with the vendor's; the
best and the time of the plan without our kernel go to subnet_kernels/backends/triton/tables/<gpu>.json, which
``rules.py`` reads; so does, by op and number of weights, the faster of the backends "triton" and "cuda", which
``dispatch.py`` then asks first. Nothing tunes itself at run time.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from subnet_kernels import testing
from subnet_kernels.backends.base import AdamW, Backend, Call
from subnet_kernels.dispatch import BACKENDS, forget_choices
from subnet_kernels.masks import as_kind

from .cases import DTYPES, LayerCase
from .rows import environment
from .timing import Function, TimingConfig, as_cuda_graph, time_interleaved

KIND = as_kind("sigmoid")
TIMING = TimingConfig(num_rounds=21, min_rounds=7, budget_s=3.0)
Times = dict[str, float]  # microseconds by name


def tiles_of(kernel: str) -> Iterator[tuple[int, int, int, int, int]]:
    """(rows, columns, depth, warps, stages) to try; what does not compile or does not fit is left out."""
    if kernel == "score_gradient":
        yield from product((64, 128), (64, 128, 256), (32, 64), (4, 8), (3, 4))
    else:
        yield from product((64, 128), (16, 32, 64, 128, 256), (64, 128), (4, 8), (3, 4))


def graph_times(functions: dict[str, Function]) -> Times:
    """Median microseconds of each, as CUDA graphs, interleaved; what can't be captured is left out."""
    graphs = {}
    for name, function in functions.items():
        try:
            graphs[name] = as_cuda_graph(function)
        except RuntimeError:
            continue
    timings = time_interleaved(graphs, "cuda", TIMING)
    return {name: timing.percentile_us(50) for name, timing in timings.items()}


def _function(kernel: str, case: testing.Case, plan: str, backend: Backend) -> Callable[[], Tensor]:
    """The call whose tiles are sought, on a case's tensors: under plan "cached", its rival."""
    beta = torch.tensor(case.beta, device=case.x.device)
    lam = torch.tensor(case.grad_penalty, device=case.x.device)
    if kernel == "score_gradient":
        def gradient() -> Tensor:
            made, _ = backend.linear_grad_scores(
                case.grad_out, case.x, lam, case.weight, case.scores, beta, KIND, True, False
            )
            assert made is not None
            return made

        return gradient
    return lambda: backend.masked_linear(case.x, case.weight, case.scores, beta, case.bias, KIND, plan)[0]


def tune_case(
    case: LayerCase, kernel: str, device: str = "cuda", times: Callable[[dict[str, Function]], Times] = graph_times,
    candidates: Iterable[tuple[int, int, int, int, int]] | None = None, say: Callable[[str], None] = print,
) -> dict | None:
    """The table's entry of one linear case, or None where no tile serves. The present table's entry is put back."""
    from subnet_kernels.backends.triton import rules
    from subnet_kernels.backends.triton.configs import Gemm

    inputs, backend = case.build(device), BACKENDS["triton"]
    (n, k), m, on = case.weight_shape, case.x_shape[0], rules.chip(torch.device(device))
    table = rules.table(on.name)
    key = (kernel, str(DTYPES[case.dtype]).removeprefix("torch."), n, k, rules.bucket(m))
    before = table.get(key)
    functions: dict[str, Function] = {}
    tried: dict[str, tuple[Gemm, int]] = {}

    def forced(entry: rules.Measured, plan: str) -> Callable[[], Tensor]:
        call = _function(kernel, inputs, plan, backend)

        def run() -> Tensor:
            rules.forget_decisions()
            table[key] = entry
            return call()

        return run

    some_tile = Gemm(64, 64, 64, 4, 3, "")
    try:
        functions["other"] = other = forced(rules.Measured(some_tile, 1, 1.0, 0.0), "cached")
        expected = other().double()
        for tile in tiles_of(kernel) if candidates is None else candidates:
            config = Gemm(*tile, reason="measured")
            num_tiles = -(-n // config.rows) * -(-k // config.columns)
            fills = rules.split(num_tiles, -(-m // config.depth), on.num_processors)
            for parts in sorted({1, fills, max(1, fills // 2)}) if kernel == "score_gradient" else (1,):
                name = "x".join(map(str, tile[:3])) + f", {tile[3]} warps, {tile[4]} stages, {parts} parts"
                function = forced(rules.Measured(config, parts, 0.0, 1.0), "fused")
                try:
                    error = (function().double() - expected).norm() / expected.norm()
                except Exception as reason:  # the compiler refuses some tiles in ways of its own
                    say(f"  {kernel} {name}: {type(reason).__name__}")
                    continue
                if not error < 0.01:
                    say(f"  {kernel} {name}: wrong, relative error {error:.2g}")
                    continue
                functions[name], tried[name] = function, (config, parts)
        measured = times(functions)
    finally:
        rules.forget_decisions()
        table.pop(key, None)
        if before is not None:
            table[key] = before
    if not any(name in measured for name in tried):
        return None
    best = min((name for name in tried if name in measured), key=lambda name: measured[name])
    config, parts = tried[best]
    say(f"{kernel} {case.name}: {best} {measured[best]:.1f} us, without it {measured['other']:.1f} us")
    tile = {name: value for name, value in dataclasses.asdict(config).items() if name != "reason"}
    return {"kernel": key[0], "dtype": key[1], "n": n, "k": k, "m": key[4], "config": tile, "num_parts": parts,
            "us": round(measured[best], 2), "other_us": round(measured["other"], 2)}  # fmt: skip


BACKEND_OPS = ("effective_weights", "mask_adamw", "add_penalty_grad", "masked_linear")


def _op_of(op: str, case: testing.Case, backend: Backend) -> Callable[[], Tensor]:
    """The op on a case's tensors; masked_linear is the forward and the backward pass."""
    beta, weight = torch.tensor(case.beta, device=case.x.device), case.weight
    scores = case.scores.clone()
    if op == "effective_weights":
        w_effs = [torch.empty_like(weight)]
        return lambda: backend.effective_weights([weight], [scores], beta, KIND, [weight.dtype], w_effs)[0][0]
    if op == "add_penalty_grad":
        grad = torch.zeros_like(scores)

        def add() -> Tensor:
            backend.add_penalty_grad_([grad], [scores], [1], beta, 1e-3, KIND)
            return grad

        return add
    if op == "mask_adamw":
        moments = [torch.zeros_like(scores), torch.zeros_like(scores)]
        step, slot = torch.ones_like(beta), (torch.empty_like(weight), torch.empty_like(beta))
        grad, numbers = scores.sin(), AdamW(1e-3, 0.9, 0.999, 1e-8, 0.01, 1e-3)

        def adamw() -> Tensor:
            backend.mask_adamw_(
                [scores], [grad], [moments[0]], [moments[1]], [step], [weight], [slot], beta, beta, KIND, numbers
            )
            return slot[0]

        return adamw
    one = dataclasses.replace(case, scores=scores.requires_grad_(), x=case.x.clone().requires_grad_())
    lam = torch.full((), case.grad_penalty, device=case.x.device)

    def both_passes() -> Tensor:
        made = testing.ours(one, backend=backend.name)
        return torch.autograd.grad(made, [one.scores, one.x], [case.grad_out, lam])[0]

    return both_passes


def tune_backends(
    case: LayerCase, device: str = "cuda", times: Callable[[dict[str, Function]], Times] = graph_times,
    backends: tuple[Backend, ...] = (BACKENDS["triton"], BACKENDS["cuda"]), say: Callable[[str], None] = print,
) -> list[dict]:
    """Microseconds of every op on each backend at one linear case; a backend whose first result is not the other's is
    left out, an op that fewer than two serve has no entry."""
    from subnet_kernels.backends.triton import rules

    inputs, dtype = case.build(device), DTYPES[case.dtype]
    size, entries = rules.bucket(case.num_weights), []
    for op in BACKEND_OPS:
        call = Call(op, device, dtype, dtype, KIND.name, None, 2, True, size)
        functions: dict[str, Function] = {}
        first: Tensor | None = None
        for backend in backends:
            if backend.refuse(call) is not None or (op == "mask_adamw" and not backend.has_mask_adamw):
                continue
            function = _op_of(op, inputs, backend)
            made = function().detach().double().clone()
            if first is not None and not (made - first).norm() <= 0.01 * first.norm():
                say(f"  {op} on {backend.name}: wrong beside {backends[0].name}")
                continue
            first, functions[backend.name] = made if first is None else first, function
        measured = times(functions) if len(functions) > 1 else {}
        if len(measured) > 1:
            say(f"{op} {case.name}: " + ", ".join(f"{name} {us:.1f} us" for name, us in measured.items()))
            entries.append({"op": op, "dtype": str(dtype).removeprefix("torch."), "num_weights": size, "us": measured})
    return entries


def fastest_backends(entries: list[dict]) -> list[dict]:
    """One entry per op, dtype and bucket of weights: the backend with the least time over its cases."""
    total: dict[tuple[str, str, int], dict[str, float]] = {}
    for entry in entries:
        sums = total.setdefault((entry["op"], entry["dtype"], entry["num_weights"]), {})
        for name, us in entry["us"].items():
            sums[name] = round(sums.get(name, 0.0) + us, 2)
    return [
        {"op": op, "dtype": dtype, "num_weights": size, "backend": min(us, key=lambda name: us[name]), "us": us}
        for (op, dtype, size), us in total.items()
    ]


def _merged(kept: list[dict], new: list[dict], keys: tuple[str, ...]) -> str:
    """Lines of JSON, sorted; of entries with the same keys the new one."""
    merged = {tuple(e[name] for name in keys): e for e in [*kept, *new]}
    return ",\n".join("  " + json.dumps(merged[key]) for key in sorted(merged))


def write_table(path: Path, entries: list[dict], env: dict, backends: list[dict] | None = None) -> None:
    """Put entries into a GPU's table; those of the same kernel (op), dtype and sizes are replaced, the rest stays."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    about = {name: env[name] for name in ("device", "torch", "triton", "commit")}
    tiles = _merged(kept.get("entries", []), entries, ("kernel", "dtype", "n", "k", "m"))
    ops = _merged(kept.get("backends", []), backends or [], ("op", "dtype", "num_weights"))
    path.parent.mkdir(exist_ok=True)
    lists = f',\n "entries": [\n{tiles}\n ],\n "backends": [\n{ops}\n ]\n}}\n'
    path.write_text(json.dumps(about, indent=1)[:-2] + lists)


def run(chosen: list[LayerCase], say: Callable[[str], None] = print) -> int:
    """Tune every linear case, tiles at 16 bits and backends; the exit status."""
    from subnet_kernels.backends.triton import rules

    if torch.are_deterministic_algorithms_enabled():
        print("--tune: not under torch.use_deterministic_algorithms: what it writes may differ from run to run")
        return 2
    chosen, entries, backends = [case for case in chosen if not case.is_conv], [], []
    for case in chosen:
        if DTYPES[case.dtype].itemsize != 2:
            continue
        for kernel in ("score_gradient", "masked_product"):
            entry = tune_case(case, kernel, say=say)
            if entry is not None:
                entries.append(entry)
    if not entries:
        print("--tune: no linear 16-bit case was chosen, or no tile serves any", file=sys.stderr)
        return 1
    env = environment("cuda", torch.get_num_threads(), "wall")
    path = rules.table_path(env["device"])
    write_table(path, entries, env)
    rules.forget()  # the tiles just found are those that the backend "triton" is timed with
    for case in chosen:
        backends += tune_backends(case, say=say)
    write_table(path, [], env, fastest_backends(backends))
    rules.forget()
    forget_choices()
    print(f"wrote {path}")
    return 0
