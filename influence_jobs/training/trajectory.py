"""The steps of one training, repeated as they were, for work that goes back through them.

Memory is bounded as in Griewank: "Achieving logarithmic growth of temporal and spatial complexity
in reverse automatic differentiation", 1992, with one level: of T steps, the trainer's state is kept
every sqrt(T) steps, and the steps between two of them are taken again when they are asked for.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from influence_jobs.errors import ModelError
from influence_jobs.tasks.base import Task
from influence_jobs.training.adjoint import Cotangents, cotangents_of
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.statistics import moving, require_plain_average
from influence_jobs.training.train import Trainer
from influence_jobs.transfers import on_cpu

State = dict[str, Any]


class Snapshots(Protocol):
    """Keeps states of the trainer, by the number of steps before them."""

    def steps(self) -> Sequence[int]:
        """Those that are kept."""

    def read(self, step: int) -> State | None:
        """A state; None if it is not there or damaged."""

    def write(self, step: int, state: State) -> None:
        """Keep a state."""


@dataclass(frozen=True)
class Step:
    """What going back through a step needs.

    Attributes:
        epoch: Number of epochs before it.
        in_epoch: Number of steps before it in its epoch.
        ids: The samples of its batch, (B,).
        loss: Their mean loss, as the trainer had it, a scalar on its device.
        weights: Parameters before it.
        settings: Of the optimizer's groups, as it used them.
        states: Of the optimizer, after it; only what `Cotangents.back` needs.
    """

    epoch: int
    in_epoch: int
    ids: Tensor
    loss: Tensor
    weights: Mapping[str, Tensor]
    settings: Sequence[Mapping[str, Any]]
    states: Mapping[str, Mapping[str, Tensor]]


class Trajectory:
    """A training up to the end of an epoch.

    Args:
        task: The task that was trained.
        recipe: How.
        seed: Of the training.
        epochs: Epochs to take; those of the recipe, or fewer.
        device: Where to compute. Only the device and the number of threads that the training had
            give the same weights.
        snapshots: States of the trainer.

    Attributes:
        num_steps: T.
        spacing: Steps from a kept state to the next one.
        groups: Of each parameter that the optimizer trains, by name, the number of its group.
        kind: Goes back through the optimizer's updates.

    Raises:
        ModelError: See `reversible`.
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        *,
        seed: int,
        epochs: int,
        device: torch.device,
        snapshots: Snapshots,
    ):
        self.task, self.recipe, self.seed, self.device = task, recipe, seed, device
        self._snapshots = snapshots
        trainer = self.trainer()
        self.kind: type[Cotangents] = reversible(trainer)
        self.num_samples = trainer.num_samples
        self.num_steps = epochs * trainer.steps_per_epoch
        self.spacing = math.ceil(math.sqrt(self.num_steps))
        self._kept_at = {*range(0, self.num_steps, self.spacing), self.num_steps}
        self.groups = _groups(trainer)
        parameters = dict(trainer.model.named_parameters())
        self._all_bytes = sum(p.nbytes for p in parameters.values())
        self._trained_bytes = sum(parameters[name].nbytes for name in self.groups)

    @property
    def num_states(self) -> int:
        """States of the trainer that are kept."""
        return len(self._kept_at)

    @property
    def state_bytes(self) -> int:
        """Bytes of one of them, at most."""
        return self._all_bytes + len(self.kind.state) * self._trained_bytes

    @property
    def step_bytes(self) -> int:
        """Bytes of a `Step`."""
        moments = sum(part != "step" for part in self.kind.kept)
        return self._all_bytes + moments * self._trained_bytes

    def trainer(self) -> Trainer:
        """A trainer before its first step."""
        return Trainer(self.task, self.recipe, seed=self.seed, device=self.device)

    def train(self, progress: Callable[[int], None]) -> nn.Module:
        """Train as the run did, and keep the states that `segment` needs.

        States that are kept already are taken for what they are; `segment` sees whether each leads
        to the next one.

        Args:
            progress: Takes the number of steps done.

        Returns:
            The trained model, in eval mode.

        Raises:
            ModelError: The training changes a buffer that cannot be gone back through.
        """
        before = _other_buffers(self.trainer().model)
        trainer = self._after(self.num_steps, progress)
        _require_unmoved(trainer.model, before)
        return trainer.model.eval()

    def _after(self, steps: int, progress: Callable[[int], None] = lambda done: None) -> Trainer:
        """A trainer after some steps, from the last state before that can be read.

        States that should be kept on its way, and are not, are kept.
        """
        trainer, done = self.trainer(), 0
        there = self._kept_at & {*self._snapshots.steps()}
        for step in sorted((step for step in there if step <= steps), reverse=True):
            if (state := self._snapshots.read(step)) is not None:
                trainer.load_state_dict(state)
                done = step
                break
            there.remove(step)
        progress(done)
        while True:
            if done in self._kept_at and done not in there:
                self._snapshots.write(done, trainer.state_dict())
            if done == steps:
                return trainer
            trainer.step()
            done += 1
            progress(done)

    def segment(self, stop: int) -> Sequence[Step]:
        """The steps from the last kept state up to a step, taken again.

        Raises:
            ModelError: They end elsewhere than before.
        """
        start = (stop - 1) // self.spacing * self.spacing
        trainer = self._after(start)
        steps = [self.recorded_step(trainer) for _ in range(start, stop)]
        after = self._snapshots.read(stop) if stop in self._kept_at else None
        if after is not None and not same_weights(trainer.model.state_dict(), after["model"]):
            raise ModelError(
                f"steps {start + 1} to {stop} of the training give other weights each time on "
                f"{self.device.type}: going back through it needs a training that repeats bit by "
                "bit, such as one on a CPU"
            )
        return steps

    def recorded_step(self, trainer: Trainer) -> Step:
        """Let a trainer take its next step."""
        epoch, in_epoch, ids = trainer.epoch, trainer.step_in_epoch, trainer.next_ids
        parameters = dict(trainer.model.named_parameters())
        weights = {name: p.detach().clone() for name, p in parameters.items()}
        settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in trainer.optimizer.param_groups
        ]
        trainer.step()
        state_of = trainer.optimizer.state
        states = {
            name: {part: state_of[parameters[name]][part].clone() for part in self.kind.kept}
            for name in self.groups
            if parameters[name] in state_of
        }
        return Step(epoch, in_epoch, ids, trainer.batch_loss, weights, settings, states)


