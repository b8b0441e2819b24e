"""MNIST images at several places, so that there are a million samples: for gradients.py."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from influence_jobs.tasks.base import Batch, Draw
from influence_jobs.tasks.mnist import MnistTask

IMAGES = 60_000
MOVES = [(y, x) for y in (0, -1, 1, -2, 2) for x in (0, -1, 1, -2, 2)]  # pixels down and right
WIDTHS = (784, 256, 128, 128, 64)


class MovedMnist(MnistTask):
    """A classifier with four layers of at least 32 x 32 weights.

    Args:
        copies: Samples. Sample i is image i % 60,000, moved by `MOVES[i // 60,000]`.
    """

    def __init__(self, *, copies: int = IMAGES, data_dir: str | None = None):
        super().__init__(data_dir=data_dir)
        self.copies = copies

    def model(self) -> nn.Module:
        hidden = [
            part
            for inputs, outputs in pairwise(WIDTHS)
            for part in (nn.Linear(inputs, outputs), nn.ReLU())
        ]
        return nn.Sequential(*hidden, nn.Linear(WIDTHS[-1], 10), nn.LogSoftmax(dim=1))

    def train_data(self) -> range:
        return range(self.copies)

    def batch(self, ids: Tensor, draw: Draw) -> Batch:
        images_BP, labels_B = super().batch(ids % IMAGES, draw)
        images_BHW, move_B = images_BP.view(-1, 28, 28), ids // IMAGES
        for move in move_B.unique().tolist():
            here = move_B == move
            images_BHW[here] = images_BHW[here].roll(MOVES[move], dims=(1, 2))
        return images_BHW.flatten(1), labels_B

    def describe(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return super().describe(ids % IMAGES)

    def fingerprint(self) -> str:
        return f"MNIST, {self.copies} moved images"
