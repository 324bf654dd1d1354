"""Experiments' configs: frozen dataclasses of knobs, their presets, `--set` and JSON."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, TypeVar

Config = TypeVar("Config", bound="Knobs")


def knob(default: Any, text: str) -> Any:
    """A dataclass field whose `text` is shown by `subnets run EXPERIMENT --set help`."""
    return field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Knobs:
    """What an experiment's config inherits; its first field is `preset`, the name of the preset it started from."""

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
