"""Relative influence (RelatIF): influence per unit of the effect that a sample has at all.

Plain influence ranks the same few outliers and mislabelled samples first for every query; these forms do not.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from influence_jobs.errors import ModelError


def relative_scores(
    scores_QB: npt.NDArray[np.floating[Any]], squared_sizes_B: npt.NDArray[np.floating[Any]]
) -> npt.NDArray[np.float32]:
    """Divide influence by the size of each sample's effect.

    Barshan, Brunet, Dziugaite: "RelatIF: Identifying Explanatory Training Examples via Relative Influence",
    AISTATS 2020. With g the gradient of a sample's loss and H the damped curvature its two forms differ in the
    squared size: theta-relative  g^T H^-2 g = ||H^-1 g||^2,  the effect on the parameters;  loss-relative
    g^T H^-1 g,  the effect on the training losses.

    Args:
        scores_QB: Influence.
        squared_sizes_B: Squared sizes; a sample with gradient zero has size zero, and keeps its score, zero.

    Returns:
        (Q, B).

    Raises:
        ModelError: A squared size is negative or not finite: the curvature is not positive definite.
    """
    if not (np.isfinite(squared_sizes_B).all() and (squared_sizes_B >= 0).all()):
        raise ModelError(
            "a sample's own influence is negative or not finite: the damped curvature is not positive "
            "definite, use --operator gauss-newton or a larger --damping"
        )
    sizes_B = np.sqrt(squared_sizes_B)
    return (scores_QB / np.where(sizes_B > 0, sizes_B, 1.0)).astype(np.float32)
