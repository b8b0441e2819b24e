"""Train one model step by step. It can stop after any step and resume with identical results."""

import hashlib
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from influence_jobs.errors import DataError, SpecError
from influence_jobs.gradients.batches import plain_leaves
from influence_jobs.gradients.transforms import differentiable_kernels
from influence_jobs.tasks.base import (
    FINGERPRINT_ROWS,
    READING,
    Batch,
    Draw,
    Task,
    defines,
    digest,
    spread_ids,
)
from influence_jobs.tasks.layout import in_fast_layout
from influence_jobs.tasks.placement import built_model, to_device
from influence_jobs.training.changes import Changes, changed_losses, require_one_each
from influence_jobs.training.recipe import Recipe, optimizer_of, scheduler_of
from influence_jobs.training.recorded_norms import RecordedNorms
from influence_jobs.training.state import plain, require_saveable
from influence_jobs.transfers import OfSteps, on_device

CHECKED_EVERY = 64  # steps between two looks at the loss, which wait for a GPU


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run the block with torch's generators seeded, and restore their states afterwards."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        # Before it there are no generators of GPUs.
        torch.cuda.init()  # type: ignore[no-untyped-call]
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    # torch.manual_seed looks for every kind of device, which takes 0.1 ms per call.
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def step_seed(seed: int, epoch: int, step: int) -> int:
    """The seed for random operations in one step, such as dropout; below 2**63."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """The order of the samples in an epoch, shape (N,); it depends on seed and epoch only."""
    # The third word of the counter keeps this stream apart from the samples' noise.
    bits = np.random.Philox(key=[seed, epoch], counter=[0, 0, 1, 0])
    return torch.from_numpy(np.random.Generator(bits).permutation(num_samples))


def initial_model(task: Task, seed: int, device: torch.device) -> nn.Module:
    """The task's model with the initial weights of a seed, in training mode.

    Raises:
        ModelError: As `built_model`.
    """
    with seeded(seed, device):
        model = built_model(task).to(device)
    return in_fast_layout(task, model).train()


def require_full_batches(task: Task, batch_size: int, num_samples: int) -> None:
    """Refuse a training with a batch of one sample, if the model cannot be trained on one.

    Batch normalisation cannot, unless a sample has several positions.

    Raises:
        SpecError: Naming the batch and the cure.
    """
    if num_samples == 0 or (batch_size > 1 and num_samples % batch_size != 1):
        return
    with torch.random.fork_rng(devices=[]):  # the weights do not matter
        model = task.model().train()
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    try:
        task.losses(model, task.train_batch(torch.tensor([0]), Draw(0)))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        if num_samples == 1:
            raise SpecError("BatchNorm cannot be trained on one sample: keep two or more") from None
        better = next(size for size in itertools.count(batch_size + 1) if num_samples % size != 1)
        one = "are batches of one" if batch_size == 1 else "leave a last batch of one"
        raise SpecError(
            f"{num_samples:,} samples in batches of {batch_size} {one}, which BatchNorm cannot be "
            f"trained on: choose another --batch-size, such as {better}"
        ) from None


def require_repeatable(task: Task) -> None:
    """Refuse a task whose own `train_batch` gives other numbers for the same samples and draw.

    No training could be repeated. `Task.fingerprint` looks at `batch`, which others train with.

    Raises:
        DataError: The numbers differ.
    """
    if not defines(type(task), "train_batch"):
        return
    n = len(task.train_data())
    ids = spread_ids(n, FINGERPRINT_ROWS)
    pair = [
        [leaf for leaf in plain_leaves(task.train_batch(ids, Draw(0))) if isinstance(leaf, Tensor)]
        for _ in range(2)
    ]
    if digest(pair[0]) != digest(pair[1]):
        raise DataError(
            f"train_batch() of {type(task).__name__} gives different numbers each time the same "
            "samples are fetched, so no training could be repeated: let its random numbers depend "
            "on (draw.seed, draw.index, sample id) only"
        )


def require_sound_samples(
    task: Task, seed: int, device: torch.device, *, changes: Changes, epoch: int
) -> None:
    """Refuse a sample that is at fault if a training's loss is not finite.

    Args:
        task: The task, as it was trained.
        seed: The training's seed.
        changes: Samples that were removed are not looked at.
        epoch: The samples are looked at as they were in this epoch, counted from 0.

    Raises:
        DataError: Before any training the loss of a sample, or its gradient, is not finite.
    """
    model = initial_model(task, seed, device).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def refuse(what: str, sample: Tensor) -> None:
        raise DataError(
            f"the {what} of sample {int(sample)} is not finite before any training: check the "
            "sample"
        )

    def sound(ids: Tensor) -> bool:
        """Whether the gradient of these samples' loss is finite; each loss must be."""
        batch = to_device(task.train_batch(ids, Draw(seed, epoch)), device)
        with differentiable_kernels(model):
            losses_B = task.losses(model, batch)
            if (bad_B := ~losses_B.isfinite().cpu()).any():
                refuse("training loss", ids[bad_B][0])
            found = torch.autograd.grad(losses_B.sum(), parameters, allow_unused=True)
        return all(gradient is None or gradient.isfinite().all() for gradient in found)

    everything = changes.order(torch.arange(len(task.train_data())))
    for ids in torch.split(everything, task.batch_size):
        if not sound(ids):  # in the graph of a batch one sample spoils the gradients of all
            for sample in ids:
                if not sound(sample[None]):
                    refuse("gradient of the training loss", sample)


