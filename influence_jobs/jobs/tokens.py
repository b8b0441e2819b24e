"""Arrays with a number for each token of a sample."""

from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn

from influence_jobs.errors import DataError
from influence_jobs.jobs.rows import AnotherWayError, Checks
from influence_jobs.tasks.base import Batch, Task, spread_ids
from influence_jobs.tasks.lengths import LOOKED_AT
from influence_jobs.tasks.sequences import TokenLosses

MEANING = "tokens are a sample's positions with a target, in their order; NaN behind the last"


def only_tokens(values: Tensor, counts_B: Tensor, tokens: int) -> Tensor:
    """Values (..., B, T) of a batch as (..., B, tokens), with NaN where a sample has no token."""
    found = values.new_full((*values.shape[:-1], tokens), torch.nan)
    kept = min(tokens, values.shape[-1])
    found[..., :kept] = values[..., :kept]
    behind_BT = torch.arange(tokens, device=counts_B.device) >= counts_B[:, None]
    return found.masked_fill(behind_BT, torch.nan)


def watch_tokens(
    parts: TokenLosses, model: nn.Module, batch: Batch, tokens: int, checks: Checks
) -> Tensor:
    """The numbers of tokens (B,) of a batch, whose losses must be made of them as seen before.

    Args:
        parts: If they are not, it turns to another way, and the shard is computed again.
        tokens: The most that the arrays have room for.
        checks: Takes both.
    """
    counts_B, right = parts.unwatched(model, batch)
    checks.right("most tokens", counts_B.max() <= tokens, partial(_refuse_more, tokens))
    checks.right("form of tokens", right, partial(_turn, parts))
    return counts_B


def first_samples(task: Task, most: int) -> Tensor:
    """Ids of a few samples from all over, which show how losses are made of tokens."""
    n = len(task.train_data())
    return spread_ids(n, min(most, LOOKED_AT))


def _refuse_more(tokens: int) -> NoReturn:
    raise DataError(
        f"a training sample has more than {tokens} tokens, which the longest had when the run was "
        "submitted: submit it again"
    )


def _turn(parts: TokenLosses) -> NoReturn:
    parts.turn()
    raise AnotherWayError
