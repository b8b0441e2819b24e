"""Scores from projected gradients against their formulas."""

import numpy as np
import pytest
import torch

from influence_jobs.errors import SpecError
from influence_jobs.methods.projected import margin_factors, preconditioned


def test_preconditioned_is_the_damped_solution() -> None:
    generator = np.random.default_rng(0)
    rows, queries = generator.standard_normal((20, 5)), generator.standard_normal((3, 5))
    gram = rows.T @ rows / 20
    damped = gram + 0.3 * np.trace(gram) / 5 * np.eye(5)
    expected = np.linalg.solve(damped, queries.T).T
    np.testing.assert_allclose(preconditioned(queries, gram, damping=0.3), expected, rtol=1e-10)


def test_a_singular_matrix_is_refused() -> None:
    with pytest.raises(SpecError, match="--damping above 0"):
        preconditioned(np.ones((1, 3)), np.diag([1.0, 0, 0]), damping=0.0)


def test_a_layer_without_gradients_scores_nothing() -> None:
    assert not preconditioned(np.ones((1, 3)), np.zeros((3, 3)), damping=0.1).any()


def test_the_factor_turns_gradients_of_the_loss_into_those_of_the_margin() -> None:
    scores = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 5, 2, 2])
    losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
    p = torch.softmax(scores, 1)[torch.arange(4), labels]
    margins = torch.log(p / (1 - p))
    (of_loss,) = torch.autograd.grad(losses.sum(), scores, retain_graph=True)
    (of_margin,) = torch.autograd.grad(margins.sum(), scores)
    factors = torch.from_numpy(margin_factors(losses.detach().numpy()))
    torch.testing.assert_close(-factors[:, None] * of_loss, of_margin)
