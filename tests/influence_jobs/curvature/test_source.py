"""SOURCE's functions of the curvature, compared with dense float64 matrices."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from influence_jobs.curvature import GaussNewton
from influence_jobs.curvature.source import Segment, Source, series_of
from influence_jobs.errors import DataError, SpecError
from influence_jobs.gradients.parameters import ParameterSpace

from .conftest import Case, N, Values, randoms

DECAY = 0.01


def moved(case: Case, seed: int, size: float = 0.3) -> Case:
    """The same model with other weights, as at another checkpoint."""
    model = copy.deepcopy(case.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=size)
    return Case(case.task, model)


def functions(matrix: Any, time: float, decay: float = DECAY) -> tuple[Tensor, Tensor]:
    """(1 - exp(-t A)) / A and exp(-t A), with weight decay in A."""
    values, vectors = torch.linalg.eigh(matrix + decay * torch.eye(len(matrix)).to(matrix))
    kept = torch.exp(-time * values)
    return vectors @ torch.diag((1 - kept) / values) @ vectors.T, vectors @ torch.diag(
        kept
    ) @ vectors.T


@pytest.mark.parametrize("time", [0.1, 3.0, 200.0])
def test_products_alone_are_the_formula(case: Case, time: float) -> None:
    early, late = [moved(case, 1)], [moved(case, 2), moved(case, 3)]
    v_QP = randoms(3, case.space.size)
    segments = [
        Segment([one.gauss_newton() for one in cases], t, DECAY)
        for cases, t in ((late, time), (early, 2 * time))
    ]
    last, first = Source("chebyshev").solve(segments, v_QP)
    met, kept = functions(torch.stack([c.dense_gauss_newton() for c in late]).mean(0), time)
    torch.testing.assert_close(last.x_QP, v_QP @ met, rtol=0, atol=1e-4 * float(met.norm()))
    met, _ = functions(early[0].dense_gauss_newton(), 2 * time)
    expected = v_QP @ kept @ met
    torch.testing.assert_close(first.x_QP, expected, rtol=0, atol=1e-4 * float(met.norm()))
    assert 1 < last.products < 200


@pytest.mark.parametrize("case", [Values], indirect=True)
def test_ek_fac_is_the_formula_where_factors_are_exact(case: Case) -> None:
    """Of a last layer with squared errors the mean over checkpoints is a Kronecker product too."""
    cases = [moved(case, 1), moved(case, 2)]
    operators, dense = [], []
    for one in cases:
        space = ParameterSpace(one.model, ["head"])
        operators.append(GaussNewton(one.model, space, one.task, torch.arange(N)))
        dense.append(one.dense_gauss_newton()[-space.size :, -space.size :])
    v_QP = randoms(2, operators[0].size)
    (found,) = Source().solve([Segment(operators, 5.0, DECAY)], v_QP)
    met, _ = functions(torch.stack(dense).mean(0), 5.0)
    torch.testing.assert_close(found.x_QP, v_QP @ met, rtol=1e-5, atol=1e-7)
    (series,) = Source("chebyshev").solve([Segment(operators, 5.0, DECAY)], v_QP)
    assert torch.cosine_similarity(series.x_QP, found.x_QP).min() > 0.9999


@pytest.mark.parametrize("exponential", ["ek-fac", "chebyshev"])
def test_a_segment_cut_in_two_is_the_same(case: Case, exponential: Any) -> None:
    v_QP = randoms(2, case.space.size)
    operators = [case.gauss_newton()]
    source = Source(exponential)
    (whole,) = source.solve([Segment(operators, 4.0, DECAY)], v_QP)
    parts = source.solve([Segment(operators, 3.0, DECAY), Segment(operators, 1.0, DECAY)], v_QP)
    total = sum(part.x_QP for part in parts)
    assert isinstance(total, Tensor)
    error = (total - whole.x_QP).norm(dim=1) / whole.x_QP.norm(dim=1)
    assert error.max() < 1e-4


def test_a_long_segment_is_the_inverse_and_a_short_one_no_curvature(case: Case) -> None:
    v_QP = randoms(2, case.space.size)
    (long,) = Source("chebyshev").solve([Segment([case.gauss_newton()], 100.0, 0.3)], v_QP)
    dense = case.dense_gauss_newton()
    inverse = torch.linalg.inv(dense + 0.3 * torch.eye(len(dense), dtype=torch.float64))
    torch.testing.assert_close(long.x_QP, v_QP @ inverse, rtol=1e-3, atol=1e-4)
    (short,) = Source().solve([Segment([case.gauss_newton()], 1e-6)], v_QP)
    torch.testing.assert_close(short.x_QP, 1e-6 * v_QP, rtol=1e-4, atol=0)


def test_eigenvalues_of_zero_are_met_for_the_whole_time() -> None:
    segment = Segment([], 7.0)
    values = torch.tensor([0.0, 1e-12, 1e-3, 10.0])
    expected = torch.tensor([7.0, 7.0, (1 - math.exp(-7e-3)) / 1e-3, 0.1])
    torch.testing.assert_close(segment.met(values), expected)


def test_a_series_beyond_all_patience_is_refused(case: Case) -> None:
    with pytest.raises(SpecError, match="use --exponential ek-fac"):
        series_of(Segment([], 1e9), 10.0)
    with pytest.raises(DataError, match="the gradient of query 0 is not finite"):
        [*Source().solve([], torch.full((1, 3), torch.nan))]
