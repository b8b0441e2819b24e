"""Exact influence through the training of one run, by going back through all of its steps.

A training with weights w_i of the samples' losses, g_t = (1/B) sum_i w_i grad l_i(theta_t), ends in
weights that are a function of w. The derivative of a query's measure f by w_i, at w = 1, is

    df/dw_i = sum over steps t with i in their batch of  u_t . grad l_i(theta_t) / B

where u_t is the cotangent of g_t: from the cotangents of theta_{t+1} and of the optimizer's state,
the update's own adjoint gives u_t (`adjoint`), and theta_t gets H_t u_t more, with the Hessian H_t
of the batch's loss. Both come from one pass back through the gradient's graph. The steps are those
of `Trainer`, with their batches, noise and dropout masks.

Maclaurin, Duvenaud, Adams: "Gradient-based Hyperparameter Optimization through Reversible
Learning", 2015 (the adjoint of SGD with momentum). Ilyas, Engstrom: "MAGIC: Near-Optimal Data
Attribution for Deep Learning", 2025 (arXiv 2504.16430; of all samples' weights).

Memory is bounded as in Griewank: "Achieving logarithmic growth of temporal and spatial complexity
in reverse automatic differentiation", 1992, with one level: of T steps, the trainer's state is kept
every sqrt(T) steps, and the steps between two of them are recomputed when they are gone back
through.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from influence_jobs.curvature.requirements import saved_bytes
from influence_jobs.errors import ModelError, SpecError
from influence_jobs.gradients.transforms import all_derivatives
from influence_jobs.tasks.base import Batch, Draw, Task, copy_of, to_device, to_type
from influence_jobs.training.adjoint import (
    Cotangents,
    Update,
    back_through_clipping,
    clipped,
    cotangents_of,
)
from influence_jobs.training.changes import require_one_each
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.statistics import Moves, moving, require_plain_average, watched
from influence_jobs.training.train import Trainer, initial_model, seeded, step_seed

MAX_BYTES = 2**30  # largest memory for activations times queries in a pass
SAME_LOSS = 1e-3  # allowed relative difference of a step's loss; rounding causes 1e-6
DIFFERENCES = (1e-5, 1e-6, 1e-7)  # steps of differences in float64, as parts of the weights
AGREEMENT = 1e-3  # allowed relative difference of two ways to a product

State = dict[str, Any]
ByQuery = dict[str, Tensor]  # {name: (Q, *shape)}


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
        ids: The samples of its batch.
        loss: Their mean loss, as the trainer had it.
        weights: Parameters before it.
        settings: Of the optimizer's groups, as it used them.
        states: Of the optimizer, after it; only what the adjoint needs.
    """

    epoch: int
    in_epoch: int
    ids: Tensor
    loss: float
    weights: Mapping[str, Tensor]
    settings: Sequence[Mapping[str, Any]]
    states: Mapping[str, Mapping[str, Tensor]]


