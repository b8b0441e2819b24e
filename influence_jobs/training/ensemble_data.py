"""The variants of an ensemble: their batches, and how unequal ones share steps."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from influence_jobs.errors import ModelError
from influence_jobs.gradients.batches import flattened, has_samples, map_tensors
from influence_jobs.tasks.base import READING, Batch, Draw, Task, spread_ids
from influence_jobs.tasks.placement import device_of, to_device
from influence_jobs.transfers import OfSteps, on_device

RESIDENT_BYTES = 4 * 2**30  # a training set up to this size is kept on the device
LOOKED_AT = 16  # samples whose shapes are compared


@dataclass(frozen=True, eq=False)
class Members:
    """M variants before their first step, sorted by size, largest first.

    Attributes:
        models: The models with initial weights, on their device.
        seeds: Seeds of augmentation, noise and dropout.
        sizes: Number of samples that each is trained on.
        new_labels_MN: New label of every sample (`Changes.new_labels`); None if no variant has any.
        weights_MN: Weight of every sample's loss (`Changes.weights`); None if no variant has masks.
    """

    models: Sequence[nn.Module]
    seeds: Sequence[int]
    sizes: Sequence[int]
    new_labels_MN: Tensor | None
    weights_MN: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device of the models."""
        return device_of(self.models[0])


@dataclass(frozen=True)
class Stretch:
    """Steps that some variants take together, with batches of one size.

    Attributes:
        rows: The variants, as rows of `Members`.
        first_step: Number of the first step in the epoch.
        steps: Number of steps.
        batch_size: B of every step.
    """

    rows: slice
    first_step: int
    steps: int
    batch_size: int

    @property
    def samples(self) -> int:
        """Samples trained on, by all variants together."""
        variants: int = self.rows.stop - self.rows.start
        return variants * self.steps * self.batch_size


