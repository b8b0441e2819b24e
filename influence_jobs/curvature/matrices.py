"""The two curvatures of the mean training loss: the Gauss-Newton matrix and the Hessian."""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp

from influence_jobs.curvature.derivatives import (
    Parameters,
    difference,
    function_of_parameters,
    gradients_along,
    mapped,
)
from influence_jobs.curvature.operators import LOOKED_AT, Operator
from influence_jobs.curvature.requirements import (
    agreeing_forms,
    require_output_loss,
    those_left,
)
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.requirements import require_independent_samples
from influence_jobs.gradients.transforms import all_derivatives
from influence_jobs.memory import BatchSize
from influence_jobs.tasks.base import Batch, Draw, Task
from influence_jobs.tasks.output_loss import Form, forms_of


class GaussNewton(Operator):
    """The Gauss-Newton matrix G, the mean of J^T H_out J over samples.

    J is the Jacobian of a sample's outputs, H_out the Hessian of its loss in the outputs, for the
    loss in `Task.output_loss`. G is the Hessian without the curvature of the network itself. It is
    positive semidefinite if the loss is convex in the outputs (Schraudolph: "Fast curvature
    matrix-vector products", 2002).
    """

    positive_semidefinite = True
    cost = 4 / 3  # two matrix products in Jv, two in J^T u

    _forms: tuple[Form, ...] = ()

    @property
    def form(self) -> Form:
        """What the losses are of the outputs, as the samples seen so far show it."""
        self.look()
        return self._forms[0]

    def _look(self, batch: Batch, again: Batch) -> None:
        require_independent_samples(self.model)
        self._forms = require_output_loss(self.task, self.model, batch, forms_of(self.task))
        super()._look(batch, again)

    def _plain_product(self, vectors: Parameters, batch: Batch) -> Parameters:
        targets = self.task.targets(batch)
        outputs = self.task.outputs(self.model, batch)
        # J^T w is linear in w, so its derivative along w gives J v.
        w = torch.zeros_like(outputs, requires_grad=True)
        tangents = gradients_along(self._autograd(outputs, w, create_graph=True), [w], vectors)[0]
        with torch.no_grad():
            curved = self._forms[0].hessian(outputs.detach(), targets, tangents)
        return self._autograd(outputs, curved)

    def _first_derivative(self, batch: Batch) -> Tensor:
        return self.task.outputs(self.model, batch).detach()

    def _from_first(self, slope: Tensor, batch: Batch) -> Parameters:
        outputs = self.task.outputs(self.model, batch)
        with torch.no_grad():
            curved = self._forms[0].hessian(outputs.detach(), self.task.targets(batch), slope)
        return self._autograd(outputs, curved)

    def _check(self, batch: Batch, losses_B: Tensor) -> Tensor:
        # Of forms that agree on a few samples another batch may tell which is meant.
        return agreeing_forms(self.task, self.model, batch, losses_B, self._forms)

    def _checked(self, right: Sequence[bool]) -> None:
        few = self.batch(self.ids[:LOOKED_AT])
        self._forms = those_left(self.task, self.model, few, self._forms, right)

    def _multiply(
        self, parameters: Parameters, vectors: Parameters, batch: Batch, at_once: int
    ) -> Parameters:
        output_hessian, targets = self._forms[0].hessian, self.task.targets(batch)
        outputs = function_of_parameters(self.model, self.task.outputs, batch)
        transposed_jacobian = vjp(outputs, parameters)[1]

        def product(vector: Parameters) -> Parameters:
            # The primals have no vector axis, so vmap runs their forward once for all vectors.
            outputs_BC, tangents_BC = jvp(outputs, (parameters,), (vector,))[:2]
            result: Parameters
            (result,) = transposed_jacobian(output_hessian(outputs_BC, targets, tangents_BC))
            return result

        products: Parameters = mapped(product, vectors, at_once)
        return products


class Hessian(Operator):
    """The Hessian H of the mean loss. For networks it is indefinite, before and after training.

    Args:
        finite_difference: Use differences of gradients (`difference`), not exact products. All
            other arguments are those of `Operator`.
    """

    positive_semidefinite = False
    cure = "--operator gauss-newton"  # differentiates the network once
    cost = 2.0  # a gradient has three matrix products, its derivative along a vector six

    def __init__(
        self,
        model: nn.Module,
        space: ParameterSpace,
        task: Task,
        ids: Tensor,
        draw: Draw = Draw(0),  # noqa: B008  (frozen)
        batch_size: int | BatchSize | None = None,
        *,
        finite_difference: bool = False,
    ):
        super().__init__(model, space, task, ids, draw, batch_size)
        self.finite_difference = finite_difference
        self._exact = not finite_difference

    def _look(self, batch: Batch, again: Batch) -> None:
        super()._look(batch, again)
        if self._exact and not self._plain:
            with all_derivatives(self.model), suppress(RuntimeError):
                self._compare_with_differences(batch)

    def _plain_product(self, vectors: Parameters, batch: Batch) -> Parameters:
        loss = self.task.losses(self.model, batch).mean()
        gradient = self._autograd(loss, create_graph=True)
        parameters = self.space.parameters()
        found = gradients_along(gradient, list(parameters.values()), vectors)
        return dict(zip(parameters, found, strict=True))

    def _first_derivative(self, batch: Batch) -> Tensor:
        return self._joined(self._autograd(self.task.losses(self.model, batch).mean()))

    def _from_first(self, slope: Tensor, batch: Batch) -> Parameters:
        return {name: part[0] for name, part in self.space.split(slope[None]).items()}

    def _multiply(
        self, parameters: Parameters, vectors: Parameters, batch: Batch, at_once: int
    ) -> Parameters:
        losses = function_of_parameters(self.model, self.task.losses, batch)
        gradient = grad(lambda parameters: losses(parameters).mean())
        if self.finite_difference:
            return difference(gradient, parameters, vectors, at_once)
        # Pearlmutter: "Fast exact multiplication by the Hessian", 1994. H is symmetric, so the
        # gradient's vjp equals its jvp, but it needs only one forward and backward pass for all
        # vectors and chunks.
        transposed_hessian = vjp(gradient, parameters)[1]
        products: Parameters
        (products,) = mapped(transposed_hessian, vectors, at_once)
        return products
