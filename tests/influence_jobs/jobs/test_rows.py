"""Checks of a shard: what is told of several things that do not hold."""

import pytest
import torch

from influence_jobs.errors import DataError, ModelError
from influence_jobs.jobs.base import Shard
from influence_jobs.jobs.rows import Checks


def refuse_samples(what: str, ids: torch.Tensor) -> None:
    raise DataError(f"{what} of {ids.tolist()}")


def refuse() -> None:
    raise ModelError("another reason")


@pytest.mark.parametrize(
    ("name", "told"), [("sizes 0", "loss of \\[11, 13\\]"), ("range", "another reason")]
)
def test_a_number_that_is_not_finite_is_told_before_what_follows_from_it(name, told) -> None:
    """But for the range of float32: beyond it numbers are computed anew."""
    checks = Checks(Shard("s", 10, 15), refuse_samples)
    checks.right(name, torch.tensor(False), refuse)
    checks.finite("loss", torch.tensor([1.0, torch.nan, 2, torch.inf]), torch.arange(10, 14))
    with pytest.raises((DataError, ModelError), match=told):
        checks.look()


def test_samples_in_any_order_are_named_by_their_ids() -> None:
    checks = Checks(Shard("s", 10, 15), refuse_samples)
    checks.finite("loss", torch.tensor([1.0, torch.nan]), torch.tensor([14, 10]))
    with pytest.raises(DataError, match="loss of \\[10\\]"):
        checks.look()
