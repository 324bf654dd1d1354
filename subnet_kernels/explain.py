"""explain(): which backend and plan an op call would use, in words."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .backends.base import Call
from .backends.triton.rules import bucket
from .dispatch import describe
from .ops import checks
from .ops.checks import is_of_masks

_WITH_X = ("masked_linear", "masked_conv2d")
_OPS = ("effective_weight", "effective_weights", *_WITH_X)


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """In words: which backend and plan would run ``op(*args, **kwargs)``, and why each other would not. Runs nothing.

    Args:
        op: "effective_weight", "effective_weights", "masked_linear" or "masked_conv2d".
        args, kwargs: what the op would be called with.

    Raises:
        ValueError, TypeError: no op has that name, or an argument that decides is missing or does not fit.

    Example:
        >>> import torch
        >>> print(explain("masked_linear", torch.ones(1, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64),
        ...               torch.zeros(2, 3, dtype=torch.float64), 1.0).splitlines()[0])
        masked_linear on cpu: backend reference, plan cached
    """
    if op not in _OPS:
        raise ValueError(f"explain: op must be one of {list(_OPS)}, got {op!r}")
    names = ("x", "weight", "scores") if op in _WITH_X else ("weight", "scores")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if op == "effective_weights":
        lists = {"weight": given.get("weights", given.get("weight")), "scores": given.get("scores")}
        given = {**given, **{name: next(iter(tensors or ()), None) for name, tensors in lists.items()}}
    for name in names:
        if not isinstance(given.get(name), Tensor):
            raise TypeError(f"explain: {op} needs the tensor {name}, got {type(given.get(name)).__name__}")
    weight, scores = given["weight"], given["scores"]
    checks.check_weight_and_scores(op, weight, scores)
    num_masks = scores.shape[0] if is_of_masks(weight, scores) else None
    if num_masks is not None:
        scores = scores[0]
    compute = checks.cast_for_autocast(given["x"], checks.autocast_dtype(given["x"])).dtype if "x" in given else (
        kwargs.get("dtype") or weight.dtype)  # fmt: skip
    kind = checks.check_kind(op, kwargs.get("kind", "sigmoid"))
    call = Call(
        op, weight.device.type, weight.dtype, compute, kind.name, kwargs.get("plan"), weight.dim(),
        weight.shape == scores.shape, bucket(weight.numel()) if weight.is_cuda else 0,
    )  # fmt: skip
    note = ""
    if weight.shape == scores.shape and weight.stride() != scores.stride():
        note = "\n  note: scores have other strides than weight and are copied at every call; give them weight's"
    if num_masks is not None:  # what has a mask in it is one pass; the product is the vendor's
        checked = describe(call._replace(op="effective_weight"), kwargs.get("backend"))
        product = "; then the vendor's product for all of them" if "x" in given else ""
        return f"{checked}\n  note: one pass for all {num_masks} masks over the weight{product}{note}"
    if kind.is_sampled:
        drawn = describe(call._replace(op="sampled_weight", plan=None), kwargs.get("backend"))
        return drawn + "\n  note: a mask is drawn again for each product; nothing of its size is kept"
    x, plan = given.get("x"), kwargs.get("plan")
    plan_of = None if x is None else lambda backend: backend.plan_of(op, x, weight, scores, plan)
    return describe(call, kwargs.get("backend"), plan_of) + note
