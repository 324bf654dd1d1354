"""Clusters of a network's units as subnets: by what units correlate with, and by how weights join them.

    hierarchy = unit_hierarchy(model, x); clusters = hierarchy.cut(4)              # Watanabe
    result = clusterability(weight_graph(model), num_clusters=12)                  # Filan et al.
    lesion_test(model, result.clusters, class_accuracies)                          # Casper et al.
    result.clusters.subnet(0)                                                      # a Subnet as any other

Needs scipy; spectral clustering needs scikit-learn.
"""

from .graphical import (
    Clusterability,
    WeightGraph,
    clusterability,
    clusterability_table,
    n_cut,
    spectral_clusters,
    weight_graph,
)
from .hierarchical import UnitHierarchy, signed_correlations, unit_hierarchy, ward
from .lesions import Lesion, LesionTest, combined_p, lesion_test, mean_p
from .units import UnitChain, UnitClusters, mlp_blocks

__all__ = [
    "Clusterability",
    "Lesion",
    "LesionTest",
    "UnitChain",
    "UnitClusters",
    "UnitHierarchy",
    "WeightGraph",
    "clusterability",
    "clusterability_table",
    "combined_p",
    "lesion_test",
    "mean_p",
    "mlp_blocks",
    "n_cut",
    "signed_correlations",
    "spectral_clusters",
    "unit_hierarchy",
    "ward",
    "weight_graph",
]
