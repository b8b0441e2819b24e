"""Arrays with a number for each token of a sample."""

import torch
from torch import Tensor

from influence_jobs.errors import DataError

MEANING = "tokens are a sample's positions with a target, in their order; NaN behind the last"


def only_tokens(values: Tensor, counts_B: Tensor, tokens: int) -> Tensor:
    """Values (..., B, T) of a batch as (..., B, tokens), with NaN where a sample has no token.

    Raises:
        DataError: A sample has more tokens than the arrays have room for: the data have changed.
    """
    if (most := int(counts_B.max())) > tokens:
        raise DataError(
            f"a training sample has {most} tokens, and the longest had {tokens} when the run was "
            "submitted: submit it again"
        )
    found = values.new_full((*values.shape[:-1], tokens), torch.nan)
    kept = min(tokens, values.shape[-1])
    found[..., :kept] = values[..., :kept]
    behind_BT = torch.arange(tokens, device=counts_B.device) >= counts_B[:, None]
    return found.masked_fill(behind_BT, torch.nan)
