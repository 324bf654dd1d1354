"""How each method finds its subnet of S1 in the T1 network: what it trains, and by what it ranks weights."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subnet_kernels.masks import TopK, as_kind
from subnets.clustering import mlp_blocks, spectral_clusters, weight_graph
from subnets.discovery import (
    Csordas,
    DiscoveryConfig,
    EdgePopup,
    HardConcreteGates,
    LearnedSupermask,
    Method,
    Piggyback,
    discover,
)
from subnets.experiments.arithmetic import data
from subnets.experiments.arithmetic.stability import batches
from subnets.experiments.arithmetic.stages import Depth, State, accuracy_on, discovery_config
from subnets.experiments.methods.config import MASK_METHODS, MethodsConfig
from subnets.experiments.methods.density import at_density
from subnets.methods import PruningConfig, iterative_magnitude_pruning, lottery_ticket_sparse_finetuning
from subnets.subnet import Subnet
from subnets.training.files import load_tensors, save_tensors
from subnets.training.gpt2 import LeanGPT2, lm_loss
from subnets.training.seeds import seed_for, torch_generator


@dataclass(frozen=True)
class Setting:
    """The T1 network that all methods are given, and the run's knobs."""

    config: MethodsConfig
    depth: Depth
    source: State

    def model(self) -> LeanGPT2:
        """The T1 network, in eval mode as every method trains it."""
        return self.depth.model(self.source)

    @property
    def names(self) -> list[str]:
        """The weights that methods choose from."""
        return self.config.shape(self.depth.layers).masked_names()

    def accuracy(self, model: nn.Module, task: data.Task = data.S1, split: str = "test") -> float:
        """On held-out pairs."""
        rows = data.held_out_set(task, split, self.config.seed, self.config.num_held_out)
        return accuracy_on(rows, model)

    def accuracy_of(self, subnet: Subnet, mode: Any = "keep", task: data.Task = data.S1) -> float:
        """On held-out pairs, of the subnet alone or of the network without it; with the subnet's own values if any."""
        model = self.model()
        if subnet.weights is not None and mode == "keep":
            model.load_state_dict(subnet.to_dense(), strict=False)
            return self.accuracy(model, task)
        with subnet.applied(model, mode=mode):
            return self.accuracy(model, task)


@dataclass(frozen=True)
class Found:
    """What a method found.

    Attributes:
        subnet: at the config's density; with values where they are not the T1 network's.
        own_density, own_accuracy: of what the method gives without that, and its accuracy on S1.
        undecided: fraction of masks between .01 and .99 at the end of training; None without soft masks.
        seconds: processor time; None: to be measured around the finder.
    """

    subnet: Subnet
    own_density: float
    own_accuracy: float
    undecided: float | None = None
    seconds: float | None = None


# --- masks over frozen weights ----------------------------------------------------------------------------------------


def mask_method(config: MethodsConfig, name: str) -> Method | None:
    """The method as `discover` takes it; None is continuous sparsification as in the arithmetic experiment."""
    num = config.discovery_pairs
    return {
        "continuous_sparsification": None,
        "csordas": Csordas(lr=config.csordas_lr, samples=config.csordas_samples, batch_size=config.discovery_batch),
        "hard_concrete": HardConcreteGates(unit="weight", lr=config.hard_concrete_lr, num_examples=num, l0=1e-2),
        "edge_popup": EdgePopup(kept=config.density, lr=config.edge_popup_lr),
        "supermask": LearnedSupermask(lr=config.supermask_lr),
        "piggyback": Piggyback(lr=config.piggyback_lr),
    }[name]


STEERED = ("continuous_sparsification", "csordas", "hard_concrete")  # have a penalty, whose weight sets the density


def find_mask(setting: Setting, name: str, seed: int, files: Path) -> Found:
    """Masks trained by `discover`; `files` is the stem of its checkpoint."""
    scores, facts = trained_scores(setting, name, seed, files)
    kind = as_kind(_final_config(setting.config, name).kind)
    own = Subnet({key: kind.hard.value(its, 1.0) > 0 for key, its in scores.items()})
    subnet = own if isinstance(kind, TopK) else at_density(scores, setting.config.density)
    return Found(subnet, own.density(), setting.accuracy_of(own), facts["undecided"], facts["seconds"])


