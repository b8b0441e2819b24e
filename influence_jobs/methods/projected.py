"""Scores from projected gradients alone."""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import linalg

from influence_jobs.errors import SpecError

# Below it 1 - p is rounding, and so is the gradient.
SMALLEST_MISS = 1e-6


def margin_factors(losses_B: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What turns a gradient of the cross-entropy into one of minus the margin: 1 / (1 - p).

    The margin is log(p / (1 - p)), with p = exp(-loss) of the right class (Park et al.: "TRAK:
    Attributing Model Behavior at Scale", ICML 2023).
    """
    missed_B = -np.expm1(-losses_B)
    return np.asarray(1 / np.maximum(missed_B, SMALLEST_MISS))


def preconditioned(
    queries_QD: npt.NDArray[np.floating[Any]],
    gram_DD: npt.NDArray[np.floating[Any]],
    *,
    damping: float,
) -> npt.NDArray[np.float64]:
    """(G + lambda I)^-1 q of each query q, with lambda a part of G's mean eigenvalue.

    Args:
        gram_DD: G, the mean of g g^T.
        damping: That part.

    Raises:
        SpecError: G is singular but for the damping, which is 0.
    """
    if not np.any(gram_DD):  # no sample has a gradient here, so no score depends on it
        return np.zeros(queries_QD.shape)
    factor = damped_root(gram_DD, damping=damping), True
    return np.asarray(linalg.cho_solve(factor, queries_QD.T.astype(np.float64)).T)


def damped_root(
    gram_DD: npt.NDArray[np.floating[Any]], *, damping: float
) -> npt.NDArray[np.float64]:
    """L of L L^T = G + lambda I, lower triangular; I if G is 0, as then all gradients are.

    Args:
        gram_DD: G, the mean of g g^T.
        damping: Lambda, as a part of G's mean eigenvalue.

    Raises:
        SpecError: G is singular but for the damping, which is 0.
    """
    gram_DD = np.asarray(gram_DD, dtype=np.float64)
    if not gram_DD.any():
        return np.eye(len(gram_DD))
    damped_DD = gram_DD + damping * np.trace(gram_DD) / len(gram_DD) * np.eye(len(gram_DD))
    try:
        return np.asarray(linalg.cholesky(damped_DD, lower=True))
    except linalg.LinAlgError as error:
        raise SpecError(
            "the second moments of the projected gradients are singular: there are fewer samples "
            "than numbers, or gradients are zero; give a --damping above 0"
        ) from error
