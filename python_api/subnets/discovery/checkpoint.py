"""The checkpoint of a discovery: one safetensors file, replaced after every epoch, checked in full before it is used.

Tensors: ``scores/<name>``, ``exp_avg/<name>``, ``exp_avg_sq/<name>`` (scores' shape) and ``best/<weight's name>`` (the
best hard mask so far, one bit per weight). Metadata (JSON): what it is a checkpoint of, history, best epoch, checksum.
Random numbers need no place: every epoch seeds its own from (seed, epoch).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..masking import MaskSet
from ..subnet_file import weights_hash
from ..training.files import save_tensors

FORMAT = "subnets.discovery.checkpoint/1"
_MEND = "delete it to start over, or restore a copy"


class Progress:
    """How far a discovery is: history, and the best epoch with its packed masks."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.best_masks: dict[str, Tensor] = {}


def identity(masks: MaskSet, config: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint belongs to, as flat json values: settings, masked weights and the network's contents."""
    shapes = {name: list(layer.scores.shape) for name, layer in masks.layers.items()}
    scores = masks.scores()
    everything = {**dict(masks.model.named_parameters()), **dict(masks.model.named_buffers())}
    contents = {name: value for name, value in everything.items() if name not in scores}
    return {
        **{f"config.{key}": value for key, value in config.items()},
        "masked weights": shapes,
        "model's parameters and buffers (hash)": weights_hash(contents),
    }


def save(
    path: Path, identity: dict[str, Any], masks: MaskSet, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write it beside ``path`` and rename it into place."""
    tensors: dict[str, Tensor] = {}
    steps: dict[str, float] = {}
    for name, scores in masks.scores().items():
        moments = optimizer.state.get(scores, {})  # empty for scores that never had a gradient
        tensors[f"scores/{name}"] = scores.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}/{name}"] = moments.get(moment, torch.zeros_like(scores))
        steps[name] = float(moments.get("step", 0))
    tensors.update({f"best/{name}": packed for name, packed in progress.best_masks.items()})
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    state = {
        "format": FORMAT, "identity": identity, "beta": masks.beta, "steps": steps,
        "history": progress.history, "best": progress.best,
    }  # fmt: skip
    text = json.dumps(state, allow_nan=False)
    save_tensors(path, tensors, {"state": text, "checksum": _checksum(text, tensors)})


def load(path: Path, identity: dict[str, Any], masks: MaskSet, optimizer: torch.optim.Optimizer) -> Progress:
    """Put the checkpoint's scores and moments in place and return how far it was.

    Raises:
        ValueError: damaged, or of another discovery (the differing keys are named). Nothing is changed then.
    """
    state, tensors = _read(path)
    _check_same(path, state["identity"], identity)
    progress = Progress()
    progress.history, progress.best = state["history"], state["best"]
    progress.best_masks = {name.removeprefix("best/"): t for name, t in tensors.items() if name.startswith("best/")}
    with torch.no_grad():
        for name, scores in masks.scores().items():
            scores.copy_(tensors[f"scores/{name}"])
            optimizer.state[scores] = {
                "step": _step_tensor(state["steps"][name], scores, optimizer),
                "exp_avg": torch.zeros_like(scores).copy_(tensors[f"exp_avg/{name}"]),
                "exp_avg_sq": torch.zeros_like(scores).copy_(tensors[f"exp_avg_sq/{name}"]),
            }
    masks.beta = state["beta"]
    return progress


def _step_tensor(step: float, scores: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """As torch's AdamW makes it: on the parameter's device only if fused or capturable."""
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.tensor(step, dtype=torch.float32, device=scores.device if on_device else "cpu")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"discover: the checkpoint {path} can't be read ({error}); {_MEND}") from None
    text = metadata.get("state", "")
    if metadata.get("checksum") != _checksum(text, tensors):
        raise ValueError(f"discover: the checkpoint {path} is damaged or not a discovery's; {_MEND}")
    state = json.loads(text)
    if state.get("format") != FORMAT:
        raise ValueError(f"discover: the checkpoint {path} has format {state.get('format')!r}, not {FORMAT!r}; {_MEND}")
    return state, tensors


def _check_same(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    ours = json.loads(json.dumps(ours))
    differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if differing:
        sides = ", ".join(
            f"{key} ({_short(theirs.get(key))} there, {_short(ours.get(key))} now)" for key in sorted(differing)
        )
        raise ValueError(
            f"discover: the checkpoint {path} belongs to another discovery, these differ: {sides}; use another "
            "path, or delete it to start over"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256((text + weights_hash(tensors)).encode()).hexdigest()
