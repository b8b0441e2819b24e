"""What one training changes in the training set: samples left out, samples labelled otherwise."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_jobs.errors import SpecError
from influence_jobs.tasks.base import Batch, Draw, Task

UNCHANGED = -1  # a new label that stands for the task's own


def _none() -> npt.NDArray[np.int64]:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Changes:
    """Samples left out of one training, and samples it labels otherwise.

    A removed sample is struck from the epoch's order; the order of the rest stays. A relabelled one stays where it is,
    and its loss is the cross-entropy of the task's outputs with the new class.

    Attributes:
        removed: Ids (R,) that are not trained on.
        relabelled: Ids (K,) that get another class; where one is removed too, it is removed.
        labels: Their classes (K,).
    """

    removed: npt.NDArray[np.int64] = field(default_factory=_none)
    relabelled: npt.NDArray[np.int64] = field(default_factory=_none)
    labels: npt.NDArray[np.int64] = field(default_factory=_none)

    def check(self, task: Task) -> None:
        """Make sure that the task's training set can be changed so.

        Raises:
            SpecError: Ids are repeated or out of range, nothing is left, the task has no classes, or a label is none.
        """
        n = len(task.train_data())
        for what, ids in (("removed", self.removed), ("relabelled", self.relabelled)):
            if len(ids) and not (ids.min() >= 0 and ids.max() < n):
                raise SpecError(f"{what} ids must be from 0 to {n - 1}: there are {n} samples")
            if len(np.unique(ids)) < len(ids):
                raise SpecError(f"an id is {what} twice: name each once")
        if len(self.removed) == n:
            raise SpecError(f"all {n} samples are removed: leave some to train on")
        if len(self.labels) != len(self.relabelled):
            raise SpecError(
                f"{len(self.relabelled)} ids are relabelled with {len(self.labels)} labels: give one each"
            )
        if not len(self.relabelled):
            return
        if task.output_loss != "cross-entropy":
            raise SpecError(
                f"{type(task).__name__} cannot be relabelled: its samples have no classes (output_loss is "
                f"{task.output_loss!r}, not 'cross-entropy'); remove them instead"
            )
        classes = num_classes(task)
        if self.labels.min() < 0 or self.labels.max() >= classes:
            raise SpecError(f"new labels must be classes, from 0 to {classes - 1}")

    def order(self, order: Tensor) -> Tensor:
        """Strike the removed from an order of all samples (N,)."""
        if not len(self.removed):
            return order
        kept_N = torch.ones(len(order), dtype=torch.bool)
        kept_N[torch.from_numpy(self.removed)] = False
        return order[kept_N[order]]

    def new_labels(self, num_samples: int) -> Tensor | None:
        """The new class of every sample, shape (N,), `UNCHANGED` for most; None where all keep theirs."""
        if not len(self.relabelled):
            return None
        labels_N = torch.full((num_samples,), UNCHANGED)
        labels_N[torch.from_numpy(self.relabelled)] = torch.from_numpy(self.labels)
        return labels_N


@torch.no_grad()
def num_classes(task: Task) -> int:
    """Classes of a task whose loss is the cross-entropy."""
    with torch.random.fork_rng(devices=[]):  # the weights do not matter
        model = task.model().eval()
    return task.outputs(model, task.batch(torch.tensor([0]), Draw(0))).shape[1]


def changed_losses(
    task: Task, model: nn.Module, batch: Batch, new_labels_B: Tensor | None
) -> Tensor:
    """The task's losses (B,), with new classes (B,) in place of the targets where there are any."""
    if new_labels_B is None:
        return task.losses(model, batch)
    targets_B = replaced(task.targets(batch), new_labels_B)
    return F.cross_entropy(task.outputs(model, batch), targets_B, reduction="none")


def replaced(targets: Tensor, new_labels: Tensor) -> Tensor:
    """Targets with the new labels that are not `UNCHANGED`; both of one shape."""
    return torch.where(new_labels == UNCHANGED, targets, new_labels)
