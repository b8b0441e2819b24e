"""Curvature of the training loss as a linear operator A, and solvers of (A + lambda I) x = v."""

from influence_jobs.curvature.cg import ConjugateGradient
from influence_jobs.curvature.ek_fac import EkFac
from influence_jobs.curvature.identity import Identity
from influence_jobs.curvature.lissa import Lissa
from influence_jobs.curvature.matrices import GaussNewton, Hessian
from influence_jobs.curvature.operators import Operator
from influence_jobs.curvature.solver import Solution, Solver, make_solver

__all__ = [
    "ConjugateGradient",
    "EkFac",
    "GaussNewton",
    "Hessian",
    "Identity",
    "Lissa",
    "Operator",
    "Solution",
    "Solver",
    "make_solver",
]
