"""Spectral clustering of the weight graph, and whether weights in other places would cluster as well (Filan 2021)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from subnets.report.page import Table
from subnets.subnet_file import listed

from .hierarchical import check_num_clusters
from .units import INPUT, Layers, Link, UnitChain, UnitClusters

METHOD = "spectral clustering (Filan et al. 2021)"
EPSILON = 1e-8  # the authors' guard in n-cut's denominator
# the authors' settings: clusters, runs of k-means (and from how many units on), shuffled networks
NUM_CLUSTERS, NUM_SHUFFLES, N_INIT, N_INIT_LARGE, LARGE = 12, 50, 25, 100, 2000

Isolated = Literal["raise", "drop"]


@dataclass(frozen=True)
class WeightGraph:
    """Units as nodes; two units of neighbouring layers are joined by the norm of the weights between them.

    Attributes:
        chain: the layers of units.
        weights: per link the weights of its layers as fp64 ``[out, in, weights between two units]``, batch norm folded.
        norm: 1 or 2.
        nodes: unit layer to bool ``[units]``: which are nodes (isolated units are not).
    """

    chain: UnitChain
    weights: tuple[tuple[np.ndarray, ...], ...]
    norm: int
    nodes: dict[str, np.ndarray]

    @cached_property
    def adjacency(self) -> np.ndarray:
        """Symmetric fp64 ``[nodes, nodes]``, nodes in the order of the layers."""
        full = _adjacency(self.chain, self.weights, self.norm)
        kept = np.concatenate(list(self.nodes.values()))
        return full[np.ix_(kept, kept)]

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return sum(int(kept.sum()) for kept in self.nodes.values())

    def clusters(self, labels: np.ndarray) -> UnitClusters:
        """Return labels of the nodes ``[nodes]`` as clusters of units; units that are no nodes have label -1."""
        labels = np.asarray(labels)
        found, start = {name: np.full(size, -1) for name, size in self.chain.sizes.items()}, 0
        for name, kept in self.nodes.items():
            count = int(kept.sum())
            found[name][kept] = labels[start : start + count]
            start += count
        return UnitClusters(self.chain, found, int(labels.max()) + 1, METHOD)

    def labels(self, clusters: UnitClusters) -> np.ndarray:
        """Return the clusters' labels of the nodes, ``[nodes]``."""
        return np.concatenate([clusters.labels[name][kept] for name, kept in self.nodes.items()])

    def shuffled(self, rng: np.random.Generator, keep_zeros: bool = False) -> WeightGraph:
        """Return the graph with the weights of each layer in random places; units that become isolated are left out.

        Args:
            rng: numpy's generator.
            keep_zeros: shuffle weights that are not zero among themselves, so that the zeros of a pruned network stay.
        """

        def permuted(part: np.ndarray) -> np.ndarray:
            result = part.copy()
            places = part != 0 if keep_zeros else np.ones(part.shape, bool)
            result[places] = rng.permutation(part[places])
            return result

        weights = tuple(tuple(permuted(part) for part in parts) for parts in self.weights)
        return replace(self, weights=weights, nodes=_nodes(self.chain, weights, self.norm))


def weight_graph(
    model: nn.Module, layers: Layers | None = None, *, norms: Mapping[str, str] | None = None, norm: int = 1,
    isolated: Isolated = "raise",
) -> WeightGraph:  # fmt: skip
    """Return the weight graph of a network: units joined by ``|w|``, filters by the norm of the kernel between them.

    Args:
        model: unmasked network.
        layers, norms: as `UnitChain`; None for an `nn.Sequential`, a transformer's from `mlp_blocks`. Inputs and
            outputs are nodes too, but for a convolution's input channels. A batch norm behind a layer is folded into
            its weights: times ``gamma / sqrt(var + eps)``, eps the norm's own (the authors' networks have .001).
        norm: 1 (the authors' setting) or 2, of the weights between two units: a filter's kernel slice, the places of a
            flattened image, gate and input of a gated MLP.
        isolated: what becomes of units without any weight other than 0, as pruning leaves them: "raise" refuses them,
            "drop" leaves them out, as the authors do.

    Raises:
        ValueError: isolated units, weights that are not finite, no edge, or as `UnitChain`.

    Source: Filan, Casper, Hod, Wild, Critch, Russell 2021, "Clusterability in neural networks".
    """
    caller = "weight_graph"
    if norm not in (1, 2) or isolated not in ("raise", "drop"):
        raise ValueError(f"{caller}: norm must be 1 or 2 and isolated 'raise' or 'drop', got {norm!r}, {isolated!r}")
    chain = UnitChain(model, layers, norms, caller)
    if len(chain.links) == 1 and chain.links[0].is_conv:
        raise ValueError(f"{caller}: input channels are no nodes, so one convolution alone makes no graph; add layers")
    weights = tuple(_weights(model, link, caller) for link in chain.links)
    nodes = _nodes(chain, weights, norm)
    lost = [f"{name}:{index}" for name, kept in nodes.items() for index in np.flatnonzero(~kept)]
    total = sum(kept.size for kept in nodes.values())
    if len(lost) == total or (lost and isolated == "raise"):
        raise ValueError(
            f"{caller}: {len(lost)} of {total} units are isolated (all their weights are 0): {listed(lost)}; "
            + ("there is nothing to cluster" if len(lost) == total else "pass isolated='drop' to leave them out")
        )
    return WeightGraph(chain, weights, norm, nodes)


