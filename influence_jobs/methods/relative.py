"""Relative influence (RelatIF): influence divided by the size of a sample's whole effect.

Plain influence ranks the same few outliers and mislabelled samples first for every query. Relative
influence does not.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from influence_jobs.errors import ModelError


def relative_scores(
    scores_QB: npt.NDArray[np.floating[Any]], squared_sizes_B: npt.NDArray[np.floating[Any]]
) -> npt.NDArray[np.floating[Any]]:
    """Divide influence by the size of each sample's effect.

    There are two forms. Let g be the gradient of a sample's loss and H the damped curvature. The
    squared size is g^T H^-2 g = ||H^-1 g||^2 in theta-relative influence: the effect on the
    parameters. It is g^T H^-1 g in loss-relative influence: the effect on the training losses.

    Barshan, Brunet, Dziugaite: "RelatIF: Identifying Explanatory Training Examples via Relative
    Influence", AISTATS 2020.

    Args:
        scores_QB: Influence, (Q, B) or (Q, T, B).
        squared_sizes_B: Squared sizes. A sample with gradient zero has size zero; its score stays
            zero.

    Returns:
        Of the shape and dtype of the scores.

    Raises:
        ModelError: A squared size is negative or not finite, as the damped curvature is not
            positive definite; or it is zero where a score is not.
    """
    if not (np.isfinite(squared_sizes_B).all() and (squared_sizes_B >= 0).all()):
        raise ModelError(
            "the influence of a sample on itself is negative or not finite, as the damped "
            "curvature is not positive definite: use --operator gauss-newton or a larger --damping"
        )
    if ((squared_sizes_B == 0) & (scores_QB != 0).reshape(-1, len(squared_sizes_B)).any(0)).any():
        raise ModelError(
            "a sample's gradient is so small that its square vanishes, so its score cannot be "
            "divided by its size: use --precision float64, or leave --relative out"
        )
    sizes_B = np.sqrt(squared_sizes_B)
    return (scores_QB / np.where(sizes_B > 0, sizes_B, 1.0)).astype(scores_QB.dtype)
