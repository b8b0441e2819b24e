"""The interface of solvers of (A + lambda I) x = v."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from influence_jobs.curvature.operators import Operator
from influence_jobs.curvature.spectrum import largest_eigenvalue, smallest_eigenvalue
from influence_jobs.errors import DataError, SpecError

if TYPE_CHECKING:  # pydantic is not needed to compute
    from influence_jobs.specs.solvers import SolverSettings


DAMPING_SHARE = 0.04  # lambda as a part of the largest eigenvalue

Progress = Callable[[float], None]  # takes the fraction of the work done


def no_progress(fraction: float) -> None:
    """Ignore the progress."""


@dataclass(frozen=True)
class Solution:
    """The solution for Q right-hand sides.

    Attributes:
        x_QP: Approximately (A + lambda I)^-1 v.
        residual_Q: ||v - (A + lambda I) x|| / ||v||, where A is over all samples of the operator;
            0 if v is zero.
        iterations_Q: Number of steps for each.
        damping: Lambda, the effective damping.
        gradient_equivalents: Cost for all right-hand sides together, in gradients of all samples of
            the operator. Measuring the spectrum and the residual is not counted.
        record: Chosen settings, measurements and messages, as plain JSON data.
    """

    x_QP: Tensor
    residual_Q: Tensor
    iterations_Q: Tensor
    damping: float
    gradient_equivalents: float
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """Some of the work of `Solver.solve`, for measuring its time.

    Attributes:
        said: What decides the cost, in lines for people.
        pieces: Does one piece of the work after the other, endlessly; yields the fraction of the
            whole that each is.
    """

    said: tuple[str, ...]
    pieces: Iterator[float]


class Solver(ABC):
    """Solves (A + lambda I) x = v for a symmetric operator A.

    Args:
        damping: Lambda; None for `damping_share` times A's largest eigenvalue. If the smallest
            eigenvalue is negative, its absolute value is added.

    Raises:
        SpecError: Lambda is not positive.
    """

    def __init__(self, damping: float | None = None, damping_share: float = DAMPING_SHARE):
        for name, value in (("damping", damping), ("damping share", damping_share)):
            if value is not None and not value > 0:
                raise SpecError(f"{name} is {value}: it must be larger than 0")
        self._damping, self._share = damping, damping_share

    def solve(
        self, operator: Operator, rhs_QP: Tensor, progress: Progress = no_progress
    ) -> Solution:
        """Solve for all right-hand sides together.

        Args:
            operator: A.
            rhs_QP: v, on the operator's device.
            progress: Called with the fraction of the work done.

        Raises:
            DataError: A right-hand side is not finite.
            ModelError: The model or task does not fit the solver.
            SpecError: A + lambda I is not positive definite.
            RuntimeFault: No solution was found.
        """
        require_finite(rhs_QP)
        return self._solve(operator, rhs_QP, progress)

    def solve_repeats(
        self,
        operator: Operator,
        rhs_QP: Tensor,
        repeats: Sequence[int],
        progress: Progress = no_progress,
    ) -> list[Solution]:
        """One solution for each repeat; without randomness all of them are alike.

        Raises:
            DataError, ModelError, SpecError, RuntimeFault: As `solve`.
        """
        return [self.solve(operator, rhs_QP, progress) for _ in repeats]

    def trial(self, operator: Operator, rhs_QP: Tensor, passes: float) -> Trial:
        """Begin the work for right-hand sides like these, for measuring.

        Args:
            operator: A; its products are measured.
            rhs_QP: v; any numbers will do.
            passes: Products with all samples that a solver takes which does not know better.

        Raises:
            SpecError: As `solve`, or the work is out of all proportion.
        """
        return Trial((), self._products(operator, rhs_QP, passes))

    def _products(self, operator: Operator, rhs_QP: Tensor, passes: float) -> Iterator[float]:
        while True:
            for ids in torch.split(operator.ids, operator.batch_size):
                operator.product(rhs_QP, ids)
                yield len(ids) / (operator.num_samples * passes)

    @classmethod
    def of(cls, settings: "SolverSettings", *, seed: int) -> Self:
        """The solver with some settings; `seed` is of what it draws at random, if anything."""
        seeded = {"seed": seed} if "seed" in signature(cls).parameters else {}
        return cls(**settings.model_dump(exclude={"name", "repeats"}), **seeded)

    @abstractmethod
    def _solve(self, operator: Operator, rhs_QP: Tensor, progress: Progress) -> Solution:
        """Solve for finite right-hand sides."""

    def damping_for(self, operator: Operator) -> float:
        """Lambda; it is chosen if it was not given."""
        if self._damping is not None:
            return self._damping
        chosen = self._share * largest_eigenvalue(operator)
        if not operator.positive_semidefinite:
            chosen = abs(chosen) + max(0.0, -smallest_eigenvalue(operator))
        if not chosen > 0:
            raise SpecError(
                "no lambda can be chosen, as the curvature has no positive eigenvalue: "
                "give --damping"
            )
        return chosen


def make_solver(settings: "SolverSettings", *, seed: int) -> Solver:
    """The solver that settings are of; `seed` is of what it draws at random."""
    module, _, name = settings.solver.partition(":")
    kind: type[Solver] = getattr(import_module(f"influence_jobs.curvature.{module}"), name)
    return kind.of(settings, seed=seed)


def require_finite(rhs_QP: Tensor) -> None:
    """Refuse right-hand sides that are not finite.

    Raises:
        DataError: A right-hand side is not finite.
    """
    finite_Q = rhs_QP.isfinite().all(dim=1)
    if not finite_Q.all():
        row = int((~finite_Q).nonzero()[0])
        raise DataError(
            f"the gradient of query {row} is not finite: check its test sample and the checkpoint"
        )


def relative_residual(
    operator: Operator, x_QP: Tensor, rhs_QP: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """The residual v - (A + lambda I) x, (Q, P), and its length divided by that of v, (Q,)."""
    residual_QP = operator @ x_QP
    torch.sub(rhs_QP, residual_QP, out=residual_QP)
    for residual_P, x_P in zip(residual_QP, x_QP, strict=True):
        residual_P -= damping * x_P
    length_Q = torch.linalg.vector_norm(rhs_QP, dim=1)
    relative_Q = torch.linalg.vector_norm(residual_QP, dim=1) / length_Q
    return residual_QP, relative_Q.where(length_Q > 0, 0.0)
