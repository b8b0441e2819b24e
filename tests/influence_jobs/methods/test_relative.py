import numpy as np
import pytest

from influence_jobs.errors import ModelError
from influence_jobs.methods.relative import relative_scores


def test_both_published_forms_against_dense_algebra() -> None:
    generator = np.random.default_rng(0)
    g_BP, v_QP = generator.normal(size=(6, 4)), generator.normal(size=(2, 4))
    root = generator.normal(size=(4, 4))
    inverse = np.linalg.inv(root @ root.T + np.eye(4))
    scores = v_QP @ inverse @ g_BP.T
    steps_BP = g_BP @ inverse
    theta = relative_scores(scores, np.sum(steps_BP**2, axis=1))
    loss = relative_scores(scores, np.einsum("bp,bp->b", g_BP, steps_BP))
    assert theta.dtype == np.float64  # as the scores
    assert relative_scores(np.ones((1, 1), np.float32), np.ones(1)).dtype == np.float32
    for q in range(2):
        for i in range(6):
            score = v_QP[q] @ inverse @ g_BP[i]
            assert theta[q, i] == pytest.approx(score / np.linalg.norm(inverse @ g_BP[i]), rel=1e-5)
            assert loss[q, i] == pytest.approx(
                score / np.sqrt(g_BP[i] @ inverse @ g_BP[i]), rel=1e-5
            )
    # Neither depends on the length of a sample's gradient.
    twice = relative_scores(2 * scores, 4 * np.sum(steps_BP**2, axis=1))
    np.testing.assert_allclose(twice, theta, rtol=1e-6)


def test_a_sample_without_gradient_scores_zero() -> None:
    assert relative_scores(np.array([[0.0, 3.0]]), np.array([0.0, 4.0])).tolist() == [[0.0, 1.5]]


@pytest.mark.parametrize("bad", [-1e-3, np.nan, np.inf])
def test_squared_sizes_that_are_negative_or_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ModelError, match="not positive definite"):
        relative_scores(np.ones((1, 2)), np.array([1.0, bad]))


def test_a_size_that_vanishes_where_a_score_does_not_is_refused() -> None:
    with pytest.raises(ModelError, match="use --precision float64"):
        relative_scores(np.array([[0.0, 3.0], [1e-30, 3.0]]), np.array([0.0, 4.0]))
