"""Arrays with a number for each token of a sample."""

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from influence_jobs.errors import DataError

MEANING = "tokens are a sample's positions with a target, in their order; NaN behind the last"


def only_tokens(values: npt.NDArray[Any], counts_B: Tensor, tokens: int) -> npt.NDArray[Any]:
    """Values (..., B, T) of a batch as (..., B, tokens), with NaN where a sample has no token.

    Raises:
        DataError: A sample has more tokens than the arrays have room for: the data have changed.
    """
    if int(counts_B.max()) > tokens:
        raise DataError(
            f"a training sample has {int(counts_B.max())} tokens, and the longest had {tokens} "
            "when the run was submitted: submit it anew"
        )
    found = np.full((*values.shape[:-1], tokens), np.nan, dtype=values.dtype)
    kept = min(tokens, values.shape[-1])
    found[..., :kept] = values[..., :kept]
    found[..., np.arange(tokens) >= counts_B.cpu().numpy()[:, None]] = np.nan
    return found
