"""The task that is disturbed: eight shards of a linear model, ruled by files beside it.

`hold` has a sample's id: the shard with that sample, and those after it, wait until the file is
gone. Looks at a few samples from all over the data do not wait. `nap` has the seconds that each
batch takes, `poison` a JSON object: what happens at which sample. None is code or data, so a run
goes on when they have changed.
"""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_jobs import Batch, Task

HERE = Path(__file__).parent
LOOKED_AT = 8  # the most samples in a look before the shards


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(rows[:, 1:])


class SlowTask(Task):
    output_loss = "cross-entropy"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return Linear()

    def train_data(self) -> TensorDataset:
        rows = torch.from_numpy(np.load(HERE / "rows.npy"))  # the first column is the sample's id
        return TensorDataset(rows, rows[:, 0].long() % 3)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0])

    def targets(self, batch: Batch) -> Tensor:
        return batch[1]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        ids = batch[0][:, 0]
        if len(ids) > LOOKED_AT:
            wait_at(int(ids.max()))
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        for sample, what in poison().items():
            if (ids == sample).any():
                losses = poisoned(losses, ids == sample, what)
        return losses


def wait_at(sample: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        while sample >= int((HERE / "hold").read_text()):
            time.sleep(0.02)
    with contextlib.suppress(FileNotFoundError):
        time.sleep(float((HERE / "nap").read_text()))


def poison() -> dict[int, str]:
    try:
        return {int(k): v for k, v in json.loads((HERE / "poison").read_text()).items()}
    except FileNotFoundError:
        return {}


def poisoned(losses: Tensor, at: Tensor, what: str) -> Tensor:
    match what:
        case "nan" | "inf":
            losses = losses.clone()
            losses[at] *= float(what)
        case "raises":
            raise ValueError("a sample that cannot be read")
        case "memory":
            raise MemoryError
        case "eats":  # once, all memory that its control group lets it have
            (HERE / "poison").unlink(missing_ok=True)
            eaten = [np.ones(4_000_000) for _ in range(50)]
            raise MemoryError(len(eaten))
        case _:
            os.kill(os.getpid(), signal.SIGKILL)
    return losses
