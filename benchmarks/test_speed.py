"""The cases of ``python -m benchmarks`` as pytest-benchmark tests: ``pytest benchmarks``, ``--benchmark-json=file``.

Each checks its contender against fp64 before it is timed. ``-k "ours and 3072x768_m64"`` selects. The contenders of a
case stand in one table.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import cases, kernels
from .contenders import ALL, Skipped
from .runner import gate_layers

LAYERS = cases.LINEAR_CASES + cases.CONV_CASES
CONTENDERS = ("eager", "compile", "linear", "neurosurgeon", "ours", "ours_op")


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_layer_forward_backward(case: cases.LayerCase, contender: str, benchmark: Any) -> None:
    """Forward, penalty and backward of one layer."""
    inputs = case.build()
    try:
        layer = ALL[contender](inputs)
    except Skipped as reason:
        pytest.skip(str(reason))
    worst = gate_layers(inputs, [layer])
    assert all(ratio <= 1 for ratio in worst.values()), worst
    benchmark.group = case.name
    benchmark.extra_info.update(worst)
    benchmark(layer.forward_backward)


@pytest.mark.parametrize("contender", ("eager", "compile", "ours"))
@pytest.mark.parametrize("case", cases.KERNEL_CASES, ids=lambda case: case.name)
def test_kernel(case: cases.KernelCase, contender: str, benchmark: Any) -> None:
    """One elementwise op alone."""
    with torch.no_grad():
        problem = kernels.make_problem(case, "cpu")
        if contender not in problem.functions:
            pytest.skip(f"{case.op} has no {contender} contender")
        function = problem.functions[contender]
        problem.functions = {"eager": problem.functions["eager"], contender: function}
        worst = kernels.gate(problem)[contender]
        assert worst <= 1
        benchmark.group = case.name
        benchmark.extra_info["gate"] = worst
        benchmark(function)
