"""SOURCE: influence through training, cut into segments of constant curvature.

Bae, Lin, Lorraine, Grosse: "Training Data Attribution via Approximate Unrolled Differentiation",
2024. In a segment the steps of SGD are gradient flow of the time t (the sum of the learning rates,
divided by 1 - momentum) with one curvature A, the mean over the segment's checkpoints, weight decay
included. A query's gradient v at the end of the segment becomes exp(-t A) v at its begin, and meets
the gradient of a sample, its mean over the checkpoints, as (1 - exp(-t A)) / A v (equation 16).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from influence_jobs.curvature.ek_fac import EkFac
from influence_jobs.curvature.ek_fac_factors import coarse_lines
from influence_jobs.curvature.matrices import GaussNewton
from influence_jobs.curvature.solver import Progress, Trial, no_progress, require_finite
from influence_jobs.errors import SpecError
from influence_jobs.transfers import numbers, on_device

Exponential = Literal["ek-fac", "chebyshev"]

TOLERANCE = 1e-5  # of the series, as a part of its largest value
MOST_DEGREE = 2**14
LANCZOS_STEPS = 12

Spectral = Callable[[Tensor], Tensor]  # a function of eigenvalues


@dataclass(frozen=True)
class Segment:
    """A stretch of training.

    Attributes:
        operators: The Gauss-Newton matrices of the same samples at its checkpoints.
        time: Of gradient flow.
        decay: Weight decay, which is curvature in every direction.
    """

    operators: Sequence[GaussNewton]
    time: float
    decay: float = 0.0

    def met(self, values: Tensor) -> Tensor:
        """(1 - exp(-t s)) / s of eigenvalues, weight decay added to each."""
        x = self.time * (values + self.decay)
        # Below, 1 - x / 2 is exact to rounding; above, nothing cancels.
        return self.time * torch.where(x.abs() < 1e-8, 1 - x / 2, -torch.expm1(-x) / x)

    def kept(self, values: Tensor) -> Tensor:
        """exp(-t s) of eigenvalues, weight decay added to each."""
        return torch.exp(-self.time * (values + self.decay))


@dataclass(frozen=True)
class SegmentSolution:
    """What the queries are in a segment.

    Attributes:
        x_QP: (1 - exp(-t A)) / A v for the rows v at the segment's end.
        products: Products with all samples for each row; 0 for EK-FAC.
        messages: What a user may want to know, a line each.
    """

    x_QP: Tensor
    products: int
    messages: Sequence[str] = ()


class Source:
    """Carries queries back through the segments of a training.

    Args:
        exponential: `ek-fac`: functions of A are taken in the eigenbasis of EK-FAC, fitted to all
            checkpoints of a segment together. `chebyshev`: by a Chebyshev series of products with
            A, which is exact up to `TOLERANCE` and takes about sqrt(10 t M) products for each
            query, M the largest eigenvalue.
        seed: Seed of EK-FAC's random roots.
    """

    def __init__(self, exponential: Exponential = "ek-fac", seed: int = 0):
        self.exponential, self.seed = exponential, seed

    def solve(
        self,
        segments: Iterable[Segment],
        rhs_QP: Tensor,
        progress: Progress = no_progress,
    ) -> Iterator[SegmentSolution]:
        """What the queries are in each segment, from the last segment to the first.

        Args:
            segments: The last first.
            rhs_QP: Gradients of the queries at the end of training.
            progress: Called with the fraction done of each segment.

        Raises:
            DataError, ModelError, SpecError, RuntimeFault: As `Solver.solve`.
        """
        require_finite(rhs_QP)
        v_QP = rhs_QP
        for segment in segments:
            functions: _Functions = (
                _EkFacFunctions(segment, self.seed, progress)
                if self.exponential == "ek-fac"
                else _Series(segment, progress)
            )
            x_QP, v_QP = functions.times(v_QP)
            yield SegmentSolution(x_QP, functions.products, functions.messages)

    def trial(self, segments: Sequence[tuple[Segment, int]], rhs_QP: Tensor) -> Trial:
        """Begin the work for right-hand sides like these, for measuring.

        Args:
            segments: Each with one of its matrices, and the number that it has.

        Raises:
            SpecError: As `solve`.
        """
        fits = sum(count for _, count in segments)
        operator = segments[0][0].operators[0]
        said = f"{fits} checkpoints in {len(segments)} segments"
        if self.exponential == "ek-fac":
            one = EkFac(seed=self.seed).trial(operator, rhs_QP, 1)
            pieces = (fraction / fits for fraction in one.pieces)
            return Trial((f"{said}, each with {one.said[0]}",), pieces)
        products = sum(
            _Series(segment, no_progress).products * count for segment, count in segments
        )

        def measured() -> Iterator[float]:
            while True:
                for ids in torch.split(operator.ids, operator.batch_size):
                    operator.product(rhs_QP, ids)
                    yield len(ids) / (operator.num_samples * products)

        return Trial((f"{said}, {products:,} products over the samples",), measured())


class _Functions(ABC):
    """The two functions of a segment's curvature."""

    products = 0
    messages: Sequence[str] = ()

    @abstractmethod
    def times(self, v_QP: Tensor) -> tuple[Tensor, Tensor]:
        """`Segment.met` and `Segment.kept` of the curvature, times every row."""


