"""Hierarchical clustering of units by what they correlate with (Watanabe 2019)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from subnets.subnet_file import listed

from .units import Layers, UnitChain, UnitClusters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHOD = "hierarchical clustering (Watanabe 2019)"


def signed_correlations(outputs: np.ndarray, signals: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of each unit with each signal, ``np.corrcoef``'s block between the two.

    Args:
        outputs: ``[n, units]``, what each unit gave on n examples.
        signals: ``[n, signals]``, inputs or outputs of the network on the same examples.

    Returns:
        fp64 ``[units, signals]`` in [-1, 1]; NaN for a unit or signal that is constant.
    """

    def standardized(values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, dtype=np.float64)
        centered = values - values.mean(0)
        # the mean of equal numbers may be off by a rounding: constant is what has no range
        centered[:, np.ptp(values, axis=0) == 0] = np.nan
        return centered / np.sqrt((centered**2).sum(0))

    return np.clip(standardized(outputs).T @ standardized(signals), -1, 1)


def ward(features: np.ndarray) -> np.ndarray:
    """Return Ward's linkage ``[units - 1, 4]`` as `scipy.cluster.hierarchy.linkage` gives it.

    Each step merges the two clusters A, B of least ``dE = |A||B| / (|A|+|B|) * |c_A - c_B|^2``, c their centres; the
    height of a merge is ``sqrt(2 dE)``.

    Args:
        features: ``[units, features]``, at least two units.
    """
    from scipy.cluster.hierarchy import linkage

    return linkage(features, method="ward")


@dataclass(frozen=True)
class UnitHierarchy:
    """Hidden units of a network, merged step by step by Ward's criterion; `unit_hierarchy` makes it.

    Attributes:
        chain: the layers of units.
        units: ``(layer, index)`` of each clustered unit.
        features: fp64 ``[units, inputs + outputs]``: signed correlations with the network's inputs, then outputs.
        num_inputs: how many of the features are inputs.
        linkage: Ward's, ``[units - 1, 4]``; its third column are the heights.
        constant_units: ``(layer, index)`` of units that were left out.
        constant_signals: indices of features that are 0 because the input or output is constant.
    """

    chain: UnitChain
    units: list[tuple[str, int]]
    features: np.ndarray
    num_inputs: int
    linkage: np.ndarray
    constant_units: list[tuple[str, int]]
    constant_signals: list[int]

    def cut(self, num_clusters: int) -> UnitClusters:
        """Return the units in ``num_clusters`` clusters: the state before the last ``num_clusters - 1`` merges.

        Units that are not hidden, and constant ones, have label -1.

        Raises:
            ValueError: fewer than 1 or more clusters than units.
        """
        numbers = self._cut(num_clusters, "UnitHierarchy.cut")
        labels = {name: np.full(self.chain.sizes[name], -1) for name in self.chain.sizes}
        for (layer, index), number in zip(self.units, numbers, strict=True):
            labels[layer][index] = number
        return UnitClusters(self.chain, labels, num_clusters, METHOD)

    def centers(self, num_clusters: int) -> np.ndarray:
        """Return the mean features of each cluster of the cut, ``[num_clusters, inputs + outputs]``: what its units
        react to, and what they act on. Raises as `cut`."""
        numbers = self._cut(num_clusters, "UnitHierarchy.centers")
        return np.stack([self.features[numbers == c].mean(0) for c in range(num_clusters)])

    def figure(self, num_clusters: int | None = None) -> Figure:
        """Return the dendrogram, heights upwards; ``num_clusters`` draws the line of that cut."""
        from scipy.cluster.hierarchy import dendrogram

        from subnets.report.drawing import new_figure

        figure, (axes,) = new_figure(size=(max(7.2, 0.08 * len(self.units)), 4.4))
        dendrogram(self.linkage, ax=axes, no_labels=len(self.units) > 60, color_threshold=0,
                   above_threshold_color="#0072b2", labels=[f"{layer}:{index}" for layer, index in self.units],
                   leaf_rotation=90)  # fmt: skip
        if num_clusters is not None:
            self._cut(num_clusters, "UnitHierarchy.figure")
            heights = [0.0, *self.linkage[:, 2], self.linkage[-1, 2] * 1.05]
            merges = len(self.units) - num_clusters
            axes.axhline((heights[merges] + heights[merges + 1]) / 2, color="#d55e00", linestyle="--")
        axes.set_ylabel("height, sqrt(2 dE)")
        return figure

    def _cut(self, num_clusters: int, caller: str) -> np.ndarray:
        from scipy.cluster.hierarchy import cut_tree

        check_num_clusters(num_clusters, len(self.units), caller)
        return cut_tree(self.linkage, n_clusters=num_clusters)[:, 0]


