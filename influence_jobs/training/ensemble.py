"""Train many variants of one model side by side.

Variants differ in their seed, and in which samples are removed, masked or relabelled.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from influence_jobs.errors import ModelError, SpecError
from influence_jobs.memory import is_out_of_memory
from influence_jobs.tasks.base import Batch, Task
from influence_jobs.tasks.own_code import described
from influence_jobs.tasks.placement import copy_of, to_device
from influence_jobs.training.changes import UNCHANGED, Changes
from influence_jobs.training.ensemble_data import Asked, Members, Stretch, stretches
from influence_jobs.training.ensemble_norms import EnsembleNorms, NormsWanted
from influence_jobs.training.ensemble_stacked import StackedSteps
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.train import (
    Trainer,
    epoch_order,
    initial_model,
    require_repeatable,
)
from influence_jobs.transfers import on_cpu

MOVED = 0.1  # share of its move by which a weight of an ensemble may be elsewhere than alone


@dataclass(frozen=True, eq=False)
class Variant:
    """One training of an ensemble.

    Attributes:
        seed: Seed of initial weights, order of samples and noise, as for `Trainer`.
        changes: Samples to remove, mask or relabel.
    """

    seed: int
    changes: Changes = field(default_factory=Changes)


class Steps(Protocol):
    """Models that step together, such as `StackedSteps`.

    Attributes:
        longest: The largest number of steps per call of `take`.
    """

    longest: int

    def take(self, now: Asked, following: Asked | None = None) -> Tensor:
        """Take S steps of some variants; returns the sums (M,) of their losses, float64.

        Args:
            now: The samples.
            following: Those of the next call, which may be fetched meanwhile.
        """

    def weights(self, row: int) -> dict[str, Tensor]:
        """Parameters and buffers of one variant."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue from here."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""


