"""Changes of the training set for one training: removed, relabelled and masked samples."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_jobs.errors import ModelError, SpecError
from influence_jobs.gradients.one_loss_each import wrong_losses
from influence_jobs.tasks.base import Batch, Draw, Task, spread_ids
from influence_jobs.tasks.output_loss import alike
from influence_jobs.tasks.placement import converted, out_of_half

UNCHANGED = -1  # stands for the sample's own label
LOOKED_AT = 16  # samples whose losses are compared with the cross-entropy


def _none() -> npt.NDArray[np.int64]:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Changes:
    """Samples that one training leaves out, masks, or gives a new label.

    Removed samples are taken out of the order of each epoch; the others keep their order, but not
    their batches. A masked sample stays in its batches, with a loss of weight zero: the mean keeps
    its divisor B, and batch statistics still have the sample in them. So all other random numbers
    of the training are as they were. The loss of a relabelled sample is the cross-entropy of the
    task's outputs with the new class.

    Attributes:
        removed: Ids (R,) of removed samples.
        masked: Ids (M,) of masked samples.
        relabelled: Ids (K,) of relabelled samples. An id that is also in `removed` is removed.
        labels: The new classes (K,) of relabelled samples.
    """

    removed: npt.NDArray[np.int64] = field(default_factory=_none)
    relabelled: npt.NDArray[np.int64] = field(default_factory=_none)
    labels: npt.NDArray[np.int64] = field(default_factory=_none)
    masked: npt.NDArray[np.int64] = field(default_factory=_none)

    def check(self, task: Task, *, by_task: bool = False) -> None:
        """Check that these changes can be made to the task's training set.

        Args:
            by_task: Whether the task trains itself, with a loss of its own.

        Raises:
            SpecError: Ids are repeated or out of range, all samples are removed or masked, the task
                has no classes, a new label is not a class, the task's loss is another than that of
                relabelled samples, or its own training would not know of masks.
        """
        n = len(task.train_data())
        changed = {
            "removed": self.removed,
            "relabelled": self.relabelled,
            "masked": self.masked,
        }
        for what, ids in changed.items():
            if len(ids) and not (ids.min() >= 0 and ids.max() < n):
                raise SpecError(f"{what} ids must be from 0 to {n - 1}: there are {n} samples")
            if len(np.unique(ids)) < len(ids):
                raise SpecError(f"an id is {what} twice: give each id once")
        if len(self.removed) == n:
            raise SpecError(f"all {n} samples are removed: leave some to train on")
        if len(self.masked) == n:
            raise SpecError(f"all {n} samples are masked: leave some to train on")
        if len(self.masked) and by_task:
            raise SpecError(
                f"train() of {type(task).__name__} cannot mask samples: remove them instead, or "
                "give the task an optimizer() in place of train()"
            )
        if len(self.labels) != len(self.relabelled):
            raise SpecError(
                f"{len(self.relabelled)} ids are relabelled with {len(self.labels)} labels: "
                "give one label per id"
            )
        if not len(self.relabelled):
            return
        if task.output_loss != "cross-entropy":
            raise SpecError(
                f"{type(task).__name__} cannot be relabelled: its samples have no classes "
                f"(output_loss is {task.output_loss!r}, not 'cross-entropy'); remove them instead"
            )
        require_classes(task, by_task=by_task)
        classes = num_classes(task)
        if self.labels.min() < 0 or self.labels.max() >= classes:
            raise SpecError(f"new labels must be classes, from 0 to {classes - 1}")

    def order(self, order: Tensor) -> Tensor:
        """Take the removed samples out of an order (N,) of all samples."""
        if not len(self.removed):
            return order
        kept_N = torch.ones(len(order), dtype=torch.bool)
        kept_N[torch.from_numpy(self.removed)] = False
        return order[kept_N[order]]

    def weights(self, num_samples: int) -> Tensor | None:
        """What each sample's loss is multiplied with, (N,): 0 or 1; None if no sample is masked."""
        if not len(self.masked):
            return None
        weights_N = torch.ones(num_samples)
        weights_N[torch.from_numpy(self.masked)] = 0
        return weights_N

    def new_labels(self, num_samples: int) -> Tensor | None:
        """The new label of every sample, (N,), or `UNCHANGED`; None if no sample is relabelled."""
        if not len(self.relabelled):
            return None
        labels_N = torch.full((num_samples,), UNCHANGED)
        labels_N[torch.from_numpy(self.relabelled)] = torch.from_numpy(self.labels)
        return labels_N


