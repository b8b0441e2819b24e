"""What the subjects on the pretended GPU share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from influence_jobs.tasks.base import Draw

from .networks import Digits

QUERIES = 3
BATCH = 8

Tensors = Any  # a tree of them
Work = Callable[[int], Tensors]  # so many units of it


def vectors(size: int, device: torch.device, rows: int = QUERIES) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(7)).to(device)


def batches(task: Digits, device: torch.device) -> list[Any]:
    """The batches of an epoch, which a worker has brought to the device in advance."""
    found = []
    for ids in torch.arange(len(task.y)).split(BATCH):
        x, y = task.batch(ids, Draw(0))
        found.append((x.to(device), y.to(device)))
    return found
