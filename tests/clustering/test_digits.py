"""The published finding at small scale: dropout makes networks on digits clusterable far beyond shuffling."""

from __future__ import annotations

import pytest
import torch
from subnets.clustering import clusterability, weight_graph
from torch import nn
from torch.nn import functional as F

datasets = pytest.importorskip("sklearn.datasets")


def trained(dropout):
    x, y = (torch.as_tensor(part) for part in datasets.load_digits(return_X_y=True))
    x = x.float() / 16
    torch.manual_seed(0)
    hidden = [part for _ in range(3) for part in (nn.Linear(64, 64), nn.ReLU(), nn.Dropout(dropout))]
    model = nn.Sequential(*hidden, nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(40):
        for rows in torch.randperm(len(x)).split(64):
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    assert (model(x).argmax(1) == y).float().mean() > 0.97
    return model


@pytest.mark.slow
def test_a_network_trained_with_dropout_is_clusterable_and_a_plain_one_is_within_the_spread():
    plain, dropped = (clusterability(weight_graph(trained(rate)), n_init=10) for rate in (0.0, 0.5))
    assert dropped.p_value == 1 / 51 and dropped.z < -5
    assert abs(plain.z) < 3  # its p value varies over seeds as that of a random network: .04 to .73
