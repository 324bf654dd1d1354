"""The stages after the base network: every method's subnets, then networks with planted ones. Done ones are kept."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from subnets.experiments.arithmetic import data
from subnets.experiments.arithmetic.plan import Run
from subnets.experiments.arithmetic.transfers import Built, member
from subnets.experiments.methods.config import BASELINES
from subnets.experiments.methods.finders import FINDERS, Found, Setting, mask_seed
from subnets.subnet import Subnet
from subnets.training.files import read_json, write_json
from subnets.training.member_training import Member
from subnets.training.seeds import torch_generator


def subnet_path(setting: Setting, name: str, seed: int) -> Path:
    """The file of one method's subnet; its facts lie beside it as JSON."""
    return setting.depth.folder / "methods" / f"{name}_{seed}.safetensors"


def find_stage(setting: Setting, name: str, seed: int, show: bool = False) -> Subnet:
    """One method's subnet, with its values, from its file or found now."""
    path = subnet_path(setting, name, seed)
    if not path.with_suffix(".json").exists():
        if show:
            print(f"{name}, seed {seed}", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        started = time.process_time()
        found = _found(setting, name, seed, path.with_suffix(""))
        spent = time.process_time() - started if found.seconds is None else found.seconds
        model = setting.model().cpu()
        found.subnet.provenance.update({"task": data.S1.formula, "base_task": data.T1.formula, "method": name})
        found.subnet.save(path, weights=None if found.subnet.weights is not None else model)
        write_json(path.with_suffix(".json"), {**_facts(setting, found), "seconds": round(spent, 2)})
    for suffix in (".scores.safetensors", ".checkpoint.safetensors"):
        path.with_suffix(suffix).unlink(missing_ok=True)
    return Subnet.load(path)


def _found(setting: Setting, name: str, seed: int, files: Path) -> Found:
    if name != "random":
        return FINDERS[name](setting, name, seed, files)
    like = find_stage(setting, setting.config.methods()[0], seed)
    started = time.process_time()
    masks = like.sample_like(torch_generator(mask_seed(setting.config, seed), "random")).masks
    subnet = Subnet(masks)
    return Found(subnet, subnet.density(), setting.accuracy_of(subnet), seconds=time.process_time() - started)


def _facts(setting: Setting, found: Found) -> dict[str, Any]:
    subnet = found.subnet
    return {
        "density": round(subnet.density(), 6),
        "density_per_layer": subnet.density(per_layer=True),
        "s1_accuracy": round(setting.accuracy_of(subnet), 6),
        "t1_accuracy": round(setting.accuracy_of(subnet, task=data.T1), 6),
        "complement_s1": round(setting.accuracy_of(subnet, "ablate"), 6),
        "complement_t1": round(setting.accuracy_of(subnet, "ablate", data.T1), 6),
        "own_density": round(found.own_density, 6),
        "own_s1_accuracy": round(found.own_accuracy, 6),
        "undecided": None if found.undecided is None else round(found.undecided, 6),
    }


def facts_of(setting: Setting, name: str, seed: int) -> dict[str, Any]:
    """What the stage noted of one subnet."""
    return read_json(subnet_path(setting, name, seed).with_suffix(".json"))


def build_members(setting: Setting, runs: Sequence[Run]) -> Built:
    """A network for each run: the method's first subnet planted and frozen, or a baseline."""
    return [_member(setting, run) for run in runs], []


def _member(setting: Setting, run: Run) -> Member:
    source = setting.source
    planted = {name: torch.zeros_like(source[name], dtype=torch.bool) for name in setting.names}
    is_planted = run.condition not in BASELINES
    if is_planted:
        subnet = Subnet.load(subnet_path(setting, run.condition, 0))
        planted, source = {**planted, **subnet.masks}, {**source, **subnet.to_dense()}
    return member(setting.config, setting.depth.layers, source, planted, run, is_frozen=is_planted)
