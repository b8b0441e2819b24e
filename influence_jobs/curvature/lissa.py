"""LiSSA: a stochastic recursion whose mean converges to the inverse times a vector."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_jobs.curvature.lissa_steps import lissa_steps
from influence_jobs.curvature.operators import Operator
from influence_jobs.curvature.solver import (
    DAMPING_SHARE,
    Progress,
    Solution,
    Solver,
    Trial,
    no_progress,
    relative_residual,
    require_finite,
)
from influence_jobs.curvature.spectrum import (
    leading_eigenpair,
    smallest_eigenvalue,
    sufficient_damping,
    trace,
)
from influence_jobs.errors import RuntimeFault, SpecError
from influence_jobs.transfers import numbers

log = logging.getLogger(__name__)

TOLERANCE = 0.1  # relative standard error at which a repeat without a given depth ends
BLOCKS = 8  # smallest number of block averages for a standard error
MAX_RELAXATIONS = 400  # largest depth if none is given; an error falls by 1/e in one relaxation
BURN_IN = 5  # relaxations before averaging begins; less than 1 % of the start is left then
MIN_BATCH = 32  # smaller products are inefficient
PROBED = 256  # number of single samples on which the scatter of the curvature is measured
MAX_RESTARTS = 8
MANY_STEPS = 20_000  # more than this are warned of
MAX_DEPTH = 1_000_000  # steps; if the burn-in and `BLOCKS` blocks need more, LiSSA is refused


class Lissa(Solver):
    """h <- v + (1 - d) h - A_B h / s with a new mini-batch B every step; the result is h / s.

    The fixed point of the recursion's mean is h / s = (A + d s I)^-1 v. So lambda = d s is the
    *effective damping*. Here lambda is given, and d = lambda / s follows from the scale s.

    Agarwal, Bullins, Hazan: "Second-order stochastic optimization for machine learning in linear
    time", JMLR 2017; Koh and Liang: "Understanding black-box predictions via influence functions",
    ICML 2017.

    A *repeat* is one independent run of the recursion, with mini-batches of its own. The mean of
    several repeats has less noise.

    Settings that are not given are chosen as follows. Let M be the largest eigenvalue, u its
    eigenvector, and c = E|A_i u|^2 / u^T A u over single samples i. c measures how much single
    samples scatter along u; it is at most about the trace of A_i.

    - Batch size: c / M. The scatter of a mini-batch is then no larger than the curvature itself.
    - Scale: M + lambda + c / B. Steps are stable in mean square down to half of this scale.
    - Depth: the error falls by 1/e in s / lambda steps, one *relaxation*. After five relaxations
      the average over all further iterates is taken (Polyak and Juditsky 1992), because the last
      iterate alone keeps a noise of order s / (B lambda) at any depth. The averages of blocks of
      one relaxation each give the standard error. A repeat ends when this is under `TOLERANCE`
      times the length of the average for all right-hand sides, or after 400 relaxations.

    If the depth is given, nothing is averaged: the last iterate is the result, as in published
    codes.

    If a repeat grows faster than a convergent one can, it is restarted with twice the scale.

    Args:
        damping, damping_share: See `Solver`; lambda is the effective damping.
        scale: s; the recursion's own damping d is lambda / s.
        depth: Number of steps.
        batch_size: Samples of a mini-batch. They are drawn with replacement, which the mean of the
            averages needs to be the inverse.
        seed: Seed of the mini-batches; these depend on (seed, number of the repeat, step) only.

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
        damping_share: float = DAMPING_SHARE,
        seed: int = 0,
    ):
        super().__init__(damping, damping_share)
        for name, value in (("scale", scale), ("depth", depth), ("batch size", batch_size)):
            if value is not None and not value > 0:
                raise SpecError(f"{name} of LiSSA is {value}: it must be larger than 0")
        self._scale, self._depth, self._batch_size = scale, depth, batch_size
        self._seed = seed

    def solve_repeats(
        self,
        operator: Operator,
        rhs_QP: Tensor,
        repeats: Sequence[int],
        progress: Progress = no_progress,
    ) -> list[Solution]:
        """Solve by several repeats side by side, which share the overhead of small steps.

        Args:
            operator: A.
            rhs_QP: v, on the operator's device.
            repeats: Numbers of the repeats.
            progress: Called with the fraction of the work done.

        Returns:
            For each repeat the solution that it would find alone, up to rounding. Repeat 0 gives
            the solution of `solve`.

        Raises:
            DataError, ModelError, SpecError, RuntimeFault: As `solve`.
        """
        require_finite(rhs_QP)
        operator.require_finite()
        damping = self.damping_for(operator)
        settings, record = self._settings(operator, damping)
        steps = self._depth or _planned(settings, damping, BLOCKS)
        log.log(
            logging.WARNING if steps > MANY_STEPS else logging.INFO,
            _cost(settings, damping, self._depth),
        )
        batch_size, messages = settings.batch_size, {r: list(record["messages"]) for r in repeats}
        costs, scales, ends = dict.fromkeys(repeats, 0.0), dict[int, float](), dict[int, _End]()
        waiting = list(repeats)
        for _ in range(MAX_RESTARTS + 1):
            before = operator.gradient_equivalents
            batches = [self._batches(operator, batch_size, repeat) for repeat in waiting]
            recursion = _Recursion(operator, rhs_QP, damping, settings, batches, progress)
            for repeat, end in zip(waiting, recursion.run(self._depth), strict=True):
                ends[repeat], scales[repeat] = end, settings.scale
            cost = (operator.gradient_equivalents - before) / len(waiting)
            costs |= {repeat: costs[repeat] + cost for repeat in waiting}
            waiting = [repeat for repeat in waiting if ends[repeat].x_QP is None]
            if not waiting:
                break
            settings = _Settings(2 * settings.scale, batch_size)
            for repeat in waiting:
                messages[repeat].append(
                    f"diverged by step {ends[repeat].step} at scale {scales[repeat]:.4g}: "
                    f"restarted at {settings.scale:.4g}"
                )
        else:
            raise RuntimeFault(
                f"LiSSA diverges even at scale {settings.scale / 2:.4g} with lambda = "
                f"{damping:.4g}: use --solver cg, a larger --damping or --operator gauss-newton"
                f"{''.join(f' ({said})' for said in record['messages'])}"
            )
        solutions = []
        for repeat in repeats:
            x_QP = ends[repeat].x_QP
            assert x_QP is not None
            _, relative_Q = relative_residual(operator, x_QP, rhs_QP, damping)
            scale, end = scales[repeat], ends[repeat]
            if self._depth is None and end.error > TOLERANCE:
                messages[repeat].append(
                    f"the standard error is still {end.error:.2g} after {end.step} steps: "
                    "average more repeats, or use --solver cg"
                )
            chosen: dict[str, Any] = {
                "scale": scale,
                "recursion_damping": damping / scale,
                "depth": end.step,
            }
            chosen |= {"relative_standard_error": end.error, "messages": messages[repeat]}
            steps_Q = torch.full((len(rhs_QP),), end.step)
            solutions.append(
                Solution(x_QP, relative_Q.cpu(), steps_Q, damping, costs[repeat], record | chosen)
            )
        return solutions

    def trial(self, operator: Operator, rhs_QP: Tensor, passes: float) -> Trial:
        damping = self.damping_for(operator)
        settings, record = self._settings(operator, damping)
        own, scale, size = damping / settings.scale, settings.scale, settings.batch_size
        steps = lissa_steps(operator, rhs_QP, own, scale, size)
        said = [*record["messages"], _cost(settings, damping, self._depth)]
        total = self._depth or _planned(settings, damping, BLOCKS)

        def blocks() -> Iterator[Tensor]:
            batches = self._batches(operator, size, 0)
            while True:
                yield torch.stack([*islice(batches, min(steps.longest, total))])[None]

        return Trial(tuple(said), (taken / total for taken in steps.blocks(blocks())))

    def _solve(self, operator: Operator, rhs_QP: Tensor, progress: Progress) -> Solution:
        return self.solve_repeats(operator, rhs_QP, (0,), progress)[0]

    def _settings(self, operator: Operator, damping: float) -> tuple["_Settings", dict[str, Any]]:
        messages: list[str] = []
        record: dict[str, Any] = {"messages": messages}
        if not operator.positive_semidefinite:
            smallest = smallest_eigenvalue(operator)
            record["smallest_eigenvalue"] = smallest
            if smallest <= -damping:
                smallest, enough = sufficient_damping(operator)
                messages.append(
                    f"lambda = {damping:.3g} does not make the smallest eigenvalue "
                    f"{smallest:.3g} positive: the result is not the inverse, which takes "
                    f"--damping {enough:g} or more"
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

    def _batches(self, operator: Operator, size: int, repeat: int) -> Iterator[Tensor]:
        generator = np.random.Generator(np.random.Philox(key=[self._seed, repeat]))
        while True:
            chosen = generator.integers(operator.num_samples, size=size)
            yield operator.ids[torch.from_numpy(chosen)]


@dataclass(frozen=True)
class _Settings:
    scale: float
    batch_size: int


@dataclass(frozen=True)
class _End:
    """The end of a repeat.

    Attributes:
        x_QP: The solution; None if the repeat diverged.
        step: Number of steps.
        error: Relative standard error of the average, the largest over right-hand sides; NaN if
            nothing is averaged.
    """

    x_QP: Tensor | None
    step: int
    error: float = math.nan


def _planned(settings: _Settings, damping: float, blocks: int) -> int:
    """Steps of the burn-in and some blocks.

    Raises:
        SpecError: Even the fewest blocks take more than `MAX_DEPTH` steps.
    """
    relaxation = math.ceil(settings.scale / damping)
    if (least := (BURN_IN + BLOCKS) * relaxation) > MAX_DEPTH:
        raise SpecError(
            f"LiSSA needs {least:,} steps because lambda is so small: use --solver cg, a larger "
            "--damping, or give --depth"
        )
    return (BURN_IN + blocks) * relaxation


def _cost(settings: _Settings, damping: float, depth: int | None) -> str:
    """The steps that a repeat takes, and what decides them, in a line."""
    of = f"{settings.batch_size} samples"
    if depth is not None:
        return f"{depth:,} steps of {of} a repeat, as given"
    least = _planned(settings, damping, BLOCKS)
    most = _planned(settings, damping, MAX_RELAXATIONS - BURN_IN)
    return (
        f"{least:,} steps of {of} a repeat, at most {most:,} if they scatter: {BURN_IN + BLOCKS} x "
        f"scale / lambda, scale {settings.scale:.3g}, lambda {damping:.3g}; fewer by a larger "
        "--damping or --solver cg"
    )


class _Recursion:
    """E repeats side by side. One that has ended keeps its result but still takes steps."""

    def __init__(
        self,
        operator: Operator,
        rhs_QP: Tensor,
        damping: float,
        settings: _Settings,
        batches: Sequence[Iterator[Tensor]],
        progress: Progress,
    ):
        self._rhs_QP, self._progress, self._scale = rhs_QP, progress, settings.scale
        self._batches, self._relaxation = batches, math.ceil(settings.scale / damping)
        self._settings, self._damping = settings, damping
        self._steps = lissa_steps(
            operator,
            rhs_QP,
            damping / settings.scale,
            settings.scale,
            settings.batch_size,
            len(batches),
        )
        self._step, self._ends = 0, dict[int, _End]()

    def run(self, depth: int | None) -> list[_End]:
        """Take steps until every repeat has ended."""
        if depth is not None:
            self._advance(depth, depth)
            for repeat, x_QP in enumerate(self._steps.h_EQP() / self._scale):
                self._ends.setdefault(repeat, _End(x_QP, self._step))
        else:
            self._average()
        return [self._ends[repeat] for repeat in range(len(self._batches))]

    def _average(self) -> None:
        planned = _planned(self._settings, self._damping, BLOCKS)
        self._advance(BURN_IN * self._relaxation, planned)
        sum_EQP = torch.zeros_like(self._steps.h_EQP(), dtype=torch.float64)
        squares_EQ = torch.zeros_like(sum_EQP[..., 0])
        for blocks in range(1, MAX_RELAXATIONS - BURN_IN + 1):
            block_EQP = torch.zeros_like(sum_EQP, dtype=self._rhs_QP.dtype)
            self._advance(self._relaxation, planned, block_EQP)
            # In float64, since the variance of the blocks is a small difference of large numbers.
            mean_EQP = (block_EQP / self._relaxation).double()
            sum_EQP += mean_EQP
            squares_EQ += mean_EQP.square().sum(dim=2)
            if blocks >= BLOCKS:
                length_EQ = (sum_EQP / blocks).square().sum(dim=2)
                variance_EQ = (squares_EQ / blocks - length_EQ).clamp_min(0) / (blocks - 1)
                relative_EQ = (variance_EQ / length_EQ).nan_to_num(nan=0).sqrt()
                last = blocks == MAX_RELAXATIONS - BURN_IN
                errors = relative_EQ.amax(dim=1).tolist()
                for repeat, error in enumerate(errors):
                    if repeat not in self._ends and (error <= TOLERANCE or last):
                        x_QP = (sum_EQP[repeat] / (blocks * self._scale)).to(self._rhs_QP.dtype)
                        self._ends[repeat] = _End(x_QP, self._step, error)
                # The error falls as one over the root of the number of blocks.
                wanted = math.ceil(blocks * (max(errors) / TOLERANCE) ** 2)
                blocks_left = min(max(wanted, blocks + 1), MAX_RELAXATIONS - BURN_IN)
                planned = _planned(self._settings, self._damping, blocks_left)
            if len(self._ends) == len(self._batches):
                return

    def _advance(self, steps: int, planned: int, total_EQP: Tensor | None = None) -> None:
        """Take steps while a repeat has not ended, and add the iterates to a total."""
        if len(self._ends) == len(self._batches):
            return
        for taken in self._steps.blocks(self._drawn(steps), total_EQP):
            self._step += taken
            for repeat in self._diverging():
                self._ends.setdefault(repeat, _End(None, self._step))
            self._progress(min(1.0, self._step / planned))
            if len(self._ends) == len(self._batches):
                return

    def _drawn(self, steps: int) -> Iterator[Tensor]:
        """The mini-batches (E, S, B) of so many steps, block by block."""
        for start in range(0, steps, self._steps.longest):
            count = min(self._steps.longest, steps - start)
            yield torch.stack([torch.stack([*islice(one, count)]) for one in self._batches])

    def _diverging(self) -> list[int]:
        """Repeats whose h is longer than that of a convergent repeat can be.

        In the mean, a step of a convergent repeat adds at most |v| to |h|, and |h| is at most
        s |v| / lambda.
        """
        allowed = 4 * min(self._step + 1, self._relaxation)
        limit_Q = allowed * torch.linalg.vector_norm(self._rhs_QP, dim=1)
        converging_E = (self._steps.lengths() <= limit_Q).all(dim=1)  # NaN <= limit is false
        return [repeat for repeat, converges in enumerate(converging_E.tolist()) if not converges]


def _scatter(operator: Operator, vector_P: Tensor, largest: float) -> float:
    """E|A_i u|^2 / u^T A u over single samples i, with u = `vector_P`."""
    chosen = torch.randperm(operator.num_samples, generator=torch.Generator().manual_seed(1))
    u_1P = vector_P[None]
    singles = (operator.ids[i].view(1, 1) for i in chosen[:PROBED].tolist())
    squares = numbers(
        operator.space.join(products)[0].square().sum()
        for products in operator.products_in_turn(u_1P[None], singles)
    )
    return float(np.mean(squares)) / abs(largest) if largest else 0.0
