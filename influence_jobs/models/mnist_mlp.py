"""The MNIST classifier, a perceptron."""

import torch
import torch.nn.functional as F
from torch import nn


class MnistMLP(nn.Module):
    """784-128-64-10 with ReLU between the layers and log-softmax at the end.

    Its weight layers in forward order are `fc1`, `fc2`, `fc3`.

    Args:
        dropout: Probability of dropping an output of a hidden layer in training.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 128)
        self.fc2 = nn.Linear(128, 64)
        self.fc3 = nn.Linear(64, 10)
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Classify.

        Args:
            images: (B, 28, 28), (B, 1, 28, 28) or (B, 784), normalised to [-1, 1].

        Returns:
            (B, 10) log-probabilities.
        """
        hidden = self._dropped(F.relu(self.fc1(images.flatten(1))))
        hidden = self._dropped(F.relu(self.fc2(hidden)))
        return F.log_softmax(self.fc3(hidden), dim=1)

    def _dropped(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.dropout(hidden) if self.dropout.p else hidden