class EnsembleTrainer:
    """Trains M variants of a model side by side.

    Each variant ends up as if `Trainer` had trained it alone, up to rounding. Most models use
    `StackedSteps`; perceptrons trained by SGD on cross-entropy use faster steps
    (`perceptrons.ensemble`). `stretches` says how variants of unequal size share steps. Results are
    in the order of `variants`.

    Args:
        task: The task to train.
        recipe: How to train it.
        variants: The M variants.
        device: Device of the models.
        norms: In-training norms to record, if any.

    Attributes:
        device: Device of the models.
        epoch: Number of epochs that all variants have finished.
        steps: The steps in use.

    Raises:
        SpecError: There are no variants, or the changes of one cannot be made.
        DataError: The task's training samples are other numbers each time.
        ModelError: The model cannot be trained as an ensemble, or the task gives the optimizer.
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        variants: Sequence[Variant],
        *,
        device: torch.device,
        norms: NormsWanted | None = None,
    ):
        if not variants:
            raise SpecError("an ensemble needs variants: give at least one")
        if recipe.by_task:
            raise ModelError(
                f"{type(task).__name__} gives its own optimizer or scheduler, which works on one "
                "model: train its variants one at a time"
            )
        for variant in variants:
            variant.changes.check(task)
        require_repeatable(task)
        self.task, self.recipe, self.device = task, recipe, device
        n = len(task.train_data())
        # Inside, variants are sorted by size, largest first; `_rows` maps to this order.
        by_size = sorted(range(len(variants)), key=lambda i: len(variants[i].changes.removed))
        self._rows = [by_size.index(i) for i in range(len(variants))]
        self._variants = [variants[i] for i in by_size]
        members = Members(
            models=[initial_model(task, variant.seed, device) for variant in self._variants],
            seeds=[variant.seed for variant in self._variants],
            sizes=[n - len(variant.changes.removed) for variant in self._variants],
            new_labels_MN=_new_labels(self._variants, n, device),
            weights_MN=_weights(self._variants, n, device),
        )
        self._sizes = members.sizes
        self._template = copy_of(members.models[0]).eval()
        self._norms = None
        if norms is not None:
            self._norms = EnsembleNorms(
                norms, self._template, num_variants=len(variants), num_samples=n, device=device
            )
        self.steps = self._choose_steps(members)
        self._plan = list(stretches(self._sizes, recipe.batch_size, self.steps.longest))
        self.epoch, self._stretch = 0, 0  # finished epochs, and stretches of the current one
        self._loss_sums_M = torch.zeros(len(variants), dtype=torch.float64, device=device)
        self._finite_steps_M = torch.zeros(len(variants), dtype=torch.int64, device=device)
        self._order_MN = self._epoch_order()

    def _choose_steps(self, members: Members) -> Steps:
        # The only use of `perceptrons` in `training`. Imported late: that package imports this one.
        from influence_jobs.perceptrons.ensemble import perceptron_steps

        if faster := perceptron_steps(self.task, self.recipe, members, self._norms, self._variants):
            return faster
        return StackedSteps(self.task, self.recipe, members, self._norms)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.recipe.epochs

    @property
    def samples_seen(self) -> int:
        """Samples trained on so far, each counted once per epoch and variant."""
        in_epoch = sum(stretch.samples for stretch in self._plan[: self._stretch])
        return self.epoch * sum(self._sizes) + in_epoch

    def step(self) -> Tensor | None:
        """Take one stretch of steps.

        If a variant diverges, its own loss becomes NaN or infinite; the others are not affected.

        Returns:
            At the end of an epoch the mean training losses (M,) of the epoch, float64; else None.
        """
        stretch, *later = self._plan[self._stretch : self._stretch + 2]
        following = self._asked(later[0]) if later else None
        losses_M = self.steps.take(self._asked(stretch), following)
        self._loss_sums_M[stretch.rows] += losses_M
        finite_M = self._loss_sums_M[stretch.rows].isfinite()
        self._finite_steps_M[stretch.rows] += stretch.steps * finite_M
        self._stretch += 1
        if self._stretch < len(self._plan):
            return None
        means_M = self._loss_sums_M.cpu() / torch.tensor(self._sizes)
        self._loss_sums_M.zero_()
        self.epoch, self._stretch = self.epoch + 1, 0
        self._order_MN = self._epoch_order()
        return means_M[self._rows]

    def _asked(self, stretch: Stretch) -> Asked:
        """The samples of a stretch in this epoch."""
        first = stretch.first_step * self.recipe.batch_size
        ids_MK = self._order_MN[stretch.rows, first : first + stretch.steps * stretch.batch_size]
        ids_MSB = torch.unflatten(ids_MK, 1, (stretch.steps, stretch.batch_size))
        return Asked(stretch.rows, ids_MSB, self.epoch, stretch.first_step)

    def diverged(self, variant: int) -> tuple[int, int] | None:
        """Epoch and step, from 0, of the stretch in which a variant's loss became infinite or NaN.

        None if it is finite in all steps so far.
        """
        row = self._rows[variant]
        finite = int(self._finite_steps_M[row])
        return None if finite == self._taken(row) else divmod(finite, self._steps_per_epoch(row))

    def _steps_per_epoch(self, row: int) -> int:
        return math.ceil(self._sizes[row] / self.recipe.batch_size)

    def _taken(self, row: int) -> int:
        """Number of steps that a variant has taken."""
        return self.epoch * self._steps_per_epoch(row) + sum(
            stretch.steps
            for stretch in self._plan[: self._stretch]
            if stretch.rows.start <= row < stretch.rows.stop
        )

    def _epoch_order(self) -> Tensor:
        """The order of every variant, shape (M, largest size); shorter ones are padded."""
        n = len(self.task.train_data())
        orders = [v.changes.order(epoch_order(n, v.seed, self.epoch)) for v in self._variants]
        return nn.utils.rnn.pad_sequence(orders, batch_first=True)

    @torch.no_grad()
    def model(self, variant: int) -> nn.Module:
        """A copy of one variant's model, in eval mode."""
        model = copy_of(self._template)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, value in self.steps.weights(self._rows[variant]).items():
            tensors[name].copy_(value)
        return model

    @torch.no_grad()
    def evaluate(self, measure: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> Tensor:
        """Apply a function such as `task.losses` or `task.outputs` to every model: (M, B, ...)."""
        batch = to_device(batch, self.device)
        return torch.stack([measure(self.model(i), batch) for i in range(len(self._rows))])

    def norms(self, variant: int) -> dict[str, Tensor]:
        """Norms recorded for one variant so far, like `RecordedNorms.sums`; empty without norms."""
        if self._norms is None:
            return {}
        row = self._rows[variant]
        return on_cpu({layer: sums_MN[row] for layer, sums_MN in self._norms.sums.items()})

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue from here, as plain tensors and numbers."""
        return {
            "steps": self.steps.state_dict(),
            "epoch": self.epoch,
            "stretch": self._stretch,
            "loss_sums": self._loss_sums_M,
            "finite_steps": self._finite_steps_M,
            "norms": self._norms.state_dict() if self._norms is not None else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the saved state of a trainer with the same arguments."""
        self.steps.load_state_dict(state["steps"])
        self.epoch, self._stretch = state["epoch"], state["stretch"]
        self._loss_sums_M.copy_(state["loss_sums"])
        taken_M = torch.tensor([self._taken(row) for row in range(len(self._sizes))])
        self._finite_steps_M.copy_(state.get("finite_steps", taken_M))  # new in the state
        if self._norms is not None:
            self._norms.load_state_dict(state["norms"])
        self._order_MN = self._epoch_order()


def why_alone(task: Task, recipe: Recipe, device: torch.device) -> str:
    """Why the task's model must be trained one variant at a time; empty if an ensemble will do.

    Dropout between convolutions is a reason, or an optimizer of the task's own. A model that uses a
    weight past its modules, from a list of its own, would be trained wrongly, and a buffer that its
    forward assigns anew would stay as it was; variants would share a number that it counts. The
    first steps show all three.
    """
    try:
        together = EnsembleTrainer(task, recipe, [Variant(0), Variant(1)], device=device)
        together.step()
    except ModelError as error:
        return str(error)
    except RuntimeError as error:  # one at a time it works, or fails with its own error
        if is_out_of_memory(error):
            raise
        return described(error)
    alone = Trainer(task, recipe, seed=1, device=device)
    before = {name: p.detach().clone().double() for name, p in alone.model.named_parameters()}
    while 2 * alone.samples_seen < together.samples_seen:
        alone.step()
    found = {name: p.detach().double() for name, p in together.model(1).named_parameters()}
    wanted = {name: p.detach().double() for name, p in alone.model.named_parameters()}
    moves = {name: float((wanted[name] - start).norm()) for name, start in before.items()}
    for name, move in moves.items():
        # Adam makes steps of rounding errors where the gradient is zero; they are small.
        if move > 0.01 * max(moves.values()):
            same = float((found[name] - wanted[name]).norm()) <= MOVED * move
        else:
            same = move == 0 or not torch.equal(found[name], before[name])
        if not same:
            return f"trained side by side, parameter '{name}' differs from a training alone"
    buffers = dict(alone.model.named_buffers())  # those that a first forward registers, too
    for name, buffer in together.model(1).named_buffers():
        kind = torch.promote_types(buffer.dtype, torch.float64)
        pair = buffer.to(kind), buffers[name].to(kind)
        if not torch.allclose(*pair, rtol=MOVED, equal_nan=True):
            return f"trained side by side, buffer '{name}' differs from a training alone"
    counts = _counts(alone.model)
    if not alone.finished:
        alone.step()
    for name, number in _counts(alone.model).items():
        if number != counts.get(name, number):
            return f"its forward pass counts in '{name}', which models of unequal data would share"
    return ""


def _counts(model: nn.Module) -> dict[str, float]:
    """The plain numbers that a model keeps, by name."""
    return {
        f"{name}.{own}".lstrip("."): value
        for name, module in model.named_modules()
        for own, value in vars(module).items()
        if isinstance(value, int | float)
    }


def _new_labels(
    variants: Sequence[Variant], num_samples: int, device: torch.device
) -> Tensor | None:
    """The new labels of every variant, shape (M, N); None if no variant has any."""
    labels = [variant.changes.new_labels(num_samples) for variant in variants]
    if all(labels_N is None for labels_N in labels):
        return None
    unchanged_N = torch.full((num_samples,), UNCHANGED)
    stacked_MN = torch.stack([unchanged_N if labels_N is None else labels_N for labels_N in labels])
    return stacked_MN.to(device)


def _weights(variants: Sequence[Variant], num_samples: int, device: torch.device) -> Tensor | None:
    """What the losses of every variant are multiplied with, (M, N); None without masks."""
    weights = [variant.changes.weights(num_samples) for variant in variants]
    if all(weights_N is None for weights_N in weights):
        return None
    ones_N = torch.ones(num_samples)
    return torch.stack([ones_N if weights_N is None else weights_N for weights_N in weights]).to(
        device
    )