def unit_hierarchy(
    model: nn.Module, inputs: Tensor | Mapping[str, Any], layers: Layers | None = None, *,
    norms: Mapping[str, str] | None = None, constant: Literal["raise", "drop"] = "raise",
) -> UnitHierarchy:  # fmt: skip
    """Return the hidden units of all layers, clustered by their signed correlations with inputs and outputs.

    Unit k has the features ``v_k = (corr(o_k, x_1) ... corr(o_k, x_I), corr(o_k, y_1) ... corr(o_k, y_J))``; units are
    merged by Ward's criterion. The sign tells a unit that a signal excites from one that it inhibits.

    Args:
        model: unmasked network; runs once, in eval mode.
        inputs: one batch: what the model is called with, a tensor or a dict of keyword arguments. The more examples,
            the better the correlations.
        layers, norms: as `UnitChain`; None for an `nn.Sequential`. A unit's output is what the next layer reads (behind
            the activation function), a filter's its mean over the image; each token of a sequence is an example.
        constant: what becomes of units that give the same output on all examples, whose correlation is undefined:
            "raise" refuses them, "drop" leaves them out. A constant input or output counts as uncorrelated with all.

    Raises:
        ValueError: constant units, fewer than two examples or units, values that are not finite, or as `UnitChain`.

    Source: Watanabe, "Interpreting layered neural networks via hierarchical modular representation", arXiv 1810.01588.
    """
    caller = "unit_hierarchy"
    if constant not in ("raise", "drop"):
        raise ValueError(f"{caller}: constant must be 'raise' or 'drop', got {constant!r}")
    chain = UnitChain(model, layers, norms, caller)
    if not chain.hidden:
        raise ValueError(f"{caller}: at least two layers are needed, so that there are hidden units between them")
    x, hidden, y = _record(model, chain, inputs, caller)
    signals, outputs = np.concatenate([x, y], 1), np.concatenate(list(hidden.values()), 1)
    if len(signals) < 2 or not np.isfinite(signals).all() or not np.isfinite(outputs).all():
        raise ValueError(f"{caller}: correlations need two examples or more and finite values, got {len(signals)}")
    units = [(name, index) for name, values in hidden.items() for index in range(values.shape[1])]
    features = signed_correlations(outputs, signals)
    is_constant = np.ptp(outputs, axis=0) == 0
    constants = [unit for unit, is_one in zip(units, is_constant, strict=True) if is_one]
    if constants and constant == "raise":
        names = listed(f"{layer}:{index}" for layer, index in constants)
        raise ValueError(
            f"{caller}: {len(constants)} of {len(units)} units give the same output on all {len(signals)} examples, so "
            f"that their correlation is undefined: {names}; pass constant='drop' to leave them out, or more examples"
        )
    units = [unit for unit, is_one in zip(units, is_constant, strict=True) if not is_one]
    if len(units) < 2:
        raise ValueError(f"{caller}: at least two units must vary over the examples, got {len(units)}")
    features = np.nan_to_num(features[~is_constant], nan=0.0)
    flat = np.flatnonzero(np.ptp(signals, axis=0) == 0).tolist()
    return UnitHierarchy(chain, units, features, x.shape[1], ward(features), constants, flat)


def check_num_clusters(num_clusters: int, num_units: int, caller: str) -> None:
    """Raise unless ``num_clusters`` is from 1 to the number of units."""
    if isinstance(num_clusters, bool) or not isinstance(num_clusters, int) or not 1 <= num_clusters <= num_units:
        raise ValueError(f"{caller}: num_clusters must be from 1 to the {num_units} units there are, "
                         f"got {num_clusters!r}")  # fmt: skip


@torch.no_grad()
def _record(
    model: nn.Module, chain: UnitChain, inputs: Tensor | Mapping[str, Any], caller: str
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """One pass: inputs ``[n, I]``, hidden units' outputs by layer ``[n, units]``, outputs ``[n, J]``."""
    read: dict[str, list[Tensor]] = {link.name: [] for link in chain.links}
    written: list[Tensor] = []

    def record_into(its: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: its.append(args[0])

    def record_output(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        written.append(out)

    handles = [model.get_submodule(name).register_forward_pre_hook(record_into(its)) for name, its in read.items()]
    last = model.get_submodule(chain.links[-1].name)
    handles.append(last.register_forward_hook(record_output))
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, was_training in modes.items():
            module.training = was_training
    if odd := [name for name, its in read.items() if len(its) != 1]:
        raise ValueError(f"{caller}: each layer must run once in a pass, these ran never or several times: {odd}")
    signals = _examples(read[chain.links[0].name][0], chain.links[0].is_conv)
    for link, after in zip(chain.links, chain.links[1:], strict=False):
        shape = list(read[after.name][0].shape)
        if link.is_conv and not after.is_conv and len(shape) != 2:
            raise ValueError(
                f"{caller}: behind convolution {link.name!r}, {after.name!r} must read [images, features], got {shape};"
                " leave the convolutions out with layers=[...]"
            )
    hidden = {
        link.name: _unit_outputs(read[after.name][0], link.num_out, after.is_conv, link.is_conv)
        for link, after in zip(chain.links, chain.links[1:], strict=False)
    }
    y = _unit_outputs(written[0], chain.links[-1].num_out, chain.links[-1].is_conv, chain.links[-1].is_conv)
    return signals, hidden, y


def _examples(values: Tensor, is_image: bool) -> np.ndarray:
    """``[n, values of one example]``: an image is one example, otherwise all but the last dimension are examples."""
    values = values.flatten(1) if is_image else values.reshape(-1, values.shape[-1])
    return values.double().cpu().numpy()


def _unit_outputs(values: Tensor, num_units: int, is_image: bool, is_filters: bool) -> np.ndarray:
    """``[n, units]``: the mean over the image where units are filters, flattened or not."""
    examples = _examples(values, is_image or is_filters)
    return examples.reshape(len(examples), num_units, -1).mean(2)
