"""Experiments' configs: frozen dataclasses of knobs, their presets, `--set` and JSON."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from subnets.training.seeds import seed_for

Config = TypeVar("Config", bound="Knobs")
Replicated = TypeVar("Replicated", bound="Experiment")


def knob(default: Any, text: str) -> Any:
    """A dataclass field whose `text` is shown by `subnets run EXPERIMENT --set help`."""
    return field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Knobs:
    """What an experiment's config inherits; one of its fields is `preset`, the name of the preset it started from."""

    def to_json(self) -> dict[str, Any]:
        """The values as JSON has them: tuples become lists."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """The inverse of `to_json`; unknown names are refused."""
        known = {knob.name for knob in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown keys {unknown}; known are {', '.join(sorted(known))}")
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


@dataclasses.dataclass(frozen=True)
class Experiment(Knobs):
    """Knobs of an experiment that goes from a base network over its mask to transfer, replicated over base networks."""

    seed: int = knob(0, "seed of the base network, of discovery and of all data")
    base_seeds: int = knob(1, "replicates r = 0, 1, ...: base network r, its mask, transfer seed r; all seeds differ")
    device: str | None = knob(None, "where all networks are trained, 'cpu' or 'cuda'; None = cuda where there is one")

    def of_replicate(self: Replicated, base_seed: int) -> Replicated:
        """The config of one replicate's base network and mask: another seed, from which all their streams derive.

        Replicate 0 has the config's own seed, so that it is the same network however many replicates there are. The
        others' seeds come from a hash: a run with seed=1 shares nothing with replicate 1 of seed=0.
        """
        if base_seed == 0:
            return self
        return dataclasses.replace(self, seed=seed_for(self.seed, "replicate", base_seed) % 2**31)

    def places(self, folder: Path) -> list[Path]:
        """Where each base network's files are: in `folder` where there is one, in base0, base1, ... else."""
        return [folder] if self.base_seeds == 1 else [folder / f"base{r}" for r in range(self.base_seeds)]

    def pairs_of_seeds(self, on_first: int) -> list[tuple[int, int]]:
        """(base seed, transfer seed) of the runs of one condition and n: (0, s) on the first base, s < `on_first`,
        then (r, r).

        Replicates are the pairs (r, r). Transfer seed s names the same data, order and fresh weights on whichever base,
        so that (0, s) and (s, s) differ in base network and mask alone.
        """
        return [(0, s) for s in range(on_first)] + [(r, r) for r in range(1, self.base_seeds)]

    def torch_device(self) -> torch.device:
        """Where networks are trained. Raises ValueError where this machine lacks the device."""
        has_cuda = torch.cuda.is_available()
        if self.device == "cuda" and not has_cuda:
            name = type(self).__name__
            raise ValueError(f"{name}: there is no CUDA device for device='cuda'; leave it out, or use cpu")
        return torch.device(self.device or ("cuda" if has_cuda else "cpu"))


def help_text(config: type[Knobs]) -> str:
    """Every key with its default and what it does."""
    shown = [one for one in fields(config) if one.name != "preset"]
    return "\n".join(f"{one.name} = {one.default}\n    {one.metadata['help']}" for one in shown)


def make_config(
    config: type[Config], presets: Mapping[str, Mapping[str, Any]], preset: str, overrides: Mapping[str, str] | None
) -> Config:
    """The preset with `overrides` (text as typed after --set) applied.

    Raises ValueError for an unknown preset or key and for text that is not of the key's type.
    """
    if preset not in presets:
        raise ValueError(f"make_config: preset must be one of {', '.join(presets)}, got {preset!r}")
    values: dict[str, Any] = {"preset": preset, **presets[preset]}
    hints = typing.get_type_hints(config)
    for key, text in (overrides or {}).items():
        if key not in hints or key == "preset":
            known = ", ".join(name for name in hints if name != "preset")
            raise ValueError(f"make_config: --set key must be one of {known}, got {key!r}")
        values[key] = _parse(key, text, hints[key])
    return config(**values)


def _parse(key: str, text: str, hint: Any) -> Any:
    """`text` as the type `hint`: int, float, bool, str, X | None, or tuple[X, ...] written as X,X,X."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if text.lower() == "none":
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return tuple(_parse(key, part.strip(), inner) for part in text.split(",") if part.strip())
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"make_config: {key} must be true or false, got {text!r}")
        return text.lower() == "true"
    try:
        return hint(text)
    except ValueError:
        raise ValueError(f"make_config: {key} must be {hint.__name__}, got {text!r}") from None
