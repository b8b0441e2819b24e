"""A task of your own, from start to finish: digits of 8 x 8 pixels and a small convolutional net.

Run it from this folder::

    infl submit train --task digits:DigitsTask --epochs 5 --batch-size 32 --lr 0.05
    infl submit grad-norms --task digits:DigitsTask --checkpoint train-digitstask --layer all
    infl top grad-norms-digitstask --layer conv2 --k 5
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from typing_extensions import Doc

from influence_jobs import Batch, Task

TEST_SAMPLES = 297


class DigitsNet(nn.Module):
    """Two convolutions and a linear layer; images (B, 1, 8, 8) to logits (B, 10)."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width * 16, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.norm(self.conv1(images)))
        hidden = F.relu(self.conv2(hidden))
        return self.head(hidden.flatten(1))


class DigitsTask(Task):
    """scikit-learn's digits; the last 297 of 1,797 are for testing."""

    # An argument is an option of the commands, here `--width 16`. `Doc` is its help text.
    def __init__(
        self, *, width: Annotated[int, Doc("Channels of the first convolution.")] = 8
    ) -> None:
        self.width = width

    @cached_property
    def _all(self) -> tuple[Tensor, Tensor]:
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
        return images, torch.from_numpy(digits.target)

    def model(self) -> nn.Module:
        return DigitsNet(self.width)

    def train_data(self) -> TensorDataset:
        return TensorDataset(*(values[:-TEST_SAMPLES] for values in self._all))

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), self.targets(batch), reduction="none")

    # Scores also need to know what the loss is computed from, and test samples to explain.

    output_loss = "cross-entropy"

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        images, _ = batch
        return model(images)

    def targets(self, batch: Batch) -> Tensor:
        _, labels = batch
        return labels

    def test_data(self) -> TensorDataset:
        return TensorDataset(*(values[-TEST_SAMPLES:] for values in self._all))

    # Everything below is optional.

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        images, labels = self.test_data().tensors
        with torch.no_grad():
            return {"accuracy": float((model(images).argmax(1) == labels).float().mean())}

    def describe(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return {"label": self._all[1].numpy()[ids]}

    def describe_test(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return {"label": self._all[1][-TEST_SAMPLES:].numpy()[ids]}

    @cached_property
    def _pictures(self) -> npt.NDArray[np.uint8]:
        return (self._all[0] * 255).byte().squeeze(1).numpy()

    def pictures(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return self._pictures[ids]

    def test_picture(self, test: int) -> npt.NDArray[np.uint8]:
        return self._pictures[-TEST_SAMPLES:][test]
