"""Samples of several lengths: which are as long as others, so that batches need little padding."""

import numpy as np
import torch
from torch import Tensor

from influence_jobs.gradients.batches import flattened
from influence_jobs.tasks.base import Draw, Task, spread_ids

LOOKED_AT = 16  # samples that show whether a task's samples differ in length


def pads(task: Task) -> bool:
    """Whether batches of training samples are padded: samples alone have tensors of other sizes."""
    n = len(task.train_data())
    some = spread_ids(n, LOOKED_AT)
    return len({_length(task, i) for i in some}) > 1


def by_length(task: Task, ids: Tensor) -> Tensor:
    """The ids (n,) in the order of their samples' lengths, the longest first.

    The first batch then takes the most memory.
    """
    lengths = [-_length(task, i) for i in ids]
    return ids[torch.from_numpy(np.argsort(lengths, kind="stable"))]


def _length(task: Task, i: Tensor) -> int:
    """Numbers in the tensors of a sample that is fetched alone."""
    leaves, _ = flattened(task.batch(i.reshape(1), Draw(0)))
    return sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))