def trained_scores(setting: Setting, name: str, seed: int, files: Path) -> tuple[State, dict[str, Any]]:
    """The scores after the last epoch, and what is known of it; kept beside the checkpoint until the stage is done."""
    path = files.with_suffix(".scores.safetensors")
    epochs: list[int] = []  # those of this call: fewer than all where it goes on from a checkpoint

    def keep_last(row: dict[str, Any], masks: Any) -> None:
        epochs.append(row["epoch"])
        if row["epoch"] + 1 == setting.config.discovery_epochs:
            spent = (time.process_time() - started) * setting.config.discovery_epochs / len(epochs)
            facts = {"undecided": row["undecided"], "seconds": spent}
            scores = {key: layer.scores for key, layer in masks.layers.items()}
            save_tensors(path, scores, {"facts": json.dumps(facts)})

    if not path.exists():
        base = _base_config(setting, name, seed, files.with_suffix(".checkpoint.safetensors"))
        method = mask_method(setting.config, name)
        started = time.process_time()
        rows, model = batches(setting.config), setting.model()
        discover(model, rows, lm_loss, base, method=method, callbacks=[keep_last], progress=False)
    scores, metadata = load_tensors(path)
    return scores, json.loads(metadata["facts"])


def _base_config(setting: Setting, name: str, seed: int, checkpoint: Path | None) -> DiscoveryConfig:
    """How long to train, and to which density; for continuous sparsification all the rest as well."""
    config = setting.config
    arithmetic = discovery_config(config, setting.depth.layers, checkpoint)
    base = arithmetic
    if mask_method(config, name) is not None:
        base = DiscoveryConfig(arithmetic.epochs, arithmetic.steps_per_epoch, checkpoint=checkpoint)
    target = config.density if name in STEERED else None
    return replace(base, seed=mask_seed(config, seed), target_density=target, cuda_graph=False)


def _final_config(config: MethodsConfig, name: str) -> DiscoveryConfig:
    method = mask_method(config, name)
    return DiscoveryConfig() if method is None else method.config()


def mask_seed(config: MethodsConfig, seed: int) -> int:
    """Of a method's run: the same for all methods, so that they see the same rows in the same order."""
    return seed_for(config.seed, "methods", seed) % 2**31


# --- methods that train weights ---------------------------------------------------------------------------------------


def weight_trainer(setting: Setting, seed: int, epochs: int) -> Callable[[nn.Module], None]:
    """train(model): AdamW on S1 over the weights that masks may choose from; all others stay as in T1."""
    config = setting.config
    rows = data.training_set(data.S1, config.discovery_pairs, config.seed).to(config.device or "cpu")

    def train(model: nn.Module) -> None:
        weights = [model.get_parameter(name) for name in setting.names]
        optimizer = torch.optim.AdamW(weights, config.finetune_lr)
        generator = torch_generator(config.seed, "methods", seed, "order")
        model.eval()  # without dropout, as masks are trained
        for _ in range(epochs):
            for part in torch.randperm(len(rows), generator=generator).to(rows.device).split(config.discovery_batch):
                lm_loss(model, rows[part]).backward()
                optimizer.step()
                optimizer.zero_grad()

    return train


def trainable_model(setting: Setting) -> LeanGPT2:
    """The T1 network whose masked weights alone require gradients."""
    model = setting.model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in setting.names)
    return model


def find_by_pruning(setting: Setting, name: str, seed: int, files: Path) -> Found:
    """Iterative magnitude pruning on S1 from the T1 network, all layers ranked together, rewound to it each round."""
    config, rounds = setting.config, setting.config.pruning_rounds
    trained: list[State] = []

    def keep_state(model: nn.Module) -> float:
        trained.append({key: model.get_parameter(key).detach().clone() for key in setting.names})
        return 0.0

    epochs = config.discovery_epochs // (rounds + 1)
    pruning = PruningConfig(rounds, rate=1 - config.density ** (1 / rounds), scope="global", targets=setting.names)
    train = weight_trainer(setting, seed, epochs)
    tickets = iterative_magnitude_pruning(trainable_model(setting), train, pruning, evaluate=keep_state)
    subnet = with_values(tickets.subnets[-1], trained[-1])
    return Found(subnet, subnet.density(), setting.accuracy_of(subnet))