class Trainer:
    """Trains one model.

    It minimises the mean loss of a batch. The last batch of an epoch may be smaller.

    Args:
        task: The task to train.
        recipe: How to train it.
        seed: Seed of initial weights, order of samples and noise.
        device: Device of the model.
        norms: Records norms of the batch gradient in every step, if wanted.
        changes: Samples to remove, mask or relabel.

    Attributes:
        finite_steps: Number of first steps in which the loss was finite.
        batch_loss: Mean loss of the last batch, a number without a graph; NaN before the first.

    Raises:
        SpecError: These changes cannot be made to the task's training set.
        DataError: The task's training samples are other numbers each time.
        ModelError: The task's own optimizer or scheduler cannot be used.
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        *,
        seed: int,
        device: torch.device,
        norms: RecordedNorms | None = None,
        changes: Changes | None = None,
    ):
        self.task, self.recipe, self.seed, self.device = task, recipe, seed, device
        self.model = initial_model(task, seed, device)
        self.norms = norms
        self._changes = changes or Changes()
        self._changes.check(task)
        require_repeatable(task)
        self._new_labels_N = self._changes.new_labels(len(task.train_data()))
        self._weights_N = self._changes.weights(len(task.train_data()))
        self.num_samples = len(task.train_data()) - len(self._changes.removed)
        require_full_batches(task, recipe.batch_size, self.num_samples)
        self.steps_per_epoch = math.ceil(self.num_samples / recipe.batch_size)
        with seeded(seed, device):
            self.optimizer = optimizer_of(task, recipe, self.model)
            self.scheduler = scheduler_of(task, recipe, self.optimizer, self.steps_per_epoch)
        if recipe.by_task:
            require_saveable(task, self._own_state())
        self.epoch, self.step_in_epoch = 0, 0  # finished epochs, and steps of the current one
        self._loss_sum = torch.zeros((), device=device, dtype=torch.float64)
        self.finite_steps = torch.zeros((), device=device, dtype=torch.int64)
        self.batch_loss = torch.tensor(math.nan)
        self._order = self._epoch_order()
        self._batches: OfSteps[Batch] = OfSteps(device)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.recipe.epochs

    @property
    def samples_seen(self) -> int:
        """Samples trained on so far, each counted once per epoch."""
        in_epoch = min(self.step_in_epoch * self.recipe.batch_size, self.num_samples)
        return self.epoch * self.num_samples + in_epoch

    @property
    def next_ids(self) -> Tensor:
        """The samples of the next step, (B,)."""
        first = self.step_in_epoch * self.recipe.batch_size
        return self._order[first : first + self.recipe.batch_size]

    def step(self) -> float | None:
        """Take one optimiser step; at the end of an epoch return its mean training loss."""
        ids = self.next_ids
        batch = self._fetched(ids)
        new_labels_B = None
        if self._new_labels_N is not None:
            new_labels_B = on_device(self._new_labels_N[ids], self.device)
        # Of all parameters: an optimizer of the task's own may leave some out.
        self.model.zero_grad(set_to_none=True)
        with seeded(step_seed(self.seed, self.epoch, self.step_in_epoch), self.device):
            losses_B = changed_losses(self.task, self.model, batch, new_labels_B)
            require_one_each(losses_B, ids.shape)
            if self._weights_N is not None:
                weights_B = on_device(self._weights_N[ids], self.device)
                losses_B = losses_B * weights_B.to(losses_B.dtype)
            loss = losses_B.mean()
            loss.backward()  # type: ignore[no-untyped-call]
            if self.norms is not None:
                self.norms.add(self.model, ids, self.epoch)
            if self.recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
            self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.batch_loss = loss.detach()
        self._loss_sum += losses_B.detach().sum()
        self.finite_steps += self._loss_sum.isfinite()
        if self.recipe.by_task and self.epoch == self.step_in_epoch == 0:
            require_saveable(self.task, self._own_state())  # now it has all that it will have
        self.step_in_epoch += 1
        if self.step_in_epoch < self.steps_per_epoch:
            return None
        mean_loss = float(self._loss_sum) / self.num_samples
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self._loss_sum.zero_()
        self._order = self._epoch_order()
        return mean_loss

    def _fetched(self, ids: Tensor) -> Batch:
        """The batch of the next step."""
        following, place = None, self.step_in_epoch + 1
        if place < self.steps_per_epoch:
            first = place * self.recipe.batch_size
            coming = self._order[first : first + self.recipe.batch_size]
            following = (self.epoch, place), partial(self._fetch, coming, self.epoch)
        now = self.epoch, self.step_in_epoch
        return self._batches.of(now, partial(self._fetch, ids, self.epoch), following)

    def _fetch(self, ids: Tensor, epoch: int) -> Batch:
        with READING:
            batch = self.task.train_batch(ids, Draw(self.seed, epoch))
        return to_device(batch, self.device)

    def require_finite(self) -> None:
        """Refuse to go on once the loss is not finite; looks at it now and then.

        Raises:
            DataError: It was not finite before any training, because of a sample.
            SpecError: The training diverged.
        """
        if self.step_in_epoch % CHECKED_EVERY:
            return
        taken, finite = self.epoch * self.steps_per_epoch + self.step_in_epoch, self.finite_steps
        if int(finite) == taken:
            return
        epoch, step = divmod(int(finite), self.steps_per_epoch)
        require_sound_samples(self.task, self.seed, self.device, changes=self._changes, epoch=epoch)
        raise SpecError(
            f"the training diverged: the loss is not finite in epoch {epoch + 1}, step {step + 1}; "
            "lower the learning rate"
        )

    def _epoch_order(self) -> Tensor:
        everything = epoch_order(len(self.task.train_data()), self.seed, self.epoch)
        return self._changes.order(everything)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue from here, as plain tensors and numbers."""
        return {
            "model": self.model.state_dict(),
            **self._own_state(),
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "loss_sum": self._loss_sum,
            "finite_steps": self.finite_steps,
            "norms": self.norms.state_dict() if self.norms is not None else {},
        }

    def _own_state(self) -> dict[str, Any]:
        """The state of the optimizer and of the schedule, which may be the task's own."""
        scheduler = {} if self.scheduler is None else self.scheduler.state_dict()
        return {"optimizer": plain(self.optimizer.state_dict()), "scheduler": plain(scheduler)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        self._loss_sum = state["loss_sum"].to(self.device)
        taken = torch.tensor(self.epoch * self.steps_per_epoch + self.step_in_epoch)
        self.finite_steps = state.get("finite_steps", taken).to(self.device)  # new in the state
        if self.norms is not None:
            self.norms.load_state_dict(state["norms"])
        self._order = self._epoch_order()
