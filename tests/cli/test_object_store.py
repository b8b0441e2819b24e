"""What a user sees of an object store that cannot be used."""

from collections.abc import Callable
from typing import Any

import pytest

Infl = Callable[..., Any]

TRAIN = ("submit", "train", "--task", "digits:DigitsTask", "--epochs", 1, "--local")


@pytest.mark.parametrize("words", [("runs",), TRAIN, ("status", "train")])
def test_a_bucket_that_is_not_there_is_one_line(
    infl: Infl, bucket: str, words: tuple[object, ...]
) -> None:
    found = infl(*words, "--runs", f"{bucket}-nosuch/x")
    assert found.code == 2
    (line,) = [line for line in found.err.splitlines() if line.startswith("error: ")]
    assert "NoSuchBucket" in line
    assert "check the bucket's name, AWS_REGION, AWS_ENDPOINT_URL and the credentials" in line
