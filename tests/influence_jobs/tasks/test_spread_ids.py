"""Ids from all over a data set."""

import pytest
import torch

from influence_jobs.tasks.base import spread_ids


@pytest.mark.parametrize("n", [1, 3, 16, 17, 60_000, 16_777_220, 20_000_000, 100_000_004])
def test_ids_go_from_the_first_to_the_last_and_not_beyond(n: int) -> None:
    ids = spread_ids(n, 16)
    assert len(ids) == min(n, 16)
    assert ids[0] == 0
    assert n - 8 < int(ids[-1]) < n or n < 16
    assert torch.equal(ids, ids.unique())