class _EkFacFunctions(_Functions):
    def __init__(self, segment: Segment, seed: int, progress: Progress):
        self._segment = segment
        self._factors = EkFac(seed=seed).factors_of(segment.operators, progress)
        self.messages = coarse_lines(self._factors.coarse)

    def times(self, v_QP: Tensor) -> tuple[Tensor, Tensor]:
        space = self._segment.operators[0].space
        met, kept = (
            self._factors.times(space, v_QP, function)
            for function in (self._segment.met, self._segment.kept)
        )
        return met, kept


class _Series(_Functions):
    """By Chebyshev polynomials of products, on an interval that holds all eigenvalues."""

    def __init__(self, segment: Segment, progress: Progress):
        self._segment, self._progress = segment, progress
        for operator in segment.operators:
            operator.require_finite()
        self._top = _upper_bound(segment.operators)
        self._met_K, self._kept_K = series_of(segment, self._top)
        self.products = len(self._met_K) - 1

    def times(self, v_QP: Tensor) -> tuple[Tensor, Tensor]:
        met_QP, kept_QP = self._met_K[0] * v_QP, self._kept_K[0] * v_QP
        before_QP, now_QP = torch.zeros_like(v_QP), v_QP
        for k in range(1, len(self._met_K)):
            # T_1 = y, T_k+1 = 2 y T_k - T_k-1, with y from -1 to 1 for eigenvalues 0 to the top.
            ahead_QP = _product(self._segment.operators, now_QP) * (2 / self._top) - now_QP
            ahead_QP = ahead_QP if k == 1 else 2 * ahead_QP - before_QP
            before_QP, now_QP = now_QP, ahead_QP
            met_QP.add_(now_QP, alpha=self._met_K[k])
            kept_QP.add_(now_QP, alpha=self._kept_K[k])
            self._progress(k / self.products)
        return met_QP, kept_QP


def series_of(segment: Segment, top: float) -> tuple[list[float], list[float]]:
    """Coefficients of `Segment.met` and `Segment.kept` for eigenvalues 0 to `top`, alike long.

    Raises:
        SpecError: More products are needed than anyone waits for.
    """

    def on_interval(function: Spectral) -> Any:
        return lambda y: function(torch.from_numpy((y + 1) * top / 2)).numpy()

    degree = 16
    while degree <= MOST_DEGREE:
        both = [
            chebyshev.chebinterpolate(on_interval(function), degree)
            for function in (segment.met, segment.kept)
        ]
        scales = np.abs(both[0]).max(), 1.0  # what is kept is a part of what there was
        large = [
            (np.abs(series) > TOLERANCE * scale).nonzero()[0]
            for series, scale in zip(both, scales, strict=True)
        ]
        needed = 1 + int(max(np.concatenate(large), default=0))
        if needed < degree // 2:
            met, kept = (series[:needed].tolist() for series in both)
            return met, kept
        degree *= 2
    raise SpecError(
        f"--exponential chebyshev needs more than {MOST_DEGREE // 2:,} products with all samples "
        "here, because learning rate x steps x the largest eigenvalue is "
        f"{segment.time * top:.3g}: use --exponential ek-fac"
    )


def _product(operators: Sequence[GaussNewton], v_QP: Tensor, *, checked: bool = True) -> Tensor:
    """The mean of several matrices times every row."""
    total_QP = torch.zeros_like(v_QP)
    for operator in operators:
        total_QP += (operator @ v_QP if checked else operator.unchecked(v_QP)) / len(operators)
    return total_QP


def _upper_bound(operators: Sequence[GaussNewton]) -> float:
    """An upper bound of the eigenvalues, by a few steps of Lanczos iteration.

    The largest Ritz value and the length of the last residual (Zhou and Li: "Bounding the spectrum
    of large Hermitian matrices", 2011).
    """
    generator, size = torch.Generator().manual_seed(0), operators[0].size
    like = next(iter(operators[0].space.parameters().values()))
    v_1P = torch.randn(1, size, generator=generator, dtype=torch.float64).to(like.dtype)
    v_1P = on_device(v_1P, like.device)
    basis = [v_1P / v_1P.norm()]
    diagonal, beside = list[float](), list[float]()
    for _ in range(min(LANCZOS_STEPS, size)):
        w_1P = _product(operators, basis[-1], checked=False)
        along = (w_1P * basis[-1]).sum()
        for q_1P in (*basis, *basis):  # twice, as rounding leaves a part
            w_1P = w_1P - (w_1P * q_1P).sum() * q_1P
        found = numbers([along, w_1P.norm()])  # the one look at the device
        if not all(map(math.isfinite, found)):
            _product(operators, basis[-1])  # refuses the samples by name
        diagonal.append(found[0])
        beside.append(found[1])
        if beside[-1] <= 1e-6 * max(map(abs, diagonal)):
            break
        basis.append(w_1P / beside[-1])
    ritz = np.linalg.eigvalsh(
        np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1)
    )
    bound = float(ritz[-1]) + beside[-1]
    # A curvature of zero has any interval.
    return max(1.01 * bound, math.ulp(1.0))