def require_classes(task: Task, *, by_task: bool) -> None:
    """Refuse to relabel samples that have not one class each, such as texts with one a token.

    Args:
        by_task: As for `Changes.check`. If not, `losses` must be the plain cross-entropy, which a
            training with relabelled samples minimises.

    Raises:
        SpecError: It says what the targets are, or that the loss is another.
    """
    targets = task.targets(task.batch(torch.tensor([0]), Draw(0)))
    if targets.is_floating_point() or targets.shape != (1,):
        raise SpecError(
            f"{type(task).__name__} cannot be relabelled: the targets of a sample are "
            f"{tuple(targets.shape)} {str(targets.dtype).removeprefix('torch.')}, not one class; "
            "remove samples instead (--mode remove)"
        )
    if not (by_task or _is_cross_entropy(task)):
        raise SpecError(
            f"{type(task).__name__} cannot be relabelled: its losses are not the plain "
            "cross-entropy of its outputs and targets, which relabelled samples would be trained "
            "with (class weights and label smoothing make another); remove samples instead "
            "(--mode remove), or define train()"
        )


@torch.no_grad()
def _is_cross_entropy(task: Task) -> bool:
    n = len(task.train_data())
    batch = task.batch(spread_ids(n, LOOKED_AT), Draw(0))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = converted(task, torch.device("cpu"))[0]
        batch = out_of_half(batch, model)
        move_weights(model)  # a last layer of zeros gives the same loss with label smoothing
        losses_B, outputs_BC = task.losses(model, batch), task.outputs(model, batch)
    try:
        plain_B = F.cross_entropy(outputs_BC, task.targets(batch), reduction="none")
    except IndexError:  # targets that only the task's own loss knows, such as another ignore_index
        return False
    return losses_B.shape == plain_B.shape and bool(alike(losses_B, plain_B))


@torch.no_grad()
def move_weights(model: nn.Module) -> None:
    """Add random numbers to a model's weights, so that no layer gives zero whatever it gets."""
    for weight in (p for p in model.parameters() if p.requires_grad and p.ndim > 1):
        weight.add_(torch.randn_like(weight), alpha=weight[0].numel() ** -0.5)


@torch.no_grad()
def num_classes(task: Task) -> int:
    """Number of classes of a task whose loss is the cross-entropy."""
    with torch.random.fork_rng(devices=[]):  # any weights will do
        model = task.model().eval()
    return task.outputs(model, task.batch(torch.tensor([0]), Draw(0))).shape[1]


def changed_losses(
    task: Task, model: nn.Module, batch: Batch, new_labels_B: Tensor | None
) -> Tensor:
    """The task's losses (B,); new labels (B,), if given, replace the targets."""
    if new_labels_B is None:
        return task.losses(model, batch)
    targets_B = replaced(task.targets(batch), new_labels_B)
    return F.cross_entropy(task.outputs(model, batch), targets_B, reduction="none")


def require_one_each(losses: Tensor, samples: torch.Size) -> None:
    """Refuse losses that are not one a sample, such as their mean.

    Args:
        losses: As the task gives them, or those of several variants.
        samples: The shape that they must have.

    Raises:
        ModelError: It says what they are.
    """
    if wrong := wrong_losses(losses, samples):
        raise ModelError(wrong)


def replaced(targets: Tensor, new_labels: Tensor) -> Tensor:
    """The targets, replaced by new labels that are not `UNCHANGED`; both have one shape."""
    return torch.where(new_labels == UNCHANGED, targets, new_labels)
