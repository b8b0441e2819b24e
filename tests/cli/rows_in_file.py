"""A task whose rows lie in a file, which may be written anew."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_jobs import Task
from influence_jobs.tasks.base import FINGERPRINT_ROWS, Draw

N = 200


class Rows(Task):
    """Points of three classes, shown as pictures of two by two pixels."""

    output_loss = "cross-entropy"
    paths = frozenset({"path"})

    def __init__(self, *, path: str):
        self._path = path

    def _rows(self, name: str) -> TensorDataset:
        return TensorDataset(*torch.load(self._path)[name])

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def train_data(self) -> TensorDataset:
        return self._rows("train")

    def test_data(self) -> TensorDataset:
        return self._rows("test")

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        found: Tensor = model(batch[0])
        return found

    def targets(self, batch: Any) -> Tensor:
        found: Tensor = batch[1]
        return found

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), self.targets(batch), reduction="none")

    def pictures(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return _grey(self.batch(torch.from_numpy(ids), Draw(0))[0])

    def test_picture(self, test: int) -> npt.NDArray[np.uint8]:
        return _grey(self.test_batch(torch.tensor([test]), Draw(0))[0])[0]


class Moved(Rows):
    """Scores see the points moved by `shift`, of which training knows nothing."""

    attribution_options = frozenset({"shift"})

    def __init__(self, *, path: str, shift: float = 0.0):
        super().__init__(path=path)
        self._shift = shift

    def fingerprint(self) -> str:
        return f"{len(self.train_data())} rows"

    def batch(self, ids: Tensor, draw: Draw) -> Any:
        points, classes = super().batch(ids, draw)
        return points + self._shift, classes

    def train_batch(self, ids: Tensor, draw: Draw) -> Any:
        return super().batch(ids, draw)


def _grey(rows_B4: Tensor) -> npt.NDArray[np.uint8]:
    found: npt.NDArray[np.uint8] = (
        (128 + 30 * rows_B4).clamp(0, 255).byte().reshape(-1, 2, 2).numpy()
    )
    return found


def write(path: Path, *, train: float = 0.0, test: float = 0.0) -> None:
    """Write the file, with so much added to training and test rows.

    The training rows of which a fingerprint is made stay as they are.
    """
    generator = torch.Generator().manual_seed(0)
    x, others = (torch.randn(n, 4, generator=generator) for n in (N, 5))
    free = torch.ones(N, dtype=torch.bool)
    free[torch.linspace(0, N - 1, FINGERPRINT_ROWS).round().long()] = False
    x[free] += train
    torch.save(
        {"train": (x, torch.arange(N) % 3), "test": (others + test, torch.arange(5) % 3)}, path
    )
