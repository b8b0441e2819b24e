import numpy as np
import pytest
import torch

from influence_jobs.errors import SpecError
from influence_jobs.methods.baselines import (
    nearest_scores,
    own_scores,
    query_pixels,
    random_scores,
)


def test_random_scores_depend_on_seed_query_and_sample_alone() -> None:
    queries, samples = np.array([3, 0, 9999]), np.arange(101)
    scores = random_scores(queries, samples, seed=1)
    assert scores.shape == (3, 101)
    assert scores.dtype == np.float32
    for row, query in enumerate(queries):
        for sample in (0, 3, 4, 5, 57, 100):
            alone = random_scores(np.array([query]), np.array([sample]), seed=1)
            assert alone[0, 0] == scores[row, sample]
    order = np.array([100, 7, 50])
    assert np.array_equal(random_scores(queries[::-1], order, seed=1), scores[::-1, order])
    assert not np.isin(random_scores(queries, samples, seed=2), scores).any()
    assert random_scores(queries, samples[:0], seed=1).shape == (3, 0)


def test_random_scores_are_uniform_and_independent() -> None:
    scores = random_scores(np.arange(4), np.arange(60_000), seed=0).astype(np.float64)
    assert scores.min() >= 0
    assert scores.max() < 1
    np.testing.assert_allclose(scores.mean(axis=1), 0.5, atol=0.01)
    np.testing.assert_allclose(scores.var(axis=1), 1 / 12, atol=0.003)
    neighbours = np.stack((*scores[:, :-1], *scores[:, 1:]))
    assert np.abs(np.corrcoef(neighbours) - np.eye(8)).max() < 0.03


def test_random_scores_are_a_plain_philox_stream() -> None:
    """Stored results depend on the stream."""
    stream = np.random.Philox(
        key=np.array([5, 3520], dtype=np.uint64), counter=np.array([0, 0, 1, 0], dtype=np.uint64)
    )
    expected = stream.random_raw(20) / 2.0**64
    found = random_scores(np.array([3520]), np.arange(20), seed=5)[0]
    np.testing.assert_allclose(found, expected, atol=2.0**-24)


def test_random_scores_share_no_word_with_the_noise_of_sample_0() -> None:
    """Both use the seed as key. The noise counter's highest word is the id, the others are 0."""
    noise = np.random.Philox(key=np.array([5, 3520], dtype=np.uint64)).random_raw(40)
    numbers = (noise >> np.uint64(40)) * 2.0**-24
    assert not np.isin(random_scores(np.array([3520]), np.arange(20), seed=5), numbers).any()


def test_own_scores_are_the_same_for_every_query() -> None:
    losses = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    assert own_scores(losses, 2).tolist() == [[0.5, 2.0, 0.0]] * 2
    assert own_scores(losses, 2).dtype == torch.float32


def test_nearest_scores_in_loops() -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (9, 300), dtype=np.uint8)
    queries = np.stack((pixels[4], generator.integers(0, 256, 300, dtype=np.uint8)))
    found = nearest_scores(queries, pixels)
    assert found.dtype == np.float32
    for q in range(2):
        for i in range(9):
            squares = [(int(a) - int(b)) ** 2 for a, b in zip(queries[q], pixels[i], strict=True)]
            assert found[q, i] == pytest.approx(-(sum(squares) ** 0.5), rel=1e-6)
    assert found[0, 4] == 0
    order = np.array([8, 4, 0])
    np.testing.assert_allclose(nearest_scores(queries, pixels[order]), found[:, order], rtol=1e-6)


@pytest.mark.parametrize(
    ("region", "corner"),
    [
        ((10, 12, 1, 1), (8, 9)),  # the point is at row 2, column 3 of 4 x 6
        ((10, 12, 4, 2), (10, 10)),
        ((0, 0, 1, 1), (0, 0)),
        ((29, 39, 1, 1), (26, 34)),
        ((0, 0, 30, 40), (13, 17)),
        (None, (13, 17)),
    ],
)
def test_the_query_is_cut_around_the_regions_centre(
    region: tuple[int, int, int, int] | None, corner: tuple[int, int]
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    y, x = corner
    expected = picture[y : y + 4, x : x + 6].ravel()
    assert np.array_equal(query_pixels(picture, region, (4, 6, 3)), expected)


def test_a_picture_of_the_training_pictures_size_is_taken_whole() -> None:
    picture = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert query_pixels(picture, None, (3, 4)).tolist() == list(range(12))


@pytest.mark.parametrize("shape", [(31, 4, 3), (4, 41, 3), (4, 4)])
def test_pictures_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match="cannot be compared"):
        query_pixels(np.zeros((30, 40, 3), dtype=np.uint8), None, shape)