def reversible(trainer: Trainer) -> type[Cotangents]:
    """What goes back through the updates of a trainer's optimizer.

    Raises:
        ModelError: The optimizer is not one of torch's SGD, Adam and AdamW, the weights are of half
            precision, or a layer averages its statistics over all batches.
    """
    _require_full_precision(trainer.model)
    require_plain_average(trainer.model)
    return cotangents_of(trainer.optimizer, type(trainer.task).__name__)


def same_weights(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts are the same bit by bit, on any devices."""
    if first.keys() != second.keys():
        return False
    ours, theirs = on_cpu(first), on_cpu(second)
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def _groups(trainer: Trainer) -> dict[str, int]:
    names = {p: name for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {
        names[p]: number
        for number, group in enumerate(trainer.optimizer.param_groups)
        for p in group["params"]
        if p in names
    }


def _require_full_precision(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise ModelError(
                f"parameter {name} is of {str(parameter.dtype).removeprefix('torch.')}, in which "
                "small changes of an update are lost to rounding: train in float32"
            )


def _other_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's buffers of floats, but for running statistics of batch normalisation."""
    known = {id(buffer) for _, norm in moving(model) for buffer in norm.buffers()}
    return {
        name: buffer.clone()
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and id(buffer) not in known
    }


def _require_unmoved(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    for name, buffer in _other_buffers(model).items():
        if name not in before or not torch.equal(buffer, before[name]):
            raise ModelError(
                f"buffer '{name}' of {type(model).__name__} changes in training, and unrolled "
                "knows no changing buffers but the running statistics of BatchNorm: make it a "
                "parameter or a constant, or use infl submit influence"
            )
