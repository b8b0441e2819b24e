"""How much solutions depend on the samples that the curvature is of."""

import torch
from torch import Tensor

from influence_jobs.curvature.cg import ConjugateGradient
from influence_jobs.curvature.ek_fac import EkFac
from influence_jobs.curvature.operators import Operator
from influence_jobs.curvature.solver import Solver

TOLERANCE, MAX_ITERATIONS = 1e-2, 100  # a cosine needs two digits


def cosines_of_halves(
    solver: Solver, operator: Operator, rhs_QP: Tensor, damping: float
) -> list[float]:
    """Cosine between the solutions by two random halves of the operator's samples, for each row.

    It is solved by EK-FAC if the solver is EK-FAC, else by conjugate gradients, so that the noise
    of a stochastic solver does not count.

    Raises:
        DataError, ModelError, SpecError, RuntimeFault: As `Solver.solve`.
    """
    if isinstance(solver, EkFac):
        solver = EkFac(damping, seed=solver.seed, targets=solver.targets)
    else:
        solver = ConjugateGradient(damping, TOLERANCE, MAX_ITERATIONS)
    order = torch.randperm(operator.num_samples, generator=torch.Generator().manual_seed(0))
    halves = torch.chunk(operator.ids[order], 2)
    one_QP, other_QP = (
        solver.solve(operator.over(half.sort().values), rhs_QP).x_QP.double() for half in halves
    )
    cosines: list[float] = torch.cosine_similarity(one_QP, other_QP, dim=1).tolist()
    return cosines
