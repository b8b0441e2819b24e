"""The few numbers of a curvature that settings are chosen by, measured on some of its samples."""

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from influence_jobs.curvature.operators import Operator
from influence_jobs.errors import RuntimeFault
from influence_jobs.tasks.base import device_of

SAMPLES = 256  # settings need one digit; on a large network every product is dear
MAX_ITERATIONS = 20
TOLERANCE = 0.03


def largest_eigenvalue(operator: Operator) -> float:
    """Largest eigenvalue by magnitude, by power iteration on some samples; the same number at every call."""
    return leading_eigenpair(operator)[0]


def leading_eigenpair(operator: Operator) -> tuple[float, Tensor]:
    """Largest eigenvalue by magnitude and its vector (P,), of length one."""
    part = some_samples(operator)
    vector_1P = _normal(operator, 1)
    vector_1P /= vector_1P.norm()
    value = 0.0
    for _ in range(MAX_ITERATIONS):
        product_1P = part @ vector_1P
        before, value = value, float((product_1P * vector_1P).sum())
        length = float(product_1P.norm())
        if length == 0:
            break
        vector_1P = product_1P / length
        if abs(value - before) <= TOLERANCE * abs(value):
            break
    return value, vector_1P[0]


def trace(operator: Operator, probes: int = 16) -> float:
    """Trace by Hutchinson's estimator on some samples: the mean of u^T A u over random signs u.

    Hutchinson: "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines", 1989.
    """
    signs_KP = _normal(operator, probes).sign()
    return float((signs_KP * (some_samples(operator) @ signs_KP)).sum(dim=1).mean())


def smallest_eigenvalue(operator: Operator) -> float:
    """Smallest eigenvalue, by Lanczos iteration on some samples; how far below zero an indefinite matrix reaches."""
    part = some_samples(operator)
    like = next(operator.model.parameters())

    def multiply(vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        v_1P = torch.from_numpy(vector.reshape(1, -1)).to(like.device, like.dtype)
        product_P: npt.NDArray[np.float64] = (part @ v_1P)[0].cpu().double().numpy()
        return product_P

    shape = (operator.size, operator.size)
    if operator.size == 1:
        return float(multiply(np.ones(1))[0])
    start = _normal(operator, 1).cpu().double().numpy()[0]
    try:
        values = eigsh(
            LinearOperator(shape, matvec=multiply, dtype=np.float64),
            k=1,
            which="SA",
            v0=start,
            tol=TOLERANCE,
            maxiter=10 * MAX_ITERATIONS,
            return_eigenvectors=False,
        )
    except ArpackNoConvergence as error:
        if not len(error.eigenvalues):
            raise RuntimeFault(
                "the smallest eigenvalue of the Hessian could not be found: use --operator gauss-newton"
            ) from None
        values = error.eigenvalues
    return float(values[0])


def some_samples(operator: Operator) -> Operator:
    """The operator of a fixed random subset of its samples, its work counted apart."""
    count = min(SAMPLES, operator.num_samples)
    chosen = torch.randperm(operator.num_samples, generator=torch.Generator().manual_seed(0))
    return operator.over(operator.ids[chosen[:count].sort().values])


def _normal(operator: Operator, count: int) -> Tensor:
    """Fixed random vectors (count, P): settings must not differ from shard to shard."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(count, operator.size, generator=generator)
    return vectors.to(device_of(operator.model), next(operator.model.parameters()).dtype)
