"""A task so small that a hundred models are trained in seconds."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_jobs import Task


class Tiny(Task):
    """48 points of two classes."""

    output_loss = "cross-entropy"

    def __init__(self):
        x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
        y = (x[:, 0] + 0.5 * x[:, 1] > 0).long()
        self.points, self.others = TensorDataset(x[:48], y[:48]), TensorDataset(x[48:], y[48:])

    def model(self):
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))

    def train_data(self):
        return self.points

    def test_data(self):
        return self.others

    def outputs(self, model, batch):
        return model(batch[0])

    def targets(self, batch):
        return batch[1]

    def losses(self, model, batch):
        return F.cross_entropy(self.outputs(model, batch), self.targets(batch), reduction="none")