def stretches(sizes: Sequence[int], batch_size: int, longest: int) -> Iterator[Stretch]:
    """Cut one epoch of variants of unequal size into steps that can be taken together.

    In step t of an epoch a variant with n samples takes a batch of min(B, n - tB) of them. Once
    that is not positive, the variant waits, unchanged, until the largest variant has finished the
    epoch. Variants whose batches have the same size step together. So each variant takes exactly
    the steps that it would take alone.

    Args:
        sizes: Number of samples n of each variant, largest first.
        batch_size: B.
        longest: The largest number of steps of a stretch.

    Yields:
        Stretches that contain each variant's steps once and in order.
    """
    changes = {n // batch_size for n in sizes} | {math.ceil(n / batch_size) for n in sizes}
    for start, stop in pairwise(sorted({0} | changes)):
        left = [min(batch_size, n - start * batch_size) for n in sizes]
        for batch, group in groupby(range(len(sizes)), key=left.__getitem__):
            if batch <= 0:
                break
            members = list(group)
            rows = slice(members[0], members[-1] + 1)
            for first in range(start, stop, longest):
                yield Stretch(rows, first, min(longest, stop - first), batch)


@dataclass(frozen=True, eq=False)
class Asked:
    """The samples of a stretch.

    Attributes:
        rows: The variants, as rows of `Members`.
        ids_MSB: The samples of their S steps.
        epoch: From 0.
        first_step: Number of the first step in the epoch.
    """

    rows: slice
    ids_MSB: Tensor
    epoch: int
    first_step: int

    @property
    def name(self) -> tuple[int, int, int]:
        """No other stretch of a training has it."""
        return self.epoch, self.first_step, self.rows.start


class Unmapped:
    """Stands for texts and the like in the batches of an ensemble: a use of it fails."""


class _DrawRead(Exception):
    """A task read its draw."""


class _UnreadableDraw(Draw):
    """A draw that raises when it is read."""

    def __getattribute__(self, name: str) -> NoReturn:
        raise _DrawRead


def fixed_samples(task: Task, device: torch.device) -> Batch | None:
    """All training samples as one batch on the device.

    A task's samples depend on the draw and the sample's id only (`Task.batch`). So a task that does
    not read its draw gives the same samples in every epoch.

    Returns:
        The batch, of tensors and `Unmapped`; None if the task reads its draw, a tensor is shared by
        the samples, or the batch is larger than `RESIDENT_BYTES`.
    """
    unread = _UnreadableDraw(0)
    try:
        one = task.train_batch(torch.tensor([0]), unread)
        n = len(task.train_data())
        tensors = (leaf for leaf in flattened(one)[0] if isinstance(leaf, Tensor))
        if n * sum(tensor.nbytes for tensor in tensors) > RESIDENT_BYTES:
            return None
        everything = _mapped(task.train_batch(torch.arange(n), unread))
    except _DrawRead:
        return None
    tensors = (leaf for leaf in flattened(everything)[0] if isinstance(leaf, Tensor))
    if not all(has_samples(t, n) for t in tensors):
        return None
    # Not by `to_device`: torch would keep as much pinned memory for good.
    return map_tensors(lambda tensor: tensor.to(device), everything)


class Feed:
    """Training batches of M variants.

    Args:
        task: The task that gives the samples.
        seeds: Seed of each variant, for augmentation and noise.
        device: Device of the batches.
    """

    def __init__(self, task: Task, seeds: Sequence[int], device: torch.device):
        self._task, self._seeds, self._device = task, seeds, device
        self._fixed = fixed_samples(task, device)
        self._batches: OfSteps[Batch] = OfSteps(device)
        self._require_one_shape()

    def _require_one_shape(self) -> None:
        """Refuse samples that make batches of several shapes, as texts of several lengths do.

        Raises:
            ModelError: There are such samples among the few looked at.
        """
        n = len(self._task.train_data())
        shapes = {
            tuple(leaf.shape for leaf in flattened(one)[0] if isinstance(leaf, Tensor))
            for i in spread_ids(n, LOOKED_AT)
            for one in [self._task.train_batch(i[None], Draw(0))]
        }
        if self._fixed is not None:  # padded to the longest of all
            leaves = (leaf for leaf in flattened(self._fixed)[0] if isinstance(leaf, Tensor))
            shapes.add(tuple(torch.Size((1, *leaf.shape[1:])) for leaf in leaves))
        if len(shapes) > 1:
            raise ModelError(
                "samples have several shapes, and models that are trained side by side would be "
                "padded in another way than alone: train them one at a time"
            )

    def batch(self, now: Asked, following: Asked | None = None) -> Batch:
        """The samples of a step; tensors (M, B, ...).

        Args:
            following: The next step, whose samples a thread fetches meanwhile for a GPU.
        """
        if self._fixed is not None:
            ids = on_device(now.ids_MSB[:, 0], self._device)
            return pytree.tree_map_only(Tensor, lambda t: gather(t, ids), self._fixed)
        coming = None if following is None else (following.name, partial(self._fetch, following))
        return self._batches.of(now.name, partial(self._fetch, now), coming)

    def _fetch(self, asked: Asked) -> Batch:
        with READING:
            batches = [
                _mapped(self._task.train_batch(ids_B, Draw(seed, asked.epoch)))
                for ids_B, seed in zip(asked.ids_MSB[:, 0], self._seeds[asked.rows], strict=True)
            ]
        return to_device(pytree.tree_map(_stacked, *batches), self._device)


def _mapped(batch: Batch) -> Batch:
    """A batch of which what is no tensor cannot be used."""
    leaves, structure = flattened(batch)
    kept = [leaf if isinstance(leaf, Tensor) else Unmapped() for leaf in leaves]
    return pytree.tree_unflatten(kept, structure)


def _stacked(*leaves: Any) -> Any:
    return torch.stack(leaves) if isinstance(leaves[0], Tensor) else leaves[0]


def gather(values_N: Tensor, ids: Tensor) -> Tensor:
    """Rows of `values_N` (N, ...) by ids of any shape: (*ids.shape, ...)."""
    return torch.unflatten(values_N.index_select(0, ids.flatten()), 0, ids.shape)