def find_by_finetuning(setting: Setting, name: str, seed: int, files: Path) -> Found:
    """Lottery-ticket sparse fine-tuning on S1: the weights that moved most, trained alone from the T1 network.

    As the method means it, all other weights stay as in T1: its own accuracy is that network's.
    """
    config = setting.config
    num_kept = round(config.density * sum(setting.source[key].numel() for key in setting.names))
    model = trainable_model(setting)
    train = weight_trainer(setting, seed, config.discovery_epochs // 2)
    found = lottery_ticket_sparse_finetuning(model, train, num_kept)
    found.difference.apply_to(model)
    subnet = with_values(found.subnet, {key: model.get_parameter(key).detach() for key in setting.names})
    return Found(subnet, 1.0, setting.accuracy(model))


def with_values(subnet: Subnet, values: State) -> Subnet:
    """The subnet with these weights instead of the T1 network's."""
    kept = {name: values[name].cpu()[mask] for name, mask in subnet.masks.items()}
    return Subnet(subnet.masks, subnet.provenance, weights=kept)


# --- without training -------------------------------------------------------------------------------------------------


def find_by_size(setting: Setting, name: str, seed: int, files: Path) -> Found:
    """The largest weights of the T1 network."""
    subnet = at_density({key: setting.source[key].abs() for key in setting.names}, setting.config.density)
    return Found(subnet, subnet.density(), setting.accuracy_of(subnet))


def find_by_clusters(setting: Setting, name: str, seed: int, files: Path) -> Found:
    """Spectral clusters of each block's MLP units, those first without which S1 suffers most (on validation pairs).

    The subnet is over the MLPs' weights alone, all that touch the hidden units of the chosen clusters: attention is not
    part of the question and stays as it is.
    """
    model, config = setting.model(), setting.config
    parts: list[Subnet] = []
    for layers in mlp_blocks(model):
        clusters = spectral_clusters(weight_graph(model, layers), config.num_clusters, seed=mask_seed(config, seed))
        hidden = clusters.only(clusters.chain.hidden)
        for number in range(hidden.num_clusters):
            touching = [hidden.subnet(number, edges, biases=False) for edges in ("into", "out")]
            parts.append(_over(touching[0] | touching[1], setting.source))
    scores = []
    for part in parts:
        with part.applied(model, mode="ablate"):
            scores.append(setting.accuracy(model, split="validation"))
    chosen = nearest_union([part for _, part in sorted(zip(scores, parts, strict=True), key=lambda its: its[0])],
                           config.density)  # fmt: skip
    return Found(chosen, chosen.density(), setting.accuracy_of(chosen))


def nearest_union(parts: list[Subnet], density: float) -> Subnet:
    """The union of the first so many subnets whose density is nearest; of one at least."""
    union = best = parts[0]
    for part in parts[1:]:
        union = union | part
        if abs(union.density() - density) < abs(best.density() - density):
            best = union
    return best


def _over(subnet: Subnet, source: State) -> Subnet:
    """The same subnet over the weights of all MLPs."""
    names = [name for name in source if ".mlp." in name and name.endswith("weight")]
    nothing = {name: torch.zeros(source[name].shape, dtype=torch.bool) for name in names}
    return Subnet({**nothing, **subnet.masks}, subnet.provenance)


Finder = Callable[[Setting, str, int, Path], Found]
FINDERS: dict[str, Finder] = {
    **dict.fromkeys(MASK_METHODS, find_mask),
    "magnitude_pruning": find_by_pruning,
    "sparse_finetuning": find_by_finetuning,
    "clusters": find_by_clusters,
    "magnitude": find_by_size,
}  # "random" takes its layer sizes from another method's subnet: stages.py
