import pytest

from infl_cluster.retry import Decision, RetryPolicy
from influence_jobs.jobs.base import Receipt


def failed(kind, attempt=1):
    return Receipt("s", "failed", "why", kind, attempt)


@pytest.mark.parametrize(
    ("attempt", "decision"),
    [(1, Decision.RETRY), (2, Decision.RETRY), (3, Decision.GIVE_UP), (4, Decision.GIVE_UP)],
)
def test_transient_errors_are_tried_until_the_limit(attempt, decision):
    assert RetryPolicy(max_attempts=3).decide(failed("transient", attempt)) is decision


@pytest.mark.parametrize(
    ("attempt", "decision"), [(1, Decision.RETRY), (2, Decision.RETRY), (3, Decision.ABORT)]
)
def test_a_gpu_that_fails_everywhere_ends_the_run(attempt, decision):
    """A label out of range fails on every GPU, and at every shard that has one."""
    assert RetryPolicy(max_attempts=3).decide(failed("worker", attempt)) is decision


def test_one_attempt_means_no_retry():
    assert RetryPolicy(max_attempts=1).decide(failed("transient")) is Decision.GIVE_UP


def test_bad_data_is_not_tried_again():
    assert RetryPolicy().decide(failed("user")) is Decision.GIVE_UP


@pytest.mark.parametrize("attempt", [1, 9])
def test_a_fatal_error_ends_the_run(attempt):
    assert RetryPolicy().decide(failed("fatal", attempt)) is Decision.ABORT


def test_only_failures_are_decided():
    with pytest.raises(ValueError, match="not of a failure"):
        RetryPolicy().decide(Receipt("s", "done"))
