"""Eigenvalues and trace of a curvature, estimated on some samples, for the choice of settings."""

import math

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from influence_jobs.curvature.operators import Operator
from influence_jobs.errors import RuntimeFault
from influence_jobs.tasks.placement import device_of
from influence_jobs.transfers import numbers, on_cpu, on_device

SAMPLES = 256  # settings need one digit only, and products of a large network are expensive
MAX_ITERATIONS = 20
TOLERANCE = 0.03


def largest_eigenvalue(operator: Operator) -> float:
    """The eigenvalue of largest magnitude, by power iteration; the same at every call."""
    return leading_eigenpair(operator)[0]


def leading_eigenpair(operator: Operator) -> tuple[float, Tensor]:
    """The eigenvalue of largest magnitude and its eigenvector (P,), of length one."""
    part = some_samples(operator)
    vector_1P = _normal(operator, 1)
    vector_1P /= vector_1P.norm()
    value = 0.0
    for _ in range(MAX_ITERATIONS):
        product_1P = part.unchecked(vector_1P)
        before = value
        value, length = numbers([(product_1P * vector_1P).sum(), product_1P.norm()])
        if not math.isfinite(length):
            _ = part @ vector_1P  # refuses the samples by name
        if length == 0:
            break
        vector_1P = product_1P / length
        if abs(value - before) <= TOLERANCE * abs(value):
            break
    return value, vector_1P[0]


def trace(operator: Operator, probes: int = 16) -> float:
    """The trace by Hutchinson's estimator: the mean of u^T A u over vectors u of random signs.

    Hutchinson: "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
    splines", 1989.
    """
    signs_KP, part = _normal(operator, probes).sign(), some_samples(operator)
    found = float((signs_KP * part.unchecked(signs_KP)).sum(dim=1).mean())
    if not math.isfinite(found):
        _ = part @ signs_KP  # refuses the samples by name
    return found


def smallest_eigenvalue(operator: Operator) -> float:
    """The smallest eigenvalue, by Lanczos iteration; negative for an indefinite matrix."""
    return _lowest(some_samples(operator), tolerance=TOLERANCE, restarts=10 * MAX_ITERATIONS)[0]


def sufficient_damping(operator: Operator) -> tuple[float, float]:
    """The smallest eigenvalue over all samples, and a lambda that makes A + lambda I positive.

    Lanczos iteration finds an eigenvalue within the residual's length of its own. The lambda has
    this and a tenth as a margin, and two digits.
    """
    value, vector_P = _lowest(operator, tolerance=0.01, restarts=MAX_ITERATIONS)
    residual = float((operator @ vector_P[None] - value * vector_P).norm())
    least = max(0.0, (residual - value) * 1.1)
    digits = 1 - math.floor(math.log10(least)) if least > 0 else 0
    return value, math.ceil(least * 10.0**digits) / 10.0**digits


def _lowest(operator: Operator, *, tolerance: float, restarts: int) -> tuple[float, Tensor]:
    """The smallest eigenvalue of an operator and its eigenvector (P,)."""
    like = next(operator.model.parameters())

    def multiply(vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        v_1P = on_device(torch.from_numpy(vector.reshape(1, -1)).to(like.dtype), like.device)
        found = on_cpu({0: operator.unchecked(v_1P)[0]})[0]
        if not found.isfinite().all():
            _ = operator @ v_1P  # refuses the samples by name
        product_P: npt.NDArray[np.float64] = found.double().numpy()
        return product_P

    shape = (operator.size, operator.size)
    if operator.size == 1:
        return float(multiply(np.ones(1))[0]), torch.ones(1).to(like)
    start = _normal(operator, 1).cpu().double().numpy()[0]
    try:
        values, vectors = eigsh(
            LinearOperator(shape, matvec=multiply, dtype=np.float64),
            k=1,
            which="SA",
            v0=start,
            tol=tolerance,
            maxiter=restarts,
        )
    except ArpackNoConvergence as error:
        if not len(error.eigenvalues):
            raise RuntimeFault(
                "the smallest eigenvalue of the Hessian could not be found: "
                "use --operator gauss-newton"
            ) from None
        values, vectors = error.eigenvalues, error.eigenvectors
    return float(values[0]), torch.from_numpy(vectors[:, 0].copy()).to(like)


def some_samples(operator: Operator) -> Operator:
    """The operator of a fixed random subset of the samples, with its work counted separately."""
    count = min(SAMPLES, operator.num_samples)
    chosen = torch.randperm(operator.num_samples, generator=torch.Generator().manual_seed(0))
    return operator.over(operator.ids[chosen[:count].sort().values])


def _normal(operator: Operator, count: int) -> Tensor:
    """Fixed random vectors (count, P), so that every shard finds the same settings."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(count, operator.size, generator=generator)
    dtype = next(operator.model.parameters()).dtype
    return on_device(vectors.to(dtype), device_of(operator.model))
