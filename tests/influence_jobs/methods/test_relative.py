import numpy as np
import pytest
import torch
from torch import Tensor

from influence_jobs.errors import ModelError
from influence_jobs.methods.relative import refuse_sizes, relative_scores


def divided(scores: Tensor, squared_sizes: Tensor) -> Tensor:
    """The relative scores, which must be right."""
    found, right = relative_scores(scores, squared_sizes)
    assert right.all()
    return found


def test_both_published_forms_against_dense_algebra() -> None:
    generator = np.random.default_rng(0)
    g_BP, v_QP = generator.normal(size=(6, 4)), generator.normal(size=(2, 4))
    root = generator.normal(size=(4, 4))
    inverse = np.linalg.inv(root @ root.T + np.eye(4))
    scores = torch.from_numpy(v_QP @ inverse @ g_BP.T)
    steps_BP = g_BP @ inverse
    squares_B = torch.from_numpy(np.sum(steps_BP**2, axis=1))
    theta = divided(scores, squares_B)
    loss = divided(scores, torch.from_numpy(np.einsum("bp,bp->b", g_BP, steps_BP)))
    assert theta.dtype == torch.float64  # as the scores
    assert divided(torch.ones(1, 1), torch.ones(1).double()).dtype == torch.float32
    for q in range(2):
        for i in range(6):
            score = v_QP[q] @ inverse @ g_BP[i]
            assert float(theta[q, i]) == pytest.approx(
                score / np.linalg.norm(inverse @ g_BP[i]), rel=1e-5
            )
            assert float(loss[q, i]) == pytest.approx(
                score / np.sqrt(g_BP[i] @ inverse @ g_BP[i]), rel=1e-5
            )
    # Neither depends on the length of a sample's gradient.
    torch.testing.assert_close(divided(2 * scores, 4 * squares_B), theta, rtol=1e-6, atol=0)


def test_a_sample_without_gradient_scores_zero() -> None:
    scores = divided(torch.tensor([[0.0, 3.0]]), torch.tensor([0.0, 4.0]))
    assert scores.tolist() == [[0.0, 1.5]]


@pytest.mark.parametrize("bad", [-1e-3, np.nan, np.inf])
def test_squared_sizes_that_are_negative_or_not_finite_are_refused(bad: float) -> None:
    _, right = relative_scores(torch.ones(1, 2), torch.tensor([1.0, bad]))
    with pytest.raises(ModelError, match="not positive definite"):
        refuse_sizes(right.tolist())


def test_a_size_that_vanishes_where_a_score_does_not_is_refused() -> None:
    scores = torch.tensor([[0.0, 3.0], [1e-30, 3.0]])
    _, right = relative_scores(scores, torch.tensor([0.0, 4.0]))
    with pytest.raises(ModelError, match="use --precision float64"):
        refuse_sizes(right.tolist())