def n_cut(adjacency: np.ndarray, labels: np.ndarray) -> float:
    """Return the normalised cut ``sum over clusters c of cut(c) / (vol(c) + 1e-8)``, from 0 to the number of clusters.

    ``cut(c)`` sums the edges from c to other clusters, ``vol(c)`` the edges from c to anywhere; k random clusters of
    equal size give about k - 1.

    Args:
        adjacency: symmetric ``[nodes, nodes]``, not negative.
        labels: ``[nodes]``, the cluster of each.

    Raises:
        ValueError: other shapes.

    Source: Shi and Malik 2000; the constant is that of Filan et al.'s code.
    """
    adjacency, labels = np.asarray(adjacency, dtype=np.float64), np.asarray(labels)
    if adjacency.shape != (labels.size, labels.size):
        raise ValueError(f"n_cut: adjacency must be [nodes, nodes] with one label per node, got {adjacency.shape} and "
                         f"{labels.shape}")  # fmt: skip
    member = (labels[:, None] == np.unique(labels)).astype(np.float64)
    between = member.T @ adjacency @ member
    volume = between.sum(1)
    np.fill_diagonal(between, 0.0)  # before summing: an uncut cluster gives exactly 0
    return float((between.sum(1) / (volume + EPSILON)).sum())


def spectral_clusters(
    graph: WeightGraph, num_clusters: int = NUM_CLUSTERS, *, seed: int = 0, n_init: int | None = None
) -> UnitClusters:
    """Return the units in clusters that cut few edges: spectral clustering of the weight graph.

    scikit-learn's `SpectralClustering` on the adjacency, with eigen solver "arpack" and k-means.

    Args:
        graph: of `weight_graph`; memory and time grow with the square and the cube of its number of nodes.
        num_clusters: the authors take 12 for small networks.
        seed: of k-means.
        n_init: runs of k-means, of which the best counts; None: 25, from 2,000 nodes on 100, as the authors.

    Raises:
        ValueError: fewer than 1 or more clusters than nodes.
        ImportError: scikit-learn is not installed.
    """
    check_num_clusters(num_clusters, graph.num_nodes, "spectral_clusters")
    return graph.clusters(_spectral_labels(graph.adjacency, num_clusters, seed, n_init))


@dataclass(frozen=True)
class Clusterability:
    """The n-cut of a network beside those of networks with its weights in other places.

    Attributes:
        clusters: of the network.
        n_cut: of these clusters.
        shuffled: fp64 ``[shuffles]``, n-cuts of the shuffled networks, each clustered anew.
    """

    clusters: UnitClusters
    n_cut: float
    shuffled: np.ndarray

    @property
    def p_value(self) -> float:
        """``(number of shuffled networks with a smaller n-cut + 1) / (shuffles + 1)``: small is clusterable."""
        return p_value(self.n_cut, self.shuffled)

    @property
    def z(self) -> float:
        """``(n_cut - mean) / std`` over the shuffled networks: negative is clusterable; NaN without spread."""
        std = float(np.std(self.shuffled))
        return (self.n_cut - float(np.mean(self.shuffled))) / std if std > 0 else float("nan")


def clusterability(
    graph: WeightGraph, num_clusters: int = NUM_CLUSTERS, *, shuffles: int = NUM_SHUFFLES, seed: int = 0,
    n_init: int | None = None, keep_zeros: bool = False,
) -> Clusterability:  # fmt: skip
    """Return whether a network is more clusterable than its weights in random places.

    Args:
        graph, num_clusters, n_init: as `spectral_clusters`.
        shuffles: number of networks whose weights are shuffled within each layer; the least p value is 1/(shuffles+1).
        seed: of shuffles and k-means; shuffle i draws from a generator of its own: more shuffles keep the first ones.
        keep_zeros: shuffle within the weights that are not 0, for pruned networks (the authors' "layer_nonzero").

    Raises:
        ValueError: no shuffle, or as `spectral_clusters`.

    Source: Filan et al. 2021.
    """
    if isinstance(shuffles, bool) or not isinstance(shuffles, int) or shuffles < 1:
        raise ValueError(f"clusterability: shuffles must be an integer >= 1, got {shuffles!r}")
    clusters = spectral_clusters(graph, num_clusters, seed=seed, n_init=n_init)
    cuts = []
    for i in range(shuffles):
        other = graph.shuffled(np.random.default_rng([seed, i]), keep_zeros)
        check_num_clusters(num_clusters, other.num_nodes, "clusterability")
        cuts.append(n_cut(other.adjacency, _spectral_labels(other.adjacency, num_clusters, seed, n_init)))
    return Clusterability(clusters, n_cut(graph.adjacency, graph.labels(clusters)), np.array(cuts))


