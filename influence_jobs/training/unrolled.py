"""Exact influence through the training of one run, by going back through all of its steps.

A training with weights w_i of the samples' losses, g_t = (1/B) sum_i w_i grad l_i(theta_t), ends in
weights that are a function of w. The derivative of a query's measure f by w_i, at w = 1, is

    df/dw_i = sum over steps t with i in their batch of  u_t . grad l_i(theta_t) / B

where u_t is the cotangent of g_t. The update's own adjoint gives u_t, from the cotangents of
theta_{t+1} and of the optimizer's state (`adjoint`); that of theta_t then gets H_t u_t more, with
the Hessian H_t of the batch's loss. Both products come from one pass back through the graph of g_t.
The steps are those of `Trainer`, with their batches, noise and dropout masks.

Maclaurin, Duvenaud, Adams: "Gradient-based Hyperparameter Optimization through Reversible
Learning", 2015 (the adjoint of SGD with momentum). Ilyas, Engstrom: "MAGIC: Near-Optimal Data
Attribution for Deep Learning", 2025, arXiv 2504.16430 (of the weights of all samples).
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from influence_jobs.errors import ModelError
from influence_jobs.tasks.base import READING, Batch, Draw
from influence_jobs.tasks.placement import in_dtype, to_device, widened
from influence_jobs.training.adjoint import Cotangents, Update, back_through_clipping, clipped
from influence_jobs.training.batch_gradient import BatchGradient, SecondDerivatives, batch_gradient
from influence_jobs.training.statistics import statistics_of
from influence_jobs.training.train import initial_model, step_seed
from influence_jobs.training.trajectory import State, Step, Trajectory
from influence_jobs.transfers import loader_for, numbers, on_cpu

SAME_LOSS = 1e-3  # allowed relative difference of a step's loss; rounding causes 1e-6


class Unrolled:
    """The adjoint of a training.

    A sample's weight is that of its loss alone: batch statistics still have the sample in them, and
    the mean over a batch keeps its divisor.

    Args:
        trajectory: The training.
        dtype: Of the cotangents, and of the model where they go back through it.
    """

    def __init__(self, trajectory: Trajectory, dtype: torch.dtype):
        self.trajectory, self.dtype = trajectory, dtype
        self._task, self._device = trajectory.task, trajectory.device
        self._model = in_dtype(initial_model(self._task, trajectory.seed, self._device), dtype)
        self._second: SecondDerivatives | None = None

    @property
    def query_bytes(self) -> int:
        """Bytes of the cotangents of one query."""
        groups = self.trajectory.groups
        entries = sum(p.numel() for n, p in self._model.named_parameters() if n in groups)
        return (1 + len(self.trajectory.kind.state)) * entries * self.dtype.itemsize

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
                (`statistics.with_statistics`): {name: (Q, *shape)}.
            progress: Takes the number of steps gone back through.
            state: Where an interrupted call was, from `keep`.
            keep: Is called between steps with a function that gives the state.

        Returns:
            Shape (Q, N), float64, on the CPU.

        Raises:
            ModelError: The steps do not repeat, or torch cannot differentiate them twice.
        """
        own = {name: g.to(self._device, self.dtype).clone() for name, g in gradients.items()}
        weights = {name: self.trajectory.kind(own[name]) for name in self.trajectory.groups}
        statistics = {name: own[name] for name in statistics_of(self._model)}
        n, steps = self.trajectory.num_samples, self.trajectory.num_steps
        total_QN = torch.zeros(len(next(iter(own.values()))), n, dtype=torch.float64)
        left = steps
        if state is not None:
            left, total_QN = state["left"], state["total"].clone()
            for name, parts in state["weights"].items():
                weights[name].parts = {k: part.to(self._device) for k, part in parts.items()}
            statistics = {name: s.to(self._device) for name, s in state["statistics"].items()}

        waiting: list[tuple[Tensor, Tensor]] = []  # of steps, still on the device

        def gather() -> None:
            found = on_cpu(dict(enumerate(found_QB for _, found_QB in waiting)))
            for i, (ids, _) in enumerate(waiting):
                total_QN[:, ids] -= n * found[i].double()
            waiting.clear()

        def now() -> State:
            gather()
            return {
                "left": left,
                "total": total_QN,
                "weights": {name: one.parts for name, one in weights.items()},
                "statistics": statistics,
            }

        progress(steps - left)
        load = loader_for(self._device)
        while left:
            steps_back = reversed(self.trajectory.segment(left))
            for step, batch in load((step, self._batch(step)) for step in steps_back):
                waiting.append((step.ids, self._back(step, batch, weights, statistics)))
                left -= 1
                progress(steps - left)
                if left:
                    keep(now)
            gather()
        return total_QN

    def trial(self, num_queries: int) -> Iterator[int]:
        """Do some of the work without states, for measuring.

        Yields:
            The number of samples of a step that was taken twice and gone back through.
        """
        trainer = self.trajectory.trainer()
        model = dict(self._model.named_parameters()) | statistics_of(self._model)
        vectors = {
            name: torch.randn(num_queries, *value.shape).to(self._device, self.dtype)
            for name, value in model.items()
        }
        weights = {name: self.trajectory.kind(vectors[name]) for name in self.trajectory.groups}
        statistics = {name: vectors[name] for name in statistics_of(self._model)}
        while True:
            if trainer.finished:
                trainer = self.trajectory.trainer()
            step = self.trajectory.recorded_step(trainer)
            trainer.step()
            self._back(step, self._batch(step), weights, statistics)
            yield len(step.ids)

    def _batch(self, step: Step) -> Batch:
        """The samples of a step as the training had them, on the device."""
        with READING:
            batch = self._task.train_batch(step.ids, Draw(self.trajectory.seed, step.epoch))
        return widened(to_device(batch, self._device), self.dtype)

    def _back(
        self,
        step: Step,
        batch: Batch,
        weights: Mapping[str, Cotangents],
        statistics: dict[str, Tensor],
    ) -> Tensor:
        """Go back through a step; returns the derivatives by its samples' weights, (Q, B)."""
        graph, second, states = self._graph(step, batch)
        values = {name: gradient.detach() for name, gradient in graph.gradients.items()}
        used, factor = clipped(values, self.trajectory.recipe.clip_norm)
        num_queries = len(next(iter(weights.values())).parts["weight"])
        u: dict[str, Tensor] = {}
        for name, gradient in used.items():
            if name not in weights:  # the optimizer has it not, but it counts in the clipped norm
                u[name] = gradient.new_zeros(num_queries, *gradient.shape)
                continue
            settings = step.settings[self.trajectory.groups[name]]
            weight, state = graph.parameters[name].detach(), states.get(name, {})
            u[name] = weights[name].back(Update(settings, gradient, weight, state))
        u = back_through_clipping(values, u, factor)
        outputs, along = [*graph.gradients.values()], [*u.values()]
        for name, share, of_batch in reversed(graph.moves):
            if of_batch.requires_grad:
                outputs.append(of_batch)
                along.append(share * statistics[name])
            statistics[name] = (1 - share) * statistics[name]
        by_parameters, by_weights_QB = second(graph, outputs, along)
        for name, cotangents in weights.items():
            cotangents.parts["weight"].add_(by_parameters[name])
        return by_weights_QB

    def _graph(
        self, step: Step, batch: Batch
    ) -> tuple[BatchGradient, SecondDerivatives, Mapping[str, Mapping[str, Tensor]]]:
        """The gradient of a step's loss, what differentiates it, and the optimizer's states.

        The numbers of steps in these are on the CPU.
        """
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(step.weights[name])
        seed = step_seed(self.trajectory.seed, step.epoch, step.in_epoch)
        size = len(step.ids)
        if self._second is None:
            self._second = SecondDerivatives(
                self._task, self._model, batch, size=size, seed=seed, device=self._device
            )
        graph = batch_gradient(
            self._task, self._model, batch, size=size, seed=seed, device=self._device
        )
        counts = {
            name: state["step"]
            for name, state in step.states.items()
            if "step" in state and state["step"].device.type != "cpu"
        }
        # One look at the device for all that this step needs as numbers.
        twice, once, *counted = numbers([graph.loss, step.loss, *counts.values()])
        states = dict(step.states)
        for name, count in zip(counts, counted, strict=True):
            states[name] = {**states[name], "step": torch.tensor(count)}
        if not abs(twice - once) <= SAME_LOSS * abs(once) + 1e-6:
            raise ModelError(
                f"the loss of step {step.in_epoch + 1} in epoch {step.epoch + 1} is {once:g} in "
                f"training and {twice:g} when it is differentiated twice in "
                f"{str(self.dtype).removeprefix('torch.')}: its random numbers, such as those of "
                "dropout, differ; use --precision float32, or draw them from the Draw in "
                "train_batch()"
            )
        return graph, self._second, states
