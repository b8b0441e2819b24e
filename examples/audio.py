"""Tones of four kinds, told apart by a small network: docs/examples/audio.md."""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from typing_extensions import Doc

from influence_jobs import Batch, Sound, Task

RATE = 8000  # samples a second
LENGTH = 4000  # samples of a tone: half a second
KINDS = ("sine", "square", "rising", "noise")


def tones(count: int, seed: int) -> TensorDataset:
    """Tones (N, 1, LENGTH) from -1 to 1, each with some noise, and their kind."""
    drawn = torch.Generator().manual_seed(seed)
    kinds = torch.randint(len(KINDS), (count,), generator=drawn)
    pitch = 200 + 400 * torch.rand(count, 1, generator=drawn)  # hertz
    time = torch.arange(LENGTH) / RATE
    noise = torch.randn(count, LENGTH, generator=drawn)
    sine = torch.sin(2 * torch.pi * pitch * time)
    rising = torch.sin(2 * torch.pi * pitch * (time + time**2))
    waves = torch.stack([sine, sine.sign(), rising, noise.clamp(-2, 2) / 2], 1)
    chosen = waves[torch.arange(count), kinds] * 0.6 + 0.05 * noise
    return TensorDataset(chosen.clamp(-1, 1).unsqueeze(1), kinds)


class Audio(Task):
    """Which kind of tone is it?"""

    output_loss = "cross-entropy"

    def __init__(
        self,
        *,
        samples: Annotated[int, Doc("Tones to train on.")] = 200,
        width: Annotated[int, Doc("Channels of the first layer.")] = 8,
    ) -> None:
        self.width = width
        self.train_set, self.test_set = tones(samples, 0), tones(20, 1)

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(1, self.width, 32, stride=8),
            nn.ReLU(),
            nn.Conv1d(self.width, 2 * self.width, 16, stride=4),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(4),
            nn.Flatten(),
            nn.Linear(8 * self.width, len(KINDS)),
        )

    def train_data(self) -> TensorDataset:
        return self.train_set

    def test_data(self) -> TensorDataset:
        return self.test_set

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0])

    def targets(self, batch: Batch) -> Tensor:
        return batch[1]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), batch[1], reduction="none")

    # What people see and hear.

    def show(self, sample: int) -> Sound:
        return Sound(self.train_set[sample][0][0], RATE)

    def show_test(self, test: int) -> Sound:
        return Sound(self.test_set[test][0][0], RATE)

    def describe(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return {"label": np.array(KINDS)[self.train_set.tensors[1].numpy()[ids]]}

    def describe_test(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return {"label": np.array(KINDS)[self.test_set.tensors[1].numpy()[ids]]}
