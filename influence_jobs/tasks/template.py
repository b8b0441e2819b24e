"""My task: `infl check template.py:MyTask`, then `infl submit ... --task template.py:MyTask`.

It works as it stands, on handwritten digits. Put your own in wherever it says HERE.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_jobs import Batch, Task


def digits(first: int, last: int) -> TensorDataset:
    """Images (1, 8, 8) and their classes. HERE: your data; any Dataset with a length."""
    found = load_digits()
    images = torch.from_numpy(found.images[first:last]).float().unsqueeze(1) / 16
    return TensorDataset(images, torch.from_numpy(found.target[first:last]))


class MyTask(Task):
    """HERE: what it is. Arguments of __init__ become options of the commands."""

    output_loss = "cross-entropy"  # HERE: or "mse", or None for a loss of your own

    def __init__(self, *, width: int = 8) -> None:
        self.width = width
        self.known, self.unseen = digits(0, 1500), digits(1500, 1797)  # loaded once

    def model(self) -> nn.Module:
        """HERE: your network, freshly initialised; trained weights come with --checkpoint."""
        conv = nn.Conv2d(1, self.width, 3, stride=2, padding=1)
        return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(16 * self.width, 10))

    def train_data(self) -> TensorDataset:
        """The training samples; the position of one is its id for good."""
        return self.known

    def test_data(self) -> TensorDataset:
        """The samples whose outputs you want explained."""
        return self.unseen

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """HERE: how a batch goes through the model; the loss is of this, one row a sample."""
        images, _ = batch
        return model(images)

    def targets(self, batch: Batch) -> Tensor:
        """What the outputs are compared with."""
        return batch[1]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """HERE: your training loss, one number a sample: no mean over the batch."""
        return F.cross_entropy(self.outputs(model, batch), self.targets(batch), reduction="none")
