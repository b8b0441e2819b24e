"""The copied tables of the research report have the means that it prints."""

import pytest

from influence_jobs.tasks.published import MNIST

# The last rows of tables 4.1 to 4.3, in per cent.
MEANS = {
    "attribution": [62, 64, 55, 52, 57, 58, 51, 64, 62, 66],
    "helpful": [14, 7, 15, 12, 5, 8, 6, 9, 13, 24],
    "harmful": [25, 10, 15, 14, 5, 13, 16, 18, 8, 15],
}


@pytest.mark.parametrize("method", MEANS)
def test_the_copied_numbers_have_the_printed_means(method: str) -> None:
    shares = MNIST.stability[method]
    assert shares.shape == (5, len(MNIST.tests))
    assert (100 * shares.mean(axis=0)).round().tolist() == MEANS[method]
