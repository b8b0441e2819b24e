"""LiSSA: a stochastic recursion whose mean is the inverse, with settings chosen from the spectrum."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_jobs.curvature.lissa_steps import lissa_steps
from influence_jobs.curvature.operators import Operator
from influence_jobs.curvature.solver import (
    Progress,
    Solution,
    Solver,
    relative_residual,
)
from influence_jobs.curvature.spectrum import leading_eigenpair, smallest_eigenvalue, trace
from influence_jobs.errors import RuntimeFault, SpecError

TOLERANCE = 0.1  # relative standard error of a chain that chooses its own depth
BLOCKS = 8  # averages that a standard error is taken from, at least
MAX_RELAXATIONS = 400  # depth, at most, in times that an error takes to fall to 1/e
BURN_IN = 5  # of them before averaging begins: what is left of the start is under 1 %
MIN_BATCH = 32  # smaller products waste the machine
PROBED = 256  # single samples whose curvature is measured to see how they scatter
MAX_RESTARTS = 8
MAX_DEPTH = 1_000_000  # steps that a chain which chooses its own depth may need before it can end


class Lissa(Solver):
    """h <- v + (1 - d) h - A_B h / s with a new mini-batch B every step; the result is h / s.

    The recursion's fixed point in the mean is h / s = (A + d s I)^-1 v: lambda = d s is the *effective damping*. Here
    lambda is given, and d = lambda / s follows from the scale. Agarwal, Bullins, Hazan: "Second-order stochastic
    optimization for machine learning in linear time", JMLR 2017; Koh and Liang: "Understanding black-box predictions
    via influence functions", ICML 2017.

    What is not given is chosen. With M the largest eigenvalue and c = E|A_i u|^2 / u^T A u along its vector u (how
    much single samples scatter there; at most about the trace of A_i):

    - batch size c / M, so that the scatter of a mini-batch is no larger than the curvature itself;
    - scale M + lambda + c / B: a step is stable in mean square up to twice the inverse of this;
    - depth: the error falls by 1/e in s / lambda steps. After five of these *relaxations* all iterates are averaged
      (Polyak and Juditsky 1992), for the last one alone keeps a noise of order s / (B lambda) whatever the depth.
      Averages of blocks of one relaxation each tell the standard error; the chain ends when it is under `TOLERANCE`
      of the average's length for all right-hand sides, or after 400 relaxations.

    With a depth given nothing is averaged: the chain's last iterate is the result, as in published codes.

    A chain that grows faster than any convergent one can is started anew with twice the scale.

    Args:
        damping: Lambda, the effective damping.
        scale: s; the recursion's own damping d is lambda / s.
        depth: Steps.
        batch_size: Samples of a mini-batch, drawn with replacement: then the mean of averages is the inverse.
        seed: Of the mini-batches, which depend on (seed, repeat, step) alone.
        repeat: Number of this chain; the mean of several has less noise.

    Raises:
        SpecError: A value is not positive.
    """

    def __init__(
        self,
        damping: float | None = None,
        *,
        scale: float | None = None,
        depth: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        repeat: int = 0,
    ):
        super().__init__(damping)
        for name, value in (("scale", scale), ("depth", depth), ("batch size", batch_size)):
            if value is not None and not value > 0:
                raise SpecError(f"{name} of LiSSA is {value}: it must be larger than 0")
        self._scale, self._depth, self._batch_size = scale, depth, batch_size
        self._seed, self._repeat = seed, repeat

    def _solve(self, operator: Operator, rhs_QP: Tensor, progress: Progress) -> Solution:
        operator.require_finite()
        before = operator.gradient_equivalents
        damping = self.damping_for(operator)
        settings, record = self._settings(operator, damping)
        messages: list[str] = record["messages"]
        for _ in range(MAX_RESTARTS + 1):
            chain = _Chain(operator, rhs_QP, damping, settings, progress)
            average_QP = chain.run(self._batches(operator, settings.batch_size), self._depth)
            if average_QP is not None:
                break
            messages.append(
                f"diverged by step {chain.step} at scale {settings.scale:.4g}: "
                f"started anew at {2 * settings.scale:.4g}"
            )
            settings = _Settings(2 * settings.scale, settings.batch_size)
        else:
            raise RuntimeFault(
                f"LiSSA diverges even at scale {settings.scale / 2:.4g} with lambda = {damping:.4g}: "
                "use --solver cg, a larger --damping or --operator gauss-newton"
            )
        cost = operator.gradient_equivalents - before
        record |= {"scale": settings.scale, "recursion_damping": damping / settings.scale}
        record |= {"depth": chain.step, "relative_standard_error": chain.error}
        if self._depth is None and chain.error > TOLERANCE:
            messages.append(
                f"the standard error is still {chain.error:.2g} after {chain.step} steps: "
                "average more repeats, or use --solver cg"
            )
        _, relative_Q = relative_residual(operator, average_QP, rhs_QP, damping)
        steps_Q = torch.full((len(rhs_QP),), chain.step)
        return Solution(average_QP, relative_Q.cpu(), steps_Q, damping, cost, record)

    def _settings(self, operator: Operator, damping: float) -> tuple["_Settings", dict[str, Any]]:
        messages: list[str] = []
        record: dict[str, Any] = {"messages": messages}
        if not operator.positive_semidefinite:
            smallest = smallest_eigenvalue(operator)
            record["smallest_eigenvalue"] = smallest
            if smallest <= -damping:
                messages.append(
                    f"lambda = {damping:.3g} does not cover the smallest eigenvalue {smallest:.3g}: the "
                    "result is not the inverse"
                )
        if self._scale is not None and self._batch_size is not None:
            settings = _Settings(self._scale, self._batch_size)
        else:
            largest, vector_P = leading_eigenpair(operator)
            scatter = _scatter(operator, vector_P, largest)
            record |= {
                "largest_eigenvalue": largest,
                "trace": trace(operator),
                "single_sample_curvature": scatter,
            }
            needed = math.ceil(scatter / largest) if largest > 0 else 1
            batch_size = self._batch_size or max(MIN_BATCH, 1 << (needed - 1).bit_length())
            scale = self._scale or abs(largest) + damping + scatter / batch_size
            settings = _Settings(scale, batch_size)
        return settings, record | {"batch_size": settings.batch_size}

    def _batches(self, operator: Operator, size: int) -> Iterator[Tensor]:
        generator = np.random.Generator(np.random.Philox(key=[self._seed, self._repeat]))
        while True:
            chosen = generator.integers(operator.num_samples, size=size)
            yield operator.ids[torch.from_numpy(chosen)]


@dataclass(frozen=True)
class _Settings:
    scale: float
    batch_size: int


class _Chain:
    """One run of the recursion.

    Attributes:
        step: Steps done.
        error: Relative standard error of the average, the worst over right-hand sides; NaN if nothing is averaged.
    """

    def __init__(
        self,
        operator: Operator,
        rhs_QP: Tensor,
        damping: float,
        settings: _Settings,
        progress: Progress,
    ):
        self._rhs_QP, self._progress, self._scale = rhs_QP, progress, settings.scale
        self._relaxation = math.ceil(settings.scale / damping)
        self._steps = lissa_steps(
            operator, rhs_QP, damping / settings.scale, settings.scale, settings.batch_size
        )
        self.step, self.error = 0, math.nan

    def run(self, batches: Iterator[Tensor], depth: int | None) -> Tensor | None:
        """The solution (Q, P); None if the chain diverges."""
        if depth is None and (BURN_IN + BLOCKS) * self._relaxation > MAX_DEPTH:
            raise SpecError(
                f"LiSSA needs {(BURN_IN + BLOCKS) * self._relaxation:,} steps at so small a damping: use "
                "--solver cg, a larger --damping, or say --depth"
            )
        if depth is not None:
            if not self._advance(batches, depth, planned=depth):
                return None
            return self._steps.h_QP() / self._scale
        planned = MAX_RELAXATIONS * self._relaxation
        if not self._advance(batches, BURN_IN * self._relaxation, planned):
            return None
        sum_QP = torch.zeros_like(self._rhs_QP, dtype=torch.float64)
        squares_Q = torch.zeros(len(sum_QP), dtype=torch.float64, device=sum_QP.device)
        for blocks in range(1, MAX_RELAXATIONS - BURN_IN + 1):
            block_QP = torch.zeros_like(self._rhs_QP)
            if not self._advance(batches, self._relaxation, planned, block_QP):
                return None
            # In float64: the variance of the blocks is a small difference of large numbers.
            mean_QP = (block_QP / self._relaxation).double()
            sum_QP += mean_QP
            squares_Q += mean_QP.square().sum(dim=1)
            if blocks >= BLOCKS:
                length_Q = (sum_QP / blocks).square().sum(dim=1)
                variance_Q = (squares_Q / blocks - length_Q).clamp_min(0) / (blocks - 1)
                relative_Q = (variance_Q / length_Q).nan_to_num(nan=0).sqrt()
                self.error = float(relative_Q.max())
                if self.error <= TOLERANCE:
                    break
        return (sum_QP / (blocks * self._scale)).to(self._rhs_QP.dtype)

    def _advance(
        self, batches: Iterator[Tensor], steps: int, planned: int, total_QP: Tensor | None = None
    ) -> bool:
        """Do some steps, adding the iterates up; whether the chain still converges."""
        left = steps
        while left:
            count = min(left, self._steps.longest)
            self._steps.take(torch.stack([next(batches) for _ in range(count)]), total_QP)
            left -= count
            self.step += count
            if self._diverges():
                return False
            self._progress(min(1.0, self.step / planned))
        return True

    def _diverges(self) -> bool:
        """In a chain that converges no step adds more than |v| in the mean, nor is |h| above s |v| / lambda."""
        allowed = 4 * min(self.step + 1, self._relaxation)
        limit_Q = allowed * torch.linalg.vector_norm(self._rhs_QP, dim=1)
        return not bool((self._steps.lengths() <= limit_Q).all())  # NaN is larger than anything


def _scatter(operator: Operator, vector_P: Tensor, largest: float) -> float:
    """E|A_i u|^2 / u^T A u over single samples i."""
    chosen = torch.randperm(operator.num_samples, generator=torch.Generator().manual_seed(1))
    u_1P = vector_P[None]
    squares = [
        float(operator.product(u_1P, operator.ids[i : i + 1]).square().sum())
        for i in chosen[:PROBED].tolist()
    ]
    return float(np.mean(squares)) / abs(largest) if largest else 0.0
