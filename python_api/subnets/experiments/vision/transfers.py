"""The transfer stage: every condition, number of images and seed is one network, trained on natural images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from subnets.experiments.vision.classifier_training import Recipe
from subnets.experiments.vision.conditions import norms_are_frozen, planted, starting_state
from subnets.experiments.vision.config import VisionConfig
from subnets.experiments.vision.models import Classifier, model_metadata
from subnets.experiments.vision.stages import Replicate, evaluate, rounded, train_shown
from subnets.subnet import Subnet
from subnets.training.files import save_tensors, write_json
from subnets.training.seeds import seed_for, torch_generator
from subnets.transfer import transfer


@dataclass(frozen=True)
class TransferRun:
    """One network: which condition, how many images, which base network and which seed."""

    condition: str
    num_images: int
    base_seed: int
    seed: int

    def name(self) -> str:
        """The name of its files."""
        return f"{self.condition}-n{self.num_images}-base{self.base_seed}-seed{self.seed}"

    def facts(self, folder: Path) -> Path:
        """The file of its measures; once it is there, the run is done."""
        return folder / f"{self.name()}.json"


def planned_runs(config: VisionConfig, sizes: tuple[int, ...]) -> Iterator[TransferRun]:
    """All of them; those of one size and seed follow each other, so that a killed run can be compared soonest."""
    for base_seed, seed in config.seed_pairs():
        for size in sizes:
            for condition in config.conditions:
                yield TransferRun(condition, size, base_seed, seed)


def transfer_stage(
    run: TransferRun, replicate: Replicate, base: Classifier, subnet: Subnet, folder: Path, show: bool
) -> None:
    """Trains one network; writes its weights and `<name>.json` (measures, curve) into `folder`."""
    config = replicate.config
    names = ("vision", "transfer", run.seed)
    fresh = replicate.model(seed=seed_for(*names, "init"))
    state = starting_state(run.condition, base, fresh, set(subnet.masks), config.inherit, config.fresh_scale)
    fresh.load_state_dict(state)
    planting = planted(run.condition, subnet, torch_generator(*names, run.base_seed, "planted"))
    if planting is not None:
        transfer(planting, base, fresh)
    recipe = transfer_recipe(config, run.condition)
    checkpoint = folder / f"{run.name()}.checkpoint.safetensors"
    data = replicate.data.transfer(run.num_images, run.seed)
    trained = train_shown(run.name(), show, fresh, data, recipe, (*names, "training"), checkpoint=checkpoint)
    save_tensors(
        folder / f"{run.name()}.safetensors",
        fresh.state_dict(),
        model_metadata(config.network(), run.name(), config.source),
    )
    write_json(run.facts(folder), {
        **vars(run),
        **rounded(evaluate(fresh, replicate.data.tests, config.bf16)),
        "final_loss": round(trained.curve[-1]["loss"], 6),
        "images_per_second": trained.images_per_second and round(trained.images_per_second, 1),
        "seconds": trained.seconds,
        "curve": trained.curve,
    })  # fmt: skip
    checkpoint.unlink(missing_ok=True)


def transfer_recipe(config: VisionConfig, condition: str) -> Recipe:
    """The recipe, the same for every condition but for what the condition's name says."""
    return Recipe(
        config.transfer_epochs,
        config.transfer_batch,
        config.transfer_lr,
        weight_decay=1e-4 if config.transfer_optimizer == "sgd" else 1e-2,
        optimizer=config.transfer_optimizer,
        decay=config.transfer_decay,
        norms_frozen=norms_are_frozen(condition, config.norms),
        style=config.style if condition == "augmentation" else 0.0,
        bf16=config.bf16,
    )
