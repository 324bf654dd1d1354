"""Layers of units that feed one another: which weights lead into and out of each unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from subnets.nn.hf_conv1d import is_hf_conv1d
from subnets.provenance import provenance_of
from subnets.report.page import Table
from subnets.subnet import Subnet
from subnets.subnet_file import listed
from subnets.subnet_fit import check_unmasked

Layers = Sequence[str | tuple[str, ...]]
Edges = Literal["into", "out", "within"]
INPUT = "input"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KINDS = "linear layers, ungrouped convolutions and transformers' Conv1D"

# Whole names below one parent: what leads into the hidden units of a transformer's MLP (side by side: gate and input),
# and what leads out of them.
_MLP_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Qwen, Gemma
    (("up_proj",), "down_proj"),
    (("wi_0", "wi_1"), "wo"),  # T5 v1.1
    (("wi",), "wo"),
    (("c_fc",), "c_proj"),  # GPT-2
    (("fc1",), "fc2"),  # OPT, CLIP, ViT
    (("fc_in",), "fc_out"),  # GPT-J
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX
    (("intermediate.dense",), "output.dense"),  # BERT
    (("lin1",), "lin2"),  # DistilBERT
    (("linear1",), "linear2"),  # nn.TransformerEncoderLayer
)


@dataclass(frozen=True)
class Link:
    """The weights between one layer of units and the next.

    Attributes:
        names: of the layer; of several side by side where a unit has several (gate and input of a gated MLP).
        shapes: of their weights, as stored.
        num_in, num_out: units on both sides; a filter is one unit, wherever in the image it is.
        is_conv, is_transposed: whether the layer is a convolution, and whether its weight is stored ``[in, out]``.
        others: parameters that hold one value per output unit: biases, scale and shift of a folded batch norm.
        norm: the batch norm that follows, if any.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    num_in: int
    num_out: int
    is_conv: bool
    is_transposed: bool
    others: tuple[str, ...]
    norm: str | None

    @property
    def name(self) -> str:
        """Name of the layer, which is that of its output units too."""
        return self.names[0]

    def by_units(self, weight: Tensor) -> Tensor:
        """The stored weight as ``[num_out, num_in, weights between the two units]``."""
        weight = weight.t() if self.is_transposed else weight
        return weight.reshape(self.num_out, self.num_in, -1)

    def mask(self, between: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The mask ``[num_out, num_in]`` over pairs of units as one over the stored weight."""
        per_pair = int(np.prod(shape)) // max(1, between.numel())
        full = between[:, :, None].expand(-1, -1, per_pair)
        return full.reshape(self.num_out, -1).t().contiguous() if self.is_transposed else full.reshape(shape)


class UnitChain:
    """Layers of units that feed one another, with the weights between them.

    Args:
        model: unmasked network.
        layers: names of the layers in the order in which they run; a tuple holds layers side by side whose outputs make
            one unit (``("gate_proj", "up_proj")``). None takes all of an `nn.Sequential`, nested ones included.
        norms: layer's name to the batch norm that follows it, where that is not told by the order of a Sequential.
        caller: begins the error messages.

    Attributes:
        links: one `Link` per layer; its output units are called by its name, the units before the first ``"input"``.
        sizes: unit layer to its number of units: inputs, hidden units, outputs.

    Raises:
        ValueError: the order of layers cannot be told, a layer is of another kind, or two do not fit together.
    """

    def __init__(
        self, model: nn.Module, layers: Layers | None = None, norms: Mapping[str, str] | None = None,
        caller: str = "UnitChain",
    ) -> None:  # fmt: skip
        check_unmasked(model, caller)
        modules = dict(model.named_modules())
        if layers is None:
            layers, norms = _of_sequential(model, caller)
        elif isinstance(layers, str) or not layers:
            raise ValueError(f"{caller}: layers must be a list of layers' names in the order they run, got {layers!r}")
        self.links: list[Link] = []
        for item in layers:
            names = (item,) if isinstance(item, str) else tuple(item)
            before = self.links[-1] if self.links else None
            self.links.append(_link(names, modules, dict(norms or {}), before, caller))
        named = [INPUT, *(name for link in self.links for name in link.names)]
        if len(set(named)) < len(named):
            raise ValueError(f"{caller}: each layer can be named once, and none {INPUT!r}, got {named[1:]}")
        self.provenance: dict[str, Any] = provenance_of(model)
        self.sizes = {INPUT: self.links[0].num_in, **{link.name: link.num_out for link in self.links}}

    @property
    def hidden(self) -> list[str]:
        """Names of the layers of hidden units: all but the inputs and the outputs."""
        return [link.name for link in self.links[:-1]]

    def subnet(
        self, units: Mapping[str, np.ndarray], edges: Edges = "into", *, biases: bool = True, **provenance: Any
    ) -> Subnet:
        """Return the weights at chosen units as a `Subnet`; see `UnitClusters.subnet`.

        Args:
            units: unit layer to bool ``[units]``; layers that are not named have none chosen.
        """
        if edges not in ("into", "out", "within"):
            raise ValueError(f"UnitClusters.subnet: edges must be 'into', 'out' or 'within', got {edges!r}")
        masks: dict[str, Tensor] = {}
        before = INPUT
        for link in self.links:
            ends = [torch.from_numpy(units.get(n, np.zeros(self.sizes[n], bool))) for n in (before, link.name)]
            source, target = ends[0][None, :], ends[1][:, None]
            chosen = {"into": target, "out": source, "within": target & source}[edges].expand(
                link.num_out, link.num_in
            )
            for name, shape in zip(link.names, link.shapes, strict=True):
                masks[f"{name}.weight"] = link.mask(chosen, shape)
            if biases:
                masks |= {other: ends[1] & (edges != "out") for other in link.others}
            before = link.name
        return Subnet(masks, {**self.provenance, "edges": edges, **provenance})


@dataclass(frozen=True)
class UnitClusters:
    """Units of a network in clusters.

    Attributes:
        chain: the layers of units.
        labels: unit layer to int64 ``[units]``, the cluster of each unit; -1 where it is in none.
        num_clusters: clusters are numbered from 0 to this, exclusive.
        method: what found them; goes into the subnets' provenance.
    """

    chain: UnitChain
    labels: dict[str, np.ndarray]
    num_clusters: int
    method: str

    def units(self, cluster: int) -> dict[str, np.ndarray]:
        """Return unit layer to bool ``[units]``: which are in the cluster.

        Raises:
            ValueError: there is no such cluster.
        """
        if isinstance(cluster, bool) or not isinstance(cluster, int) or not 0 <= cluster < self.num_clusters:
            raise ValueError(f"UnitClusters: cluster must be from 0 to {self.num_clusters - 1}, got {cluster!r}")
        return {name: labels == cluster for name, labels in self.labels.items()}

    def only(self, layers: Sequence[str]) -> UnitClusters:
        """Return the same clusters without the units of other layers: ``only(["3"])`` gives subclusters of one layer,
        ``only(clusters.chain.hidden)`` leaves out inputs and outputs, without which nothing works.

        Raises:
            ValueError: a layer without units, or of another network.
        """
        if isinstance(layers, str) or not layers or set(layers) - set(self.labels):
            raise ValueError(f"UnitClusters.only: layers must be a list of {list(self.labels)}, got {layers!r}")
        labels = {name: its if name in layers else np.full_like(its, -1) for name, its in self.labels.items()}
        return replace(self, labels=labels)

    def subnet(self, cluster: int, edges: Edges = "into", *, biases: bool = True) -> Subnet:
        """Return the cluster as a `Subnet` over the weights (and biases) of all layers of the chain.

        Args:
            cluster: its number.
            edges: "into": all weights that lead into the cluster's units, with these units' biases: ablating it is the
                lesion of Casper et al., after which a unit's activation is that of 0 (0 itself for ReLU, GELU, tanh).
                "within": weights between two units of the cluster (what the n-cut does not cut) and these units'
                biases: what a planted cluster is. "out": weights that lead out of its units.
            biases: False leaves biases and batch norms out of the question, as learned masks over weights do, so that
                the two can be compared (`Subnet.iou` wants the same parameters on both sides).

        Returns:
            A Subnet that can be applied, ablated, planted, combined, saved as any other.

        Source: lesions: Casper, Hod et al. 2022, "Graphical clusterability and local specialization".
        """
        about = {"method": self.method, "cluster": cluster, "num_clusters": self.num_clusters}
        return self.chain.subnet(self.units(cluster), edges, biases=biases, **about)

    def table(self) -> Table:
        """Return how many units of each layer are in each cluster."""
        head = ["layer", *(str(c) for c in range(self.num_clusters)), "none"]
        rows = [
            [name, *(str(int((labels == c).sum())) for c in (*range(self.num_clusters), -1))]
            for name, labels in self.labels.items()
        ]
        return Table("Units by cluster", head, rows)


def mlp_blocks(model: nn.Module) -> list[list[str | tuple[str, ...]]]:
    """Return the MLP blocks of a transformer, each as ``layers`` for `weight_graph` and `unit_hierarchy`.

    A block is known by the names that transformers and torch give its layers (c_fc and c_proj; gate_proj, up_proj and
    down_proj; fc1 and fc2; intermediate.dense and output.dense; linear1 and linear2; ...).

    Args:
        model: any; its modules are looked through by name.

    Raises:
        ValueError: no such block.
    """
    modules = dict(model.named_modules())
    blocks: list[list[str | tuple[str, ...]]] = []
    for parent in modules:
        for into, out in _MLP_NAMES:
            names = [f"{parent}.{own}" if parent else own for own in (*into, out)]
            if all(name in modules and _is_linear(modules[name]) for name in names):
                *first, last = names
                blocks.append([first[0] if len(first) == 1 else tuple(first), last])
                break
    if not blocks:
        raise ValueError(
            f"mlp_blocks: {type(model).__name__} has no MLP block with names that are known "
            f"({listed(' + '.join([*into, out]) for into, out in _MLP_NAMES)}); pass layers= yourself"
        )
    return blocks


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_hf_conv1d(module)


def _is_layer(module: nn.Module) -> bool:
    return _is_linear(module) or isinstance(module, _CONVOLUTIONS)


def _of_sequential(model: nn.Module, caller: str) -> tuple[list[str], dict[str, str]]:
    """The layers of a Sequential in their order, and the batch norm behind each."""
    if type(model) is not nn.Sequential:
        names = [name for name, module in model.named_modules() if _is_layer(module)]
        raise ValueError(
            f"{caller}: the order in which a {type(model).__name__} runs its layers can't be told; pass layers=[...] "
            f"in that order (mlp_blocks(model) finds a transformer's), of: {listed(names)}"
        )
    layers: list[str] = []
    norms: dict[str, str] = {}
    for name, module in _leaves(model):
        if _is_layer(module):
            layers.append(name)
        elif isinstance(module, _BatchNorm) and layers and layers[-1] not in norms:
            norms[layers[-1]] = name
        elif any(True for _ in module.parameters()):
            raise ValueError(f"{caller}: {_kind_error(name, module)}; pass layers=[...] to leave it out")
    if not layers:
        raise ValueError(f"{caller}: the model has none of {_KINDS}")
    return layers, norms


def _leaves(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if type(child) is nn.Sequential:
            yield from _leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _kind_error(name: str, module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, _CONVOLUTIONS):
        kind += f" with groups={module.groups}"
    return f"units are those of {_KINDS} (with a batch norm behind them), and {name!r} is a {kind}"


def _link(
    names: tuple[str, ...], modules: Mapping[str, nn.Module], norms: Mapping[str, str], before: Link | None, caller: str
) -> Link:
    for name in names:
        if name not in modules:
            known = [own for own, module in modules.items() if _is_layer(module)]
            raise ValueError(f"{caller}: the model has no layer {name!r}; it has {listed(known)}")
        module = modules[name]
        if not _is_layer(module) or (isinstance(module, _CONVOLUTIONS) and module.groups != 1):
            raise ValueError(f"{caller}: {_kind_error(name, module)}")
    widths = {_widths(modules[name]) for name in names}
    if len(widths) != 1:
        raise ValueError(f"{caller}: layers side by side must have the same widths, got {names} with {sorted(widths)}")
    ((width, num_out),) = widths
    is_conv = isinstance(modules[names[0]], _CONVOLUTIONS)
    num_in = width if before is None else before.num_out
    # a linear layer behind a convolution reads flattened images: some neighbouring inputs per filter
    flattens = before is not None and before.is_conv and not is_conv
    if width != num_in and not (flattens and width % num_in == 0):
        raise ValueError(
            f"{caller}: {names[0]!r} takes {width} inputs, and {before.name if before else INPUT!r} before it has "
            f"{num_in} units; pass layers=[...] in the order in which they run"
        )
    norm = norms.get(names[0])
    if norm is not None and not (isinstance(modules.get(norm), _BatchNorm) and modules[norm].num_features == num_out):
        raise ValueError(f"{caller}: norms[{names[0]!r}] must name a batch norm over {num_out} units, got {norm!r}")
    owners = [(f"{name}.bias", modules[name].bias) for name in names]
    owners += [(f"{norm}.{own}", getattr(modules[norm], own)) for own in ("weight", "bias")] if norm else []
    return Link(
        names, tuple(_weight_shape(modules[name]) for name in names), num_in, num_out, is_conv,
        is_hf_conv1d(modules[names[0]]), tuple(name for name, value in owners if value is not None), norm,
    )  # fmt: skip


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    return tuple(module.get_parameter("weight").shape)


def _widths(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a layer: features or channels."""
    shape = _weight_shape(module)
    return (shape[0], shape[1]) if is_hf_conv1d(module) else (shape[1], shape[0])
