"""EK-FAC: the Gauss-Newton matrix of each layer, diagonal in a Kronecker-factored eigenbasis."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor

from influence_jobs.curvature.ek_fac_blocks import MatrixBlock
from influence_jobs.curvature.ek_fac_columns import columns_of, few_samples, outputs_of
from influence_jobs.curvature.ek_fac_factors import (
    Factors,
    SavedFactors,
    blocks_of,
    coarse_lines,
    groups_of,
)
from influence_jobs.curvature.matrices import GaussNewton
from influence_jobs.curvature.operators import Operator
from influence_jobs.curvature.output_gradients import OutputGradients
from influence_jobs.curvature.output_roots import Doubts
from influence_jobs.curvature.solver import (
    DAMPING_SHARE,
    Progress,
    Solution,
    Solver,
    Trial,
    no_progress,
    relative_residual,
)
from influence_jobs.errors import DataError, ModelError, SpecError
from influence_jobs.gradients import Metric
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.memory import is_out_of_memory
from influence_jobs.tasks.placement import device_of

Targets = Literal["auto", "exact", "sampled"]

# `auto` takes all columns of the loss's Hessian up to this many outputs a sample and passes in all.
# Of 1,500 digits a random root was 5 to 9 % off the exact solution, of 6,000 it was 2 to 5 %; one
# target drawn a sample was off by 12 to 114 %.
AUTO_OUTPUTS, AUTO_PASSES = 64, 2**15


class EkFac(Solver):
    """Inverts the EK-FAC approximation of the Gauss-Newton matrix.

    Layers count each for itself. The gradient of a layer that applies one matrix to every position
    is sum_t g_t x_t^T, over the positions of all its calls. Its block is diagonal in the eigenbasis
    of the second moments of x and g, with the mean squares of the rotated gradients as eigenvalues.
    A side of more than `ek_fac_blocks.MOST_SIDE` keeps its own axes. All other parameters - of
    normalisation, embeddings, attention, one's own - have the exact block of up to 1,024 numbers,
    else a block for each row, else the diagonal.

    Gradients are those of the outputs along a root of the loss's Hessian (`output_roots`), so any
    loss that is convex in the outputs will do.

    It takes two passes over the operator's samples, and with exact targets two for each output.
    There are no iterations. Factors of more than `GROUP_BYTES` are computed and used layers after
    layers, with two passes for each group; the numbers are the same.

    George, Laurent, Bouthillier, Ballas, Vincent: "Fast Approximate Natural Gradient Descent in a
    Kronecker-factored Eigenbasis", NeurIPS 2018; for positions ("expand") Eschenhagen, Immer,
    Turner, Schneider, Hennig: "Kronecker-Factored Approximate Curvature for Modern Neural Network
    Architectures", NeurIPS 2023; for influence Grosse et al.: "Studying Large Language Model
    Generalization with Influence Functions", 2023.

    Args:
        damping: Lambda, added to the corrected eigenvalues; None for `damping_share` times the
            largest of them.
        seed: Seed of the random roots.
        targets: `sampled`: one random root of the loss's Hessian a sample. `exact`: all columns of
            the Hessian. `auto`: exact for at most `AUTO_OUTPUTS` outputs a sample, if samples times
            outputs are at most `AUTO_PASSES`.

    Attributes:
        saved: Where finished factors are kept and looked for, so that each is computed once.
    """

    saved: SavedFactors | None = None

    def __init__(
        self,
        damping: float | None = None,
        seed: int = 0,
        targets: Targets = "auto",
        damping_share: float = DAMPING_SHARE,
    ):
        super().__init__(damping, damping_share)
        self.seed, self.targets = seed, targets
        self._last: tuple[Any, Factors] | None = None
        self._looked: tuple[Any, list[list[str]]] | None = None

    def _solve(self, operator: Operator, rhs_QP: Tensor, progress: Progress) -> Solution:
        if not isinstance(operator, GaussNewton):
            raise _not_gauss_newton()
        groups, damping = self._groups(operator), self._damping
        if damping is None:
            found = [factors.largest() for factors in self._each(operator, groups, progress)]
            damping, progress = self._share_of(max(found)), no_progress
        x_QP, columns, coarse, exact = torch.zeros_like(rhs_QP), 0, list[str](), False
        into, vectors = operator.space.split(x_QP), operator.space.split(rhs_QP)

        def inverse(values: Tensor) -> Tensor:
            return 1 / (values + damping)

        for factors in self._each(operator, groups, progress):
            for name, part in factors.times_parts(vectors, inverse):
                into[name].copy_(part)
            columns, exact = columns + factors.columns, factors.exact
            coarse += factors.coarse
        _, relative_Q = relative_residual(operator, x_QP, rhs_QP, damping)
        return Solution(
            x_QP,
            relative_Q.cpu(),
            torch.ones(len(rhs_QP), dtype=torch.int64),
            damping,
            2.0 * columns,
            {
                "seed": self.seed,
                "targets": "exact" if exact else "sampled",
                "messages": coarse_lines(coarse),
            },
        )

    def _groups(self, operator: GaussNewton) -> list[list[str]]:
        """Names of the parameters whose factors are in memory together; see `GROUP_BYTES`."""
        key = _key(operator)
        if self._looked is None or self._looked[0] != key:
            operator.require_finite()
            with self._engine(operator) as engine:
                blocks = blocks_of(engine, operator, torch.device("meta"))
            self._looked = key, groups_of(blocks.values())
        return self._looked[1]

    def _each(
        self, operator: GaussNewton, groups: Sequence[Sequence[str]], progress: Progress
    ) -> Iterator[Factors]:
        """The factors of one group after the other; of one alone they are kept for next time."""
        if len(groups) == 1:
            yield self._fitted(operator, progress)
            return
        for k, names in enumerate(groups):

            def told(fraction: float, before: int = k) -> None:
                progress((before + fraction) / len(groups))

            part = operator.within(ParameterSpace(operator.model, names))
            yield self._restored(part, told)

    def _restored(self, operator: GaussNewton, progress: Progress) -> Factors:
        """The factors as they are on disk; if they are not, they are fitted and put there."""
        if self.saved is None:
            return self._fit([operator], progress)
        with self._engine(operator) as engine:
            factors = Factors(
                blocks_of(engine, operator, device_of(operator.model)), self._exact(operator)
            )
        if not factors.read(self.saved):
            del factors  # they would be in memory twice
            factors = self._fit([operator], progress)
            factors.write(self.saved)
        return factors

    def factors_of(
        self, operators: Sequence[GaussNewton], progress: Progress = no_progress
    ) -> Factors:
        """The factors of the mean of several matrices, such as those of several checkpoints.

        Raises:
            DataError, ModelError, SpecError, RuntimeFault: As `solve`.
        """
        for operator in operators:
            operator.require_finite()
        return self._fit(operators, progress)

    def metrics(self, operator: Operator, *, power: int) -> dict[str, Metric]:
        """The quadratic form g^T (G + lambda I)^-power g of each layer, for relative influence.

        Raises:
            ModelError: A layer has no Kronecker factors; or as `solve`.
        """
        if not isinstance(operator, GaussNewton):
            raise _not_gauss_newton()
        self._groups(operator)  # looks at the samples
        factors, damping = self._fitted(operator, no_progress), self.damping_for(operator)
        for name, block in factors.blocks.items():
            if not isinstance(block, MatrixBlock) or not block.complete:
                raise ModelError(
                    f"layer '{name}' has no Kronecker eigenbasis, and relative scores need one: "
                    "leave the layer out of --layer, or leave --relative out"
                )
        return {
            name: block.metric(damping, power)
            for name, block in factors.blocks.items()
            if isinstance(block, MatrixBlock)
        }

    def damping_for(self, operator: Operator) -> float:
        if self._damping is not None:
            return self._damping
        if not isinstance(operator, GaussNewton):
            raise _not_gauss_newton()
        return self._share_of(self._fitted(operator, no_progress).largest())

    def _share_of(self, largest: float) -> float:
        """Lambda, of the largest eigenvalue of all blocks."""
        chosen = self._share * largest
        if not chosen > 0:
            raise SpecError(
                "no lambda can be chosen, as the curvature is zero for these samples: give "
                "--damping"
            )
        return chosen

    def _fitted(self, operator: GaussNewton, progress: Progress) -> Factors:
        key = _key(operator)
        if self._last is None or self._last[0] != key:
            self._last = key, self._restored(operator, progress)
        return self._last[1]

    def _fit(self, operators: Sequence[GaussNewton], progress: Progress) -> Factors:
        with ExitStack() as stack:
            engines = [stack.enter_context(self._engine(operator)) for operator in operators]
            factors = None
            while factors is None:
                factors = self._swept(operators, engines, progress)
        return factors

    def _swept(
        self,
        operators: Sequence[GaussNewton],
        engines: Sequence[OutputGradients],
        progress: Progress,
    ) -> Factors | None:
        """The factors after both sweeps; None if a batch, now halved, did not fit into memory.

        What the batch had added by then cannot be taken back.
        """
        done, rows = 0.0, sum(operator.num_samples for operator in operators)
        doubts = Doubts()
        factors = Factors(
            blocks_of(engines[0], operators[0], device_of(operators[0].model)),
            self._exact(operators[0]),
        )
        for sweep in range(2):
            for operator, engine in zip(operators, engines, strict=True):
                at = 0
                try:
                    for samples in self._sweep(operator, engine, factors, sweep, rows, doubts):
                        if not done:  # most losses that have no roots have none anywhere
                            doubts.settle()
                        at += samples
                        done += samples / (2 * rows)
                        progress(min(1.0, done))
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                else:
                    continue
                operator.batching.halve(operator.ids[at : at + operator.batch_size])
                return None
            if sweep == 0:
                doubts.settle()
                if not factors.diagonalise():
                    raise _not_finite(operators)
        return factors

    @staticmethod
    def _engine(operator: GaussNewton) -> OutputGradients:
        return OutputGradients(
            operator.model, operator.space, operator.task.outputs, few_samples(operator)
        )

    def _sweep(
        self,
        operator: GaussNewton,
        engine: OutputGradients,
        factors: Factors,
        which: int,
        rows: int,
        doubts: Doubts,
    ) -> Iterator[int]:
        """One of the two sweeps over all samples; yields the samples of each batch.

        Args:
            rows: Samples of the mean.
            doubts: Takes what speaks against the roots.
        """
        for ids, batch, columns in columns_of(operator, self.seed, doubts, exact=factors.exact):
            for k, s in enumerate(columns):
                mean = s / math.sqrt(rows)  # sums of squares are means
                factors.add(engine, which, (batch, mean), inputs=k == 0)
                factors.columns = max(factors.columns, k + 1)
            yield len(ids)

    def trial(self, operator: Operator, rhs_QP: Tensor, passes: float) -> Trial:
        if not isinstance(operator, GaussNewton):
            raise _not_gauss_newton()
        exact, groups = self._exact(operator), self._groups(operator)
        outputs = outputs_of(operator)
        said = f"exact targets: {outputs} outputs" if exact else "sampled targets"
        said += f", two sweeps over {operator.num_samples:,} samples"
        if len(groups) > 1:
            said += f" for each of {len(groups)} groups of layers"
        return Trial((said,), self._pieces(operator, groups, exact=exact))

    def _pieces(
        self, operator: GaussNewton, groups: Sequence[Sequence[str]], *, exact: bool
    ) -> Iterator[float]:
        part = operator.within(ParameterSpace(operator.model, groups[0]))
        with self._engine(part) as engine:
            while True:
                factors = Factors(blocks_of(engine, part, device_of(part.model)), exact)
                doubts = Doubts()
                for samples in self._sweep(part, engine, factors, 0, operator.num_samples, doubts):
                    doubts.settle()
                    yield samples / (2 * operator.num_samples * len(groups))

    def _exact(self, operator: GaussNewton) -> bool:
        if self.targets != "auto":
            return self.targets == "exact"
        outputs = outputs_of(operator)
        return outputs <= AUTO_OUTPUTS and outputs * operator.num_samples <= AUTO_PASSES


def _key(operator: GaussNewton) -> Any:
    """Of an operator and the values of its weights."""
    return operator, [parameter._version for parameter in operator.model.parameters()]


def _not_gauss_newton() -> SpecError:
    return SpecError("EK-FAC works with the Gauss-Newton matrix only: leave --operator out")


def _not_finite(operators: Sequence[GaussNewton]) -> DataError:
    """What to say of gradients that are not finite, though the losses are.

    Raises:
        DataError: Samples are at fault; the message names them.
    """
    for operator in operators:
        like = next(iter(operator.space.parameters().values()))
        _ = operator @ torch.ones(1, operator.size, dtype=like.dtype, device=like.device)
    return DataError(
        "squares of gradients are too large for their number format: use --precision float64, or "
        "check the checkpoint"
    )
