"""Conjugate gradients for many right-hand sides at once."""

import math

import torch
from torch import Tensor

from influence_jobs.curvature.operators import Operator
from influence_jobs.curvature.solver import (
    DAMPING_SHARE,
    Progress,
    Solution,
    Solver,
    Trial,
    relative_residual,
)
from influence_jobs.curvature.spectrum import largest_eigenvalue, sufficient_damping
from influence_jobs.errors import SpecError
from influence_jobs.gpu import in_tf32
from influence_jobs.transfers import numbers

DOT_PIECE = 2**22  # numbers that are multiplied at a time


class ConjugateGradient(Solver):
    """Conjugate gradients in which all right-hand sides share each pass over the samples.

    Each right-hand side has its own step lengths. Once it has converged it does not change.
    Hestenes and Stiefel: "Methods of conjugate gradients for solving linear systems", 1952.

    Args:
        damping, damping_share: See `Solver`.
        tolerance: Relative residual at which a right-hand side has converged.
        max_iterations: Largest number of passes. Then the current solution is returned, with its
            residual and a message.
    """

    def __init__(
        self,
        damping: float | None = None,
        tolerance: float = 1e-4,
        max_iterations: int = 200,
        damping_share: float = DAMPING_SHARE,
    ):
        super().__init__(damping, damping_share)
        self.tolerance, self.max_iterations = tolerance, max_iterations

    def _solve(self, operator: Operator, rhs_QP: Tensor, progress: Progress) -> Solution:
        operator.require_finite()
        damping = self.damping_for(operator)
        before = operator.gradient_equivalents
        x_QP = torch.zeros_like(rhs_QP)
        residual_QP, direction_QP = rhs_QP.clone(), rhs_QP.clone()
        # On the device, and as numbers: a GPU is waited for once an iteration, at its end.
        squared = [_dot(row_P, row_P) for row_P in residual_QP]
        started = numbers(squared)
        targets, now = [self.tolerance**2 * one for one in started], started.copy()
        iterations_Q = torch.zeros(len(rhs_QP), dtype=torch.int64)
        going = [row for row, one in enumerate(now) if one > 0]  # rows that have not converged
        while going and int(iterations_Q.max()) < self.max_iterations:
            p_QP = direction_QP
            if len(going) < len(rhs_QP):
                p_QP = torch.stack([direction_QP[row] for row in going])
            product_QP, curvatures = operator.unchecked(p_QP), []
            # Row by row and in place: vectors (Q, P) are what takes the memory.
            for i, row in enumerate(going):
                p_P, product_P, residual_P = p_QP[i], product_QP[i], residual_QP[row]
                product_P += damping * p_P
                curvatures.append(_dot(p_P, product_P))
                step = (squared[row] / curvatures[-1]).to(p_P.dtype)
                x_QP[row] += step * p_P
                residual_P -= step * product_P
                new = _dot(residual_P, residual_P)
                direction_QP[row] = residual_P + (new / squared[row]).to(p_P.dtype) * p_P
                squared[row] = new
                iterations_Q[row] += 1
            found = numbers(curvatures + squared)
            curved, now = found[: len(going)], found[len(going) :]
            if not all(map(math.isfinite, curved)):
                _ = operator @ rhs_QP  # refuses the samples by name; p_QP is overwritten by now
            if not min(curved) > 0:
                raise _not_positive(operator, damping)
            del p_QP, product_QP
            going = [row for row in going if now[row] > targets[row]]
            progress(self._fraction(now, started, int(iterations_Q.max())))
        cost = operator.gradient_equivalents - before
        del residual_QP, direction_QP
        _, relative_Q = relative_residual(operator, x_QP, rhs_QP, damping)
        messages = []
        if len(going):
            messages.append(
                f"{len(going)} of {len(rhs_QP)} s_test vectors did not reach a residual of "
                f"{self.tolerance:g} in {self.max_iterations} iterations"
            )
        record = {"tolerance": self.tolerance, "messages": messages}
        return Solution(x_QP, relative_Q.cpu(), iterations_Q, damping, cost, record)

    def trial(self, operator: Operator, rhs_QP: Tensor, passes: float) -> Trial:
        largest, damping = abs(largest_eigenvalue(operator)), self.damping_for(operator)
        # A bound for any spectrum in [0, M]; clusters of eigenvalues converge sooner.
        bound = 0.5 * math.sqrt(1 + largest / damping) * math.log(2 / self.tolerance)
        iterations = max(1, min(math.ceil(bound), self.max_iterations))
        said = (
            f"up to {iterations} iterations over {operator.num_samples:,} samples: lambda "
            f"{damping:.3g}, largest eigenvalue {largest:.3g}"
        )
        if bound > self.max_iterations:
            said += (
                f"; a residual of {self.tolerance:g} may take {math.ceil(bound):,}: raise --damping"
            )
        return Trial((said,), self._products(operator, rhs_QP, iterations + 1))  # the residual

    def _fraction(self, squared: list[float], started: list[float], iterations: int) -> float:
        """Fraction of the work done for the slowest; residuals fall about geometrically."""
        fallen = [one / first for one, first in zip(squared, started, strict=True) if first]
        slowest = min(1.0, max([self.tolerance**2, *fallen]))
        by_residual = math.log(slowest) / (2 * math.log(self.tolerance))
        return max(by_residual, iterations / self.max_iterations)


def _not_positive(operator: Operator, damping: float) -> SpecError:
    lowest, enough = sufficient_damping(operator)
    cure = "use --operator gauss-newton"
    if in_tf32():  # its rounding is about .001 of the largest one
        cure = "use --precision float32"
    elif operator.positive_semidefinite:  # by its name, but not with this loss
        cure = (
            f"output_loss of {type(operator.task).__name__} is not convex in the outputs: mend it"
        )
    return SpecError(
        f"the curvature's smallest eigenvalue is {lowest:.3g}, which lambda = {damping:.3g} does "
        f"not make positive: {cure}, or --damping {enough:g} or more"
    )


def _dot(a_P: Tensor, b_P: Tensor) -> Tensor:
    # In float64, since step lengths are quotients of these sums and P is large; in pieces, since
    # P numbers in float64 are large too.
    pieces = zip(torch.split(a_P, DOT_PIECE), torch.split(b_P, DOT_PIECE), strict=True)
    return torch.stack([(a.double() * b.double()).sum() for a, b in pieces]).sum()