def clusterability_table(networks: Mapping[str, Clusterability]) -> Table:
    """Return n-cut, mean and spread of the shuffled ones, z and p value of each network.

    Args:
        networks: name to what `clusterability` gave.
    """
    rows = [
        [name, f"{c.n_cut:.3f}", f"{np.mean(c.shuffled):.3f}", f"{np.std(c.shuffled):.3f}", f"{c.z:+.1f}",
         f"{c.p_value:.4f}"]
        for name, c in networks.items()
    ]  # fmt: skip
    return Table("Clusterability", ["network", "n-cut", "shuffled", "std", "z", "p"], rows)


def p_value(value: float, controls: np.ndarray, *, ties_count: bool = False) -> float:
    """Return ``(number of controls below value + 1) / (controls + 1)``, with ``ties_count`` those that equal it too."""
    controls = np.asarray(controls)
    below = controls <= value if ties_count else controls < value
    return (int(below.sum()) + 1) / (controls.size + 1)


def _spectral_labels(adjacency: np.ndarray, num_clusters: int, seed: int, n_init: int | None) -> np.ndarray:
    try:
        from sklearn.cluster import SpectralClustering  # pyright: ignore[reportMissingImports]  # extra [cluster]
    except ImportError as error:
        raise ImportError("spectral clustering needs scikit-learn; run: pip install scikit-learn") from error

    num_nodes = len(adjacency)
    if num_clusters == num_nodes:  # arpack finds fewer eigenvectors than there are nodes
        return np.arange(num_nodes)
    if n_init is None:
        n_init = N_INIT if num_nodes <= LARGE else N_INIT_LARGE
    found = SpectralClustering(num_clusters, affinity="precomputed", eigen_solver="arpack", assign_labels="kmeans",
                               n_init=n_init, random_state=seed)  # fmt: skip
    with warnings.catch_warnings():
        # unconnected parts are what clusters may be, not a mistake
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        return np.asarray(found.fit_predict(adjacency), dtype=np.int64)


def _weights(model: nn.Module, link: Link, caller: str) -> tuple[np.ndarray, ...]:
    """The weights of a link's layers ``[out, in, between]`` in fp64, with the batch norm behind them."""
    scale = torch.ones(link.num_out, dtype=torch.float64)
    if link.norm is not None:
        norm = model.get_submodule(link.norm)
        assert isinstance(norm, _BatchNorm)
        if norm.running_var is None:
            raise ValueError(f"{caller}: {link.norm!r} keeps no running variance, so it can't be folded into weights")
        gamma = norm.weight.detach().double().cpu() if norm.affine else 1.0
        scale = gamma / (norm.running_var.double().cpu() + norm.eps).sqrt()
    stored = [model.get_parameter(f"{name}.weight").detach().double().cpu() for name in link.names]
    parts = tuple((link.by_units(weight) * scale[:, None, None]).numpy() for weight in stored)
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError(f"{caller}: weights must be finite, {link.name!r} has NaN or infinity")
    return parts


def _adjacency(chain: UnitChain, weights: tuple[tuple[np.ndarray, ...], ...], norm: int) -> np.ndarray:
    """``[units, units]`` over all unit layers that are in the graph."""
    links = _edges(chain, weights, norm)
    sizes = [links[0].shape[1], *(edge.shape[0] for edge in links)]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    full = np.zeros((starts[-1], starts[-1]))
    for i, edge in enumerate(links):
        rows, columns = slice(starts[i + 1], starts[i + 2]), slice(starts[i], starts[i + 1])
        full[rows, columns], full[columns, rows] = edge, edge.T
    return full


def _edges(chain: UnitChain, weights: tuple[tuple[np.ndarray, ...], ...], norm: int) -> list[np.ndarray]:
    """Norms ``[out, in]`` between the unit layers; a convolution's input channels are not among them."""
    first = int(chain.links[0].is_conv)
    return [np.linalg.norm(np.concatenate(parts, axis=2), ord=norm, axis=2) for parts in weights[first:]]


def _nodes(chain: UnitChain, weights: tuple[tuple[np.ndarray, ...], ...], norm: int) -> dict[str, np.ndarray]:
    """Unit layer -> which of its units have an edge."""
    names = [link.name for link in chain.links] if chain.links[0].is_conv else [INPUT, *(n.name for n in chain.links)]
    kept = {name: np.zeros(chain.sizes[name], bool) for name in names}
    for edge, before, after in zip(_edges(chain, weights, norm), names, names[1:], strict=False):
        kept[before] |= (edge > 0).any(0)
        kept[after] |= (edge > 0).any(1)
    return kept
