"""The task of the kept runs: 24 pictures of 2 x 3 pixels in three classes, and a small perceptron.

The runs beside this file are named after its bytes. Never edit it: not even a comment or a space.
"""

import random
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_jobs import Batch, Task

TESTS = 5


def _samples(count: int, seed: int) -> TensorDataset:
    """Pixels (count, 6) in [0, 1] and classes: the column that is brightest, with some noise."""
    draws = random.Random(seed)  # Python promises the same numbers from every version
    pixels = torch.tensor([[draws.randrange(256) for _ in range(6)] for _ in range(count)])
    noise = torch.tensor([[draws.randrange(80) for _ in range(3)] for _ in range(count)])
    labels = (pixels[:, :3] + pixels[:, 3:] + noise).argmax(1)
    return TensorDataset(pixels.float() / 255, labels)


class Tiny(Task):
    """A classifier.

    Args:
        rows: Training samples.
        folder: Where other data would lie; nothing reads it.
    """

    batch_size = 16
    paths = frozenset({"folder"})
    output_loss: ClassVar[Any] = "cross-entropy"

    def __init__(self, *, rows: int = 24, folder: str | None = None):
        self._train = _samples(rows, seed=1)
        self._test = _samples(TESTS, seed=2)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))

    def train_data(self) -> TensorDataset:
        return self._train

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), self.targets(batch), reduction="none")

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(batch[0])
        return logits

    def targets(self, batch: Batch) -> Tensor:
        labels: Tensor = batch[1]
        return labels

    def test_data(self) -> TensorDataset:
        return self._test

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        pixels, labels = self._test.tensors
        return {"accuracy": float((model(pixels).argmax(1) == labels).float().mean())}

    def describe(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return {"label": self._train.tensors[1].numpy()[ids]}

    def describe_test(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return {"label": self._test.tensors[1].numpy()[ids]}

    def pictures(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return _pictures(self._train)[ids]

    def test_picture(self, test: int) -> npt.NDArray[np.uint8]:
        picture: npt.NDArray[np.uint8] = _pictures(self._test)[test]
        return picture


def _pictures(samples: TensorDataset) -> npt.NDArray[np.uint8]:
    pixels = (samples.tensors[0] * 255).round().byte().view(-1, 2, 3)
    array: npt.NDArray[np.uint8] = pixels.numpy()
    return array
