"""The checkpoint of a discovery: one safetensors file, replaced after every epoch, checked in full before it is used.

Tensors by weight's name: ``scores/<name>``, ``exp_avg/<name>``, ``exp_avg_sq/<name>`` (scores' shape, in bulk with all
members in front; with SGD ``momentum_buffer/<name>`` instead of the last two), and by member (0 if there is but one)
and name ``best/0/<name>`` (the best hard mask so far, one bit per weight) and, where they are asked for later,
``best_scores/0/<name>``. Metadata (JSON): what it is a checkpoint of, histories, best epochs, the state of a control of
lam, the key of sampled masks, checksum. Other random numbers need no place: every epoch seeds its own from (seed,
epoch).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..masking import MaskSet
from ..subnet_file import weights_hash
from ..training.files import save_tensors
from .config import DiscoveryConfig
from .control import DensityControl
from .record import Record

FORMAT = "subnets.discovery.checkpoint/2"
_MEND = "delete it to start over, or restore a copy"


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


class CheckpointFile:
    """The checkpoint of one run: what goes in, and where it is put back.

    Args:
        config: with ``config.checkpoint`` None, loading and saving do nothing.
        scores: the optimizer's parameters by weight's name, in bulk [G, ...] of all members.  records: each member's.
        control: of target_density, or None.
    """

    def __init__(
        self, config: DiscoveryConfig, evaluate: object, masks: MaskSet, scores: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer, records: Sequence[Record], control: DensityControl | None,
    ) -> None:
        self.path = None if config.checkpoint is None else Path(config.checkpoint)
        self.masks, self.optimizer, self.records, self.control = masks, optimizer, records, control
        self.scores = scores
        self.moments = ("exp_avg", "exp_avg_sq") if isinstance(optimizer, torch.optim.AdamW) else ("momentum_buffer",)
        self.identity: dict[str, Any] = {}
        if self.path is not None:
            self.identity = identity(masks, {**config.record(), "has_evaluate": evaluate is not None})

    def save(self, more: dict[str, Any] | None = None) -> None:
        """Write it beside its place and rename it there; ``more`` (json values) is what :meth:`load` returns."""
        if self.path is None:
            return
        tensors: dict[str, Tensor] = {}
        steps: dict[str, float] = {}
        for name, scores in self.scores.items():
            moments = self.optimizer.state.get(scores, {})  # empty for scores that never had a gradient
            tensors[f"scores/{name}"] = scores.detach()
            for moment in self.moments:
                kept = moments.get(moment)
                tensors[f"{moment}/{name}"] = torch.zeros_like(scores) if kept is None else kept
            steps[name] = float(moments.get("step", 0))
        for i, record in enumerate(self.records):
            tensors.update({f"best/{i}/{name}": packed for name, packed in record.best_masks.items()})
            tensors.update({f"best_scores/{i}/{name}": scores for name, scores in record.best_scores.items()})
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        state = {
            "format": FORMAT, "identity": self.identity, "beta": self.masks.beta, "steps": steps,
            "members": [{"history": record.history, "best": record.best} for record in self.records],
            "control": None if self.control is None else self.control.state(), "more": more or {},
            "key": self.masks.state_dict()["key"],
        }  # fmt: skip
        text = json.dumps(state, allow_nan=False)
        save_tensors(self.path, tensors, {"state": text, "checksum": _checksum(text, tensors)})

    def load(self) -> dict[str, Any]:
        """Put scores, moments, records and control in place, if there is a file; returns what :meth:`save` was given.

        Raises:
            ValueError: damaged, or of another discovery (the differing keys are named). Nothing is changed then.
        """
        if self.path is None or not self.path.exists():
            return {}
        state, tensors = _read(self.path)
        _check_same(self.path, state["identity"], self.identity)
        for i, (record, its) in enumerate(zip(self.records, state["members"], strict=True)):
            record.history, record.best = its["history"], its["best"]
            record.best_masks = _under(f"best/{i}/", tensors)
            record.best_scores = _under(f"best_scores/{i}/", tensors)
        with torch.no_grad():
            for name, scores in self.scores.items():
                scores.copy_(tensors[f"scores/{name}"])
                self.optimizer.state[scores] = {
                    moment: torch.zeros_like(scores).copy_(tensors[f"{moment}/{name}"]) for moment in self.moments
                }
                if isinstance(self.optimizer, torch.optim.AdamW):
                    step = _step_tensor(state["steps"][name], scores, self.optimizer)
                    self.optimizer.state[scores]["step"] = step
        now = self.masks.state_dict()
        self.masks.load_state_dict({**now, "beta": state["beta"], "key": state.get("key", now["key"])})
        if self.control is not None:
            self.control.restore(state["control"])
        return state["more"]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


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
