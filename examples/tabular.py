"""Regression on a table, with a perceptron and BatchNorm: docs/examples/tabular.md."""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typing_extensions import Doc

from influence_jobs import Batch, Task

TESTS = 42


class Tabular(Task):
    """How far will a diabetes have gone in a year? 442 patients, ten columns; scikit-learn's."""

    output_loss = "mse"

    def __init__(
        self,
        *,
        samples: Annotated[int, Doc("Patients to train on, up to 400.")] = 400,
        width: Annotated[int, Doc("Units of a hidden layer.")] = 16,
    ) -> None:
        self.width = width
        table = load_diabetes(scaled=False)
        features = torch.from_numpy(table.data).float()
        progress = torch.from_numpy(table.target).float()
        mean, deviation = features[:-TESTS].mean(0), features[:-TESTS].std(0)
        features, progress = (features - mean) / deviation, (progress - 150) / 75
        self.table, self.columns = table.data, table.feature_names
        self.train_set = TensorDataset(features[:samples], progress[:samples])
        self.test_set = TensorDataset(features[-TESTS:], progress[-TESTS:])

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(10, self.width),
            nn.BatchNorm1d(self.width),
            nn.ReLU(),
            nn.Linear(self.width, self.width),
            nn.BatchNorm1d(self.width),
            nn.ReLU(),
            nn.Linear(self.width, 1),
        )

    def train_data(self) -> TensorDataset:
        return self.train_set

    def test_data(self) -> TensorDataset:
        return self.test_set

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0]).squeeze(1)  # (B,), as the targets: (B, 1) - (B,) would be (B, B)

    def targets(self, batch: Batch) -> Tensor:
        return batch[1]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return (self.outputs(model, batch) - self.targets(batch)).square()

    # What is explained: the error of a prediction, or the prediction itself.

    quantities = ("loss", "prediction")

    def measure(self, model: nn.Module, batch: Batch, quantity: str, region: object) -> Tensor:
        if quantity == "prediction":
            return self.outputs(model, batch)
        return self.losses(model, batch)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        return {"mean squared error": float(self.losses(model, self.test_set.tensors).mean())}

    def fingerprint(self) -> str:
        """A table is small: all of it counts, not sixteen rows."""
        values = torch.cat([self.train_set.tensors[0], self.train_set.tensors[1][:, None]], 1)
        return f"{len(values)} rows, {hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]}"

    def describe(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return {**self._columns(ids), "progress": self.train_set.tensors[1].numpy()[ids] * 75 + 150}

    def describe_test(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return self._columns(ids - TESTS)

    def _columns(self, rows: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        shown = [self.columns.index(name) for name in ("age", "bmi", "bp")]
        return {self.columns[i]: self.table[rows, i] for i in shown}
