"""The identity in place of a curvature, as a baseline."""

from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from influence_jobs.curvature.operators import Operator
from influence_jobs.curvature.solver import Progress, Solution, Solver

if TYPE_CHECKING:
    from influence_jobs.specs.solvers import SolverSettings


class Identity(Solver):
    """x = v: scores are dot products of gradients. Lambda would only scale them, so it is 1."""

    def __init__(self) -> None:
        super().__init__(1.0)

    @classmethod
    def of(cls, settings: "SolverSettings", *, seed: int) -> Self:
        return cls()

    def _solve(self, operator: Operator, rhs_QP: Tensor, progress: Progress) -> Solution:
        count = len(rhs_QP)
        steps_Q = torch.zeros(count, dtype=torch.int64)
        return Solution(rhs_QP.clone(), torch.zeros(count), steps_Q, 1.0, 0.0)