class Unrolled:
    """The adjoint of the training of one run.

    A sample's weight is that of its loss alone: batch statistics still have the sample in them, and
    the mean over a batch keeps its divisor.

    Args:
        task: The task that was trained.
        recipe: How.
        seed: Of the training.
        epochs: Epochs to go through; those of the recipe, or fewer.
        device: Where to compute. The same kind of device as the training's gives the same weights.
        dtype: Of the cotangents, and of the model where they go through it.
        snapshots: States of the trainer.

    Raises:
        ModelError: The optimizer is not one of torch's SGD, Adam and AdamW, the weights are of half
            precision, or a layer averages its statistics over all batches.
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        *,
        seed: int,
        epochs: int,
        device: torch.device,
        dtype: torch.dtype,
        snapshots: Snapshots,
    ):
        self.task, self.recipe, self.seed = task, recipe, seed
        self._device, self._dtype, self._snapshots = device, dtype, snapshots
        trainer = self._trainer()
        self._kind = cotangents_of(trainer.optimizer, type(task).__name__)
        _require_full_precision(trainer.model)
        require_plain_average(trainer.model)
        self.num_samples = trainer.num_samples
        self.num_steps = epochs * trainer.steps_per_epoch
        self.spacing = math.ceil(math.sqrt(self.num_steps))
        self._kept_at = {*range(0, self.num_steps, self.spacing), self.num_steps}
        self._groups = _groups(trainer)
        self._model = initial_model(task, seed, device).to(dtype)
        self._checked = False
        self._batched = True  # the pass back through the gradient is taken for all queries at once
        self._sample_bytes = 0

    @property
    def step_bytes(self) -> int:
        """Bytes of what is kept of a step that is gone back through."""
        per_parameter = 1 + sum(name != "step" for name in self._kind.kept)
        return per_parameter * sum(
            p.nbytes for name, p in self._model.named_parameters() if name in self._groups
        )

    def _trainer(self) -> Trainer:
        return Trainer(self.task, self.recipe, seed=self.seed, device=self._device)

    # -- forward ----------------------------------------------------------------------------------

    def train(self, progress: Callable[[int], None]) -> nn.Module:
        """Train as the run did, and keep the states that `scores` needs.

        States that are kept already are taken for what they are; `scores` sees whether each leads
        to the next.

        Args:
            progress: Takes the number of steps done.

        Returns:
            The trained model, in eval mode.
        """
        trainer, done = self._trainer(), 0
        there = self._kept_at & {*self._snapshots.steps()}
        for step in sorted(there, reverse=True):
            if (state := self._snapshots.read(step)) is not None:
                trainer.load_state_dict(state)
                done = step
                break
            there.remove(step)
        progress(done)
        while True:
            if done in self._kept_at and done not in there:
                self._snapshots.write(done, trainer.state_dict())
            if done == self.num_steps:
                return trainer.model.eval()
            trainer.step()
            done += 1
            progress(done)

    def _segment(self, start: int) -> Sequence[Step]:
        """The steps from a kept state to the next one."""
        trainer, state = self._trainer(), self._snapshots.read(start)
        if state is None:
            raise SpecError(f"the state after step {start} of the training is gone: resume the run")
        trainer.load_state_dict(state)
        stop = min(start + self.spacing, self.num_steps)
        before = _other_buffers(trainer.model)
        steps = []
        for step in range(start, stop):
            steps.append(self._recorded_step(trainer))
            if step == start:
                _require_unmoved(trainer.model, before)
        after = self._snapshots.read(stop)
        if after is not None and not same_weights(trainer.model.state_dict(), after["model"]):
            raise ModelError(
                f"steps {start + 1} to {stop} of the training give other weights each time on "
                f"{self._device.type}: unrolled needs a training that repeats bit by bit, such as "
                "one on a CPU"
            )
        return steps

    def _recorded_step(self, trainer: Trainer) -> Step:
        epoch, in_epoch, ids = trainer.epoch, trainer.step_in_epoch, trainer.next_ids
        parameters = dict(trainer.model.named_parameters())
        weights = {name: p.detach().clone() for name, p in parameters.items()}
        settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in trainer.optimizer.param_groups
        ]
        trainer.step()
        states = {
            name: {
                part: trainer.optimizer.state[parameters[name]][part].clone()
                for part in self._kind.kept
            }
            for name in self._groups
            if parameters[name] in trainer.optimizer.state
        }
        return Step(epoch, in_epoch, ids, float(trainer.batch_loss), weights, settings, states)

    # -- backward ---------------------------------------------------------------------------------

    def scores(
        self,
        gradients: Mapping[str, Tensor],
        progress: Callable[[int], None],
        *,
        state: State | None = None,
        keep: Callable[[Callable[[], State]], None] = lambda state: None,
    ) -> Tensor:
        """Minus N times the derivative of Q measures of the trained model by each sample's weight.

        Args:
            gradients: Of the measures by the trained model's parameters and running statistics
                (`statistics.with_statistics`): {name: (Q, *shape)}. Others have no effect.
            progress: Takes the number of steps gone back through.
            state: Where an interrupted call was, from `keep`.
            keep: Is called between steps with a function that gives the state.

        Returns:
            Shape (Q, N), float64, on the CPU.

        Raises:
            ModelError: The steps do not repeat, or torch cannot differentiate them twice.
        """
        gradients = {name: g.to(self._device, self._dtype).clone() for name, g in gradients.items()}
        weights = {name: self._kind(gradients[name]) for name in self._groups if name in gradients}
        names = dict(self._model.named_buffers())
        statistics = {name: g for name, g in gradients.items() if name in names}
        num_queries = len(next(iter(gradients.values())))
        total_QN = torch.zeros(num_queries, self.num_samples, dtype=torch.float64)
        left = self.num_steps
        if state is not None:
            left, total_QN = state["left"], state["total"].clone()
            for name, parts in state["weights"].items():
                weights[name].parts = {k: part.to(self._device) for k, part in parts.items()}
            statistics = {name: s.to(self._device) for name, s in state["statistics"].items()}

        def now() -> State:
            return {
                "left": left,
                "total": total_QN,
                "weights": {name: one.parts for name, one in weights.items()},
                "statistics": statistics,
            }

        progress(self.num_steps - left)
        while left:
            start = (left - 1) // self.spacing * self.spacing
            for step in reversed(self._segment(start)[: left - start]):
                found_QB = self._back(step, weights, statistics)
                total_QN[:, step.ids] -= self.num_samples * found_QB.double().cpu()
                left -= 1
                progress(self.num_steps - left)
                if left:
                    keep(now)
        return total_QN

    def _back(
        self, step: Step, weights: Mapping[str, Cotangents], statistics: dict[str, Tensor]
    ) -> Tensor:
        """Go back through a step; returns the derivatives by its samples' weights, (Q, B)."""
        graph = self._graph(step)
        if not self._checked:
            self._check(step, graph)
        values = {name: g.detach() for name, g in graph.gradients.items()}
        used, factor = clipped(values, self.recipe.clip_norm)
        num_queries = len(next(iter(weights.values())).parts["weight"])
        u: ByQuery = {}
        for name, gradient in used.items():
            if name not in weights:  # frozen for the optimizer, but part of the clipped norm
                u[name] = gradient.new_zeros(num_queries, *gradient.shape)
                continue
            u[name] = weights[name].back(
                Update(
                    step.settings[self._groups[name]],
                    gradient,
                    graph.parameters[name].detach(),
                    step.states.get(name, {}),
                )
            )
        u = back_through_clipping(values, u, factor)
        outputs, along = [*graph.gradients.values()], [*u.values()]
        for name, share, of_batch in reversed(graph.moves):
            if of_batch.requires_grad:
                outputs.append(of_batch)
                along.append(share * statistics[name])
            statistics[name] = (1 - share) * statistics[name]
        found = self._second(graph, outputs, along, len(step.ids))
        for name, more in zip(graph.parameters, found, strict=False):
            if name in weights:
                weights[name].parts["weight"].add_(more)
        return found[-1]

    def _graph(self, step: Step) -> "_Graph":
        """The gradient of a step's loss, with its graph."""
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(step.weights[name])
        graph = self._graph_of(self._model, step)
        if not abs(graph.loss - step.loss) <= SAME_LOSS * abs(step.loss) + 1e-6:
            raise ModelError(
                f"the loss of step {step.in_epoch + 1} in epoch {step.epoch + 1} is {step.loss:g} "
                f"in training and {graph.loss:g} when it is differentiated twice in "
                f"{str(self._dtype).removeprefix('torch.')}: its random numbers, such as dropout's, "
                "are others there; use --precision float32, or draw them from the Draw in "
                "train_batch()"
            )
        return graph

    def _graph_of(self, model: nn.Module, step: Step) -> "_Graph":
        dtype = next(model.parameters()).dtype
        batch = self._batch(step, dtype)
        seed = step_seed(self.seed, step.epoch, step.in_epoch)
        with all_derivatives(model), seeded(seed, self._device), watched(model) as moves:
            losses_B = self.task.losses(model, batch)
        require_one_each(self.task, losses_B, step.ids.shape)
        weights_B = torch.ones_like(losses_B, requires_grad=True)
        loss = (weights_B * losses_B).mean()
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        with all_derivatives(model):
            found = torch.autograd.grad(
                loss, [*parameters.values()], create_graph=True, allow_unused=True
            )
        # As the trainer does: the optimizer skips a parameter without a gradient.
        gradients = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
        return _Graph(float(loss.detach()), parameters, gradients, weights_B, moves)

    def _batch(self, step: Step, dtype: torch.dtype) -> Batch:
        batch = self.task.train_batch(step.ids, Draw(self.seed, step.epoch))
        return to_type(to_device(batch, self._device), dtype)

    def _second(
        self, graph: "_Graph", outputs: Sequence[Tensor], along: Sequence[Tensor], size: int
    ) -> list[Tensor]:
        """Derivatives of outputs along Q vectors by the parameters, and by the samples' weights.

        Args:
            along: For each output (Q, *shape).
            size: Number of samples in the batch.
        """
        inputs = [*graph.parameters.values(), graph.weights_B]
        queries = len(along[0])
        at_once = max(1, MAX_BYTES // max(1, size * self._sample_bytes)) if self._batched else 1
        pieces = []
        for first in range(0, queries, at_once):
            some = [a[first : first + at_once] for a in along]
            last = first + at_once >= queries
            with all_derivatives(self._model):
                pieces.append(_derivatives(outputs, inputs, some, self._batched, keep=not last))
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    # -- checks -----------------------------------------------------------------------------------

    def _check(self, step: Step, graph: "_Graph") -> None:
        """Compare a product with the batch's Hessian with differences, and all vectors at once.

        Where the backward of an operation cannot be differentiated, autograd may take the missing
        derivative for zero without a word.

        Raises:
            ModelError: torch cannot differentiate a gradient, or does it wrongly.
        """
        size = len(step.ids)
        outputs, inputs = [*graph.gradients.values()], [*graph.parameters.values(), graph.weights_B]
        generator = torch.Generator().manual_seed(0)
        along = [
            torch.randn(2, *g.shape, generator=generator, dtype=torch.float64).to(g)
            for g in outputs
        ]
        name = type(self._model).__name__
        try:
            with all_derivatives(self._model):
                one_by_one = _derivatives(outputs, inputs, along, batched=False, keep=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ModelError(
                f"torch cannot differentiate the gradient of {name} "
                f"({str(error).splitlines()[0]}): replace the operation, or use infl submit "
                "influence"
            ) from error
        try:
            with all_derivatives(self._model):
                together = _derivatives(outputs, inputs, along, batched=True, keep=True)
            self._batched = _alike(together, one_by_one)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an operation that vmap does not know
            self._batched = False
        self._sample_bytes = -(-saved_bytes(self.task, self._model, self._batch(step, self._dtype))
                               // size)  # fmt: skip
        if not self._agrees_with_differences(step):
            raise ModelError(
                f"second derivatives of {name} differ from finite differences: torch cannot "
                "differentiate the backward of one of its operations, such as weight_norm, or one's "
                "own with detach() in it; replace it, or use infl submit influence"
            )
        self._checked = True

    def _agrees_with_differences(self, step: Step) -> bool:
        """Whether the Hessian along one vector is the slope of the gradient there, in float64."""
        exact = copy_of(self._model).double()
        graph = self._graph_of(exact, step)
        generator = torch.Generator().manual_seed(0)
        scale = math.sqrt(sum(float(p.detach().square().sum()) for p in exact.parameters()))
        vector = {
            name: torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g)
            for name, g in graph.gradients.items()
        }
        length = math.sqrt(sum(float(v.square().sum()) for v in vector.values()))
        with all_derivatives(exact):
            found = torch.autograd.grad(
                [*graph.gradients.values()],
                [graph.parameters[name] for name in vector],
                [*vector.values()],
                materialize_grads=True,
            )
        rounding = 1e-6 * math.sqrt(
            sum(float(g.detach().square().sum()) for g in graph.gradients.values())
        )
        weights = {name: p.detach().clone() for name, p in exact.named_parameters()}

        def at(size: float) -> list[Tensor]:
            with torch.no_grad():
                for name, parameter in exact.named_parameters():
                    if name in vector:
                        parameter.copy_(weights[name] + size * vector[name])
            return [g.detach() for g in self._graph_of(exact, step).gradients.values()]

        # One that agrees is enough: another may cross the kink of a ReLU.
        for part in DIFFERENCES:
            size = part * scale / length
            slopes = [
                (a - b) / (2 * size) for a, b in zip(at(size), at(-size), strict=True)
            ]
            apart = sum(float((a - b).square().sum()) for a, b in zip(found, slopes, strict=True))
            norm = math.sqrt(sum(float(s.square().sum()) for s in slopes))
            if math.sqrt(apart) <= AGREEMENT * norm + rounding * length:
                return True
        return False


@dataclass(frozen=True)
class _Graph:
    """The gradient of a step's loss, ready to be differentiated.

    Attributes:
        loss: The mean loss.
        gradients: Of the parameters that have one.
        weights_B: Of the samples' losses, one each.
        moves: Of running statistics.
    """

    loss: float
    parameters: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    weights_B: Tensor
    moves: Moves


def _derivatives(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    along: Sequence[Tensor],
    batched: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    """Derivatives of outputs along Q vectors, by each of the inputs: (Q, *shape)."""
    count = len(along[0])
    if batched:
        found = torch.autograd.grad(
            outputs, inputs, along, retain_graph=keep, is_grads_batched=True, allow_unused=True
        )
        return tuple(
            x.new_zeros(count, *x.shape) if d is None else d
            for x, d in zip(inputs, found, strict=True)
        )
    rows = [
        torch.autograd.grad(
            outputs,
            inputs,
            [a[i] for a in along],
            retain_graph=keep or i < count - 1,
            materialize_grads=True,
        )
        for i in range(count)
    ]
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def _alike(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    apart = sum(float((a - b).square().sum()) for a, b in zip(first, second, strict=True))
    return apart <= AGREEMENT**2 * sum(float(b.square().sum()) for b in second)


def _groups(trainer: Trainer) -> dict[str, int]:
    """The group of each parameter that the optimizer has, by the parameter's name."""
    names = {p: name for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {
        names[p]: i
        for i, group in enumerate(trainer.optimizer.param_groups)
        for p in group["params"]
        if p in names
    }


def same_weights(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts are the same bit by bit, on any devices."""
    return first.keys() == second.keys() and all(
        torch.equal(value.cpu(), second[name].cpu()) for name, value in first.items()
    )


def _require_full_precision(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise ModelError(
                f"parameter {name} is of {str(parameter.dtype).removeprefix('torch.')}, whose "
                "rounding swallows small changes of an update: train in float32"
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
                f"buffer '{name}' of {type(model).__name__} changes in training, and unrolled knows "
                "only the running statistics of BatchNorm: make it a parameter or a constant, or "
                "use infl submit influence"
            )
