"""The curvature of the mean loss of one batch, times vectors, and whether a model allows it."""

import copy
import logging
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import grad

from influence_jobs.curvature.derivatives import (
    AGREEMENT,
    Parameters,
    function_of_parameters,
    padding_rows,
    require_alike,
    without_rows,
)
from influence_jobs.curvature.requirements import require_deterministic, require_own_losses
from influence_jobs.errors import ModelError, first_line
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.requirements import gradient_hooks, require_independent_samples
from influence_jobs.gradients.taps import thawed
from influence_jobs.gradients.transforms import all_derivatives
from influence_jobs.memory import is_out_of_memory
from influence_jobs.tasks.base import Batch, Task
from influence_jobs.tasks.placement import copy_of, to_type
from influence_jobs.transfers import on_device

log = logging.getLogger(__name__)

DIFFERENCES = (1e-6, 1e-8, 1e-10)  # steps of differences in float64, as parts of the weights


class BatchCurvature(ABC):
    """A symmetric P x P matrix of a batch, the mean of one such matrix per sample.

    Args:
        model: In eval mode; every product uses its current weights.
        space: The parameters that the matrix is of.
        task: Gives losses.

    Raises:
        ModelError: A parameter is of half precision.

    Attributes:
        cure: What to use instead where torch lacks a derivative.
    """

    cure: ClassVar[str] = "--solver identity"

    def __init__(self, model: nn.Module, space: ParameterSpace, task: Task):
        for name, parameter in space.parameters().items():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ModelError(
                    f"parameter {name} is of {str(parameter.dtype).removeprefix('torch.')}, and "
                    "curvature needs float32 or float64: convert the model with model.float()"
                )
        self.model, self.space, self.task = model, space, task
        self._padding = padding_rows(model, space.parameters())
        self._exact = True  # products are exact up to rounding
        self._plain = False  # by autograd on the model itself, since torch.func cannot

    @abstractmethod
    def _multiply(
        self, parameters: Parameters, vectors: Parameters, batch: Batch, at_once: int
    ) -> Parameters:
        """The mean over a batch times {name: (Q, *shape)}, for `at_once` vectors at a time."""

    @abstractmethod
    def _plain_product(self, vectors: Parameters, batch: Batch) -> Parameters:
        """The mean over a batch times {name: shape}, by plain autograd on the model."""

    @abstractmethod
    def _first_derivative(self, batch: Batch) -> Tensor:
        """What a product is made of by its derivative along the vector, by autograd."""

    @abstractmethod
    def _from_first(self, slope: Tensor, batch: Batch) -> Parameters:
        """The product, given that derivative."""

    def _products(self, vectors: Parameters, batch: Batch, at_once: int) -> Parameters:
        """The mean over a batch times vectors, by whichever way the model can be differentiated."""
        if not self._plain:
            return self._multiply(self._values(), vectors, batch, at_once)
        count = len(next(iter(vectors.values())))
        with thawed(self.space.parameters().values()), torch.enable_grad():
            found = [
                self._plain_product({name: v[i] for name, v in vectors.items()}, batch)
                for i in range(count)
            ]
        return {name: torch.stack([one[name].detach() for one in found]) for name in vectors}

    def _look(self, batch: Batch, again: Batch) -> None:
        """Check on a few samples, fetched twice, that products will be right.

        Raises:
            ModelError: The model is in train mode, uses batch statistics or is not deterministic, a
                sample's loss depends on the others, or torch cannot differentiate it.
        """
        require_independent_samples(self.model)
        require_deterministic(self.task, self.model, batch, again)
        require_own_losses(self.task, self.model, batch)
        with all_derivatives(self.model):
            try:
                self._compare_with_autograd(batch)
            except RuntimeError as error:  # NotImplementedError is one
                if is_out_of_memory(error):
                    raise
                self._turn_to_plain_autograd(batch, error)

    def _turn_to_plain_autograd(self, batch: Batch, error: RuntimeError) -> None:
        """Do without `torch.func`, for which some operations lack what plain autograd knows.

        Raises:
            ModelError: Plain autograd cannot do either, or would go through a gradient hook twice.
        """
        if hooked := gradient_hooks(self.model, self.space.parameters().values()):
            raise ModelError(hooked) from error
        said = first_line(error)
        self._plain = True
        try:
            self._compare_with_differences(batch)
        except RuntimeError as failed:
            if is_out_of_memory(failed):
                raise
            raise ModelError(
                f"torch cannot differentiate {type(self.model).__name__} as the curvature needs it "
                f"({said}): use {self.cure}, or replace the operation"
            ) from error
        log.warning("the curvature is computed by plain autograd, one vector at a time: %s", said)

    def _compare_with_autograd(self, batch: Batch) -> None:
        """Compare a gradient and a product with those of plain autograd on the model as it is.

        Raises:
            RuntimeError: They differ, as where a model uses a parameter through a handle of its
                own, or `torch.func` fails.
        """
        parameters = self.space.parameters()
        losses = function_of_parameters(self.model, self.task.losses, batch)
        ours = grad(lambda parameters: losses(parameters).mean())(self._values())
        generator = torch.Generator().manual_seed(0)
        vectors = {
            name: on_device(torch.randn(p.shape, generator=generator).to(p.dtype), p.device)
            for name, p in parameters.items()
        }
        vectors = without_rows(vectors, self._padding)
        products = self._products({name: v[None] for name, v in vectors.items()}, batch, 1)
        with thawed(parameters.values()), torch.enable_grad():
            plain = self._autograd(self.task.losses(self.model, batch).mean())
            require_alike("gradient", ours, plain)
            try:
                plain = self._plain_product(vectors, batch)
            except (RuntimeError, NotImplementedError):  # autograd itself knows no such derivative
                return
        if self._exact:
            require_alike("curvature", {n: p[0] for n, p in products.items()}, plain)

    def _compare_with_differences(self, batch: Batch) -> None:
        """Compare a product by plain autograd with finite differences, in float64.

        Where the backward of an operation of one's own cannot be differentiated, autograd may take
        the missing derivative for zero without a word. One step that agrees is enough: another may
        cross the kink of a ReLU.

        Raises:
            ModelError: They differ.
            RuntimeError: Autograd cannot do it, or the model cannot be in float64.
        """
        exact = copy.copy(self)
        exact.model = copy_of(self.model).double()
        exact.space = self.space.of(exact.model)
        batch, parameters = to_type(batch, torch.float64), exact.space.parameters()
        generator = torch.Generator().manual_seed(0)
        theta_P = self._joined({name: p.detach() for name, p in parameters.items()})
        vector_P = torch.randn(theta_P.shape, generator=generator, dtype=theta_P.dtype)
        vector_P = vector_P.to(theta_P.device)
        vector_P *= theta_P.norm() / vector_P.norm()
        vector_P = self.space.join(without_rows(self.space.split(vector_P), self._padding))

        def at(step: float) -> Tensor:
            moved = self.space.split(theta_P + step * vector_P)
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(moved[name])
            return exact._first_derivative(batch)

        with thawed(parameters.values()), torch.enable_grad():
            found_P = self._joined(exact._plain_product(self.space.split(vector_P), batch))
            gradient = exact._autograd(self.task.losses(exact.model, batch).mean())
            rounding = 1e-6 * self._joined(gradient).norm()  # where the product is zero
            for step in DIFFERENCES:
                slope = (at(step) - at(-step)) / (2 * step)
                at(0)
                expected_P = self._joined(exact._from_first(slope, batch))
                if (found_P - expected_P).norm() <= AGREEMENT * expected_P.norm() + rounding:
                    return
        raise ModelError(
            f"a product with the curvature of {type(self.model).__name__} differs from finite "
            "differences: torch cannot differentiate the backward pass of one of its operations, "
            f"such as weight_norm, or of your own operation with detach() in it; use {self.cure}, "
            "or replace the operation"
        )

    def _autograd(
        self, value: Tensor, along: Tensor | None = None, *, create_graph: bool = False
    ) -> Parameters:
        """Derivatives of a value by the parameters, zero where it does not depend on one."""
        parameters = self.space.parameters()
        found = torch.autograd.grad(
            value,
            list(parameters.values()),
            along,
            create_graph=create_graph,
            retain_graph=True,
            materialize_grads=True,
        )
        return dict(zip(parameters, found, strict=True))

    def _values(self) -> Parameters:
        return {name: p.detach() for name, p in self.space.parameters().items()}

    def _joined(self, parts: Parameters) -> Tensor:
        """One value a parameter as one vector (P,)."""
        return self.space.join({name: part[None] for name, part in parts.items()})[0]
