"""Relative influence (RelatIF): influence divided by the size of a sample's whole effect.

Plain influence ranks the same few outliers and mislabelled samples first for every query. Relative
influence does not.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from influence_jobs.errors import ModelError


def relative_scores(scores_QB: Tensor, squared_sizes_B: Tensor) -> tuple[Tensor, Tensor]:
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
        Scores of the shape and dtype of those given; and whether they are right, (2,): no squared
        size is negative or not finite, and none is zero where a score is not. `refuse_sizes` says
        what is wrong, and nothing here waits for a GPU.
    """
    sound = squared_sizes_B.isfinite().all() & (squared_sizes_B >= 0).all()
    scored_B = (scores_QB != 0).reshape(-1, len(squared_sizes_B)).any(0)
    seen = ~((squared_sizes_B == 0) & scored_B).any()
    sizes_B = squared_sizes_B.sqrt()
    divided = scores_QB / torch.where(sizes_B > 0, sizes_B, 1.0)
    return divided.to(scores_QB.dtype), torch.stack([sound, seen])


def refuse_sizes(right: Sequence[bool]) -> NoReturn:
    """Refuse relative scores that are not right.

    Raises:
        ModelError: A squared size is negative or not finite, as the damped curvature is not
            positive definite; or it is zero where a score is not.
    """
    if not right[0]:
        raise ModelError(
            "the influence of a sample on itself is negative or not finite, as the damped "
            "curvature is not positive definite: use --operator gauss-newton or a larger --damping"
        )
    raise ModelError(
        "a sample's gradient is so small that its square vanishes, so its score cannot be "
        "divided by its size: use --precision float64, or leave --relative out"
    )
