"""Influence: s_test vectors times the loss gradient of every training sample."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from influence_jobs.curvature import EkFac, GaussNewton
from influence_jobs.errors import SpecError
from influence_jobs.gradients import GradDots, GradQuadratics, Metric, TokenDots
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.rules import MatrixRule, matrix_layers, nearest_rule
from influence_jobs.jobs.base import Plan, Progress, Result, Shard
from influence_jobs.jobs.rows import Checks, until_right
from influence_jobs.jobs.samples import trained_inputs
from influence_jobs.jobs.scores import Scores, ScoresJob, sides_of
from influence_jobs.jobs.tokens import MEANING, first_samples, only_tokens, watch_tokens
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.s_test.job import curvature_samples
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.kinds.s_test.terms import Term, terms_of
from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.methods.relative import refuse_sizes, relative_scores
from influence_jobs.specs.base import AnySpec
from influence_jobs.specs.solvers import EkFacSettings
from influence_jobs.store.layout import (
    SCORES,
    SCORES_OF_TOKENS,
    ArrayLayout,
    chunk_rows,
    part_name,
)
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Batch, Draw
from influence_jobs.tasks.sequences import TokenLosses
from influence_jobs.terms import FullPrecision, ScorePrecision, stored_as

# Of the s_test vectors that are in memory. More queries are multiplied block after block, for
# each of which the samples pass through the model once more.
MAX_VECTOR_BYTES = 2**30


class InfluenceJob(ScoresJob[InfluenceSpec]):
    """The scores have terms for every s_test run (`terms_of`), block of queries and noise draw."""

    spec_type = InfluenceSpec
    _engines: tuple[tuple[int, int], GradDots, GradQuadratics | None, TokenDots | None] | None = (
        None
    )

    @cached_property
    def _fitted(self) -> dict[int, dict[str, Metric | None]]:
        """Metrics by s_test run, filled on demand."""
        return {}

    @cached_property
    def _terms(self) -> tuple[tuple[STestSpec, Term], ...]:
        """The terms of the scores, each with its s_test run."""
        return tuple((s_test, term) for s_test in self.spec.s_tests for term in terms_of(s_test))

    @staticmethod
    def inputs(spec: InfluenceSpec) -> tuple[AnySpec, ...]:
        trained = trained_inputs(tuple(s_test.checkpoint for s_test in spec.s_tests))
        return (*trained, *spec.s_tests)

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return tuple(term.checkpoint for _, term in self._terms)

    def input_digests(self) -> dict[str, str]:
        runs = [Run(self.run_store.root, s_test) for s_test in self.spec.s_tests]
        return super().input_digests() | {run.id: run.digest() for run in runs}

    @property
    def stored(self) -> ScorePrecision:
        return stored_as(self._precision)

    @property
    def _precision(self) -> FullPrecision:
        return self.spec.s_tests[0].precision

    @property
    def tf32(self) -> bool:
        return self._precision == "tf32"

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.stored)
        return found

    @property
    def terms(self) -> int:
        return len(self._terms) * len(self._blocks) * self.spec.noise_draws

    @cached_property
    def _blocks(self) -> list[slice]:
        """Queries whose vectors are in memory together: as many as `MAX_VECTOR_BYTES` holds."""
        count = len(self.spec.queries.items)
        block = max(1, MAX_VECTOR_BYTES // self._vector_bytes)
        return [slice(start, min(start + block, count)) for start in range(0, count, block)]

    @cached_property
    def _vector_bytes(self) -> int:
        """Of one query."""
        space = ParameterSpace(self.task.model(), self.spec.s_tests[0].modules)
        return space.size * np.dtype(self.stored).itemsize

    def held_bytes(self, plan: Plan) -> int:
        block = self._blocks[0]
        # Twice: as they are read, and as the layers' rules read them.
        vectors: int = 2 * (block.stop - block.start) * self._vector_bytes
        return plan.largest_shard_bytes + vectors

    def layouts(self) -> tuple[ArrayLayout, ...]:
        found, tokens = super().layouts(), self.spec.tokens
        if tokens is None:
            return found
        queries, samples = found[0].shape
        row_bytes = np.dtype(self.stored).itemsize * tokens
        rows = min(found[0].chunk_rows, chunk_rows(samples, row_bytes))
        of_tokens = ArrayLayout(
            name=SCORES_OF_TOKENS,
            shape=(queries, samples, tokens),
            row_axis=1,
            chunk_rows=rows,
            dims=("query", "sample", "token"),
            dtype=self.stored,
            attributes={**self.meaning, "of": f"what each token brings to the score; {MEANING}"},
        )
        return (*(replace(array, chunk_rows=rows) for array in found), of_tokens)

    @cached_property
    def kept_layers(self) -> tuple[str, ...]:
        if not self.spec.keep_modules:
            return ()
        return ParameterSpace(self.task.model(), self.spec.s_tests[0].modules).modules

    @property
    def meaning(self) -> dict[str, str]:
        quantity = self.spec.queries.quantity
        rise = f"N x the predicted rise of the query's {quantity} when the sample is removed"
        if not any(s_test.solver.uses_curvature for s_test in self.spec.s_tests):
            rise = "the dot product of the two gradients, no curvature divided out"
        if len(self.spec.s_tests) > 1:
            over = {"sum": "summed", "mean": "averaged"}[self.spec.combine]
            rise += f", {over} over {len(self.spec.s_tests)} s_test runs"
        size = {
            None: "",
            "theta": ", per unit of the sample's effect on the parameters of Linear and Conv2d "
            "layers",
            "loss": ", per unit of the sample's effect on the losses through Linear and Conv2d "
            "layers",
        }[self.spec.relative]
        return {
            **sides_of(quantity),
            "quantity": f"s_test . gradient of the sample's loss: {rise}{size}",
            "unit": quantity if self.spec.relative is None else f"relative {quantity}",
        }

    def fetch(self, term: int, ids: torch.Tensor) -> Batch:
        return self.batch(ids, Draw(self.spec.seed, term % self.spec.noise_draws))

    def run(self, shard: Shard, progress: Progress) -> Result:
        return until_right(lambda: super(InfluenceJob, self).run(shard, progress))

    def score(self, term: int, ids: torch.Tensor, fetched: Any, checks: Checks) -> Scores:
        of_term, block = divmod(term // self.spec.noise_draws, len(self._blocks))
        dots, sizes, tokens = self._engines_of(of_term, block)
        batch = fetched
        found: dict[str, Tensor] = {}
        if self.kept_layers:
            found = {part_name(layer): layer_BQ for layer, layer_BQ in dots(batch).items()}
            found[SCORES] = torch.stack([*found.values()]).sum(dim=0)
        else:
            found[SCORES] = dots.total(batch)
        counts_B = None
        if tokens is not None and self.spec.tokens is not None:
            counts_B = watch_tokens(self._parts, self.model, batch, self.spec.tokens, checks)
            found[SCORES_OF_TOKENS], add_up = tokens.unwatched(batch, found[SCORES])
            checks.right("sums of tokens", add_up, tokens.refuse_sums)
        for values in found.values():
            checks.finite("the gradient", values, ids)
        # (Q, B), or of tokens (Q, T, B)
        scores = {
            name: values.permute(*reversed(range(values.ndim))) for name, values in found.items()
        }
        if sizes is not None:
            squared_B = torch.stack([*sizes(batch).values()]).sum(dim=0).double()
            for name, values in scores.items():
                scores[name], right = relative_scores(values, squared_B)
                for which, flag in enumerate(right):
                    checks.right(f"sizes {which}", flag, partial(refuse_sizes, [which > 0, False]))
        weight = self._terms[of_term][1].weight / self.spec.noise_draws
        if self.spec.combine == "mean":
            weight /= len(self.spec.s_tests)
        if counts_B is not None and self.spec.tokens is not None:
            by_sample = scores[SCORES_OF_TOKENS].transpose(1, 2)
            scores[SCORES_OF_TOKENS] = only_tokens(by_sample, counts_B, self.spec.tokens)
        return {name: self._in_all(block, values * weight) for name, values in scores.items()}

    def _in_all(self, block: int, values: Tensor) -> Tensor:
        """Scores of a block of queries among those of all, (Q, B, ...), which are zero."""
        if len(self._blocks) == 1:
            return values
        found = values.new_zeros((len(self.spec.queries.items), *values.shape[1:]))
        found[self._blocks[block]] = values
        return found

    @cached_property
    def _parts(self) -> TokenLosses:
        parts, some = TokenLosses(self.task), first_samples(self.task, self.batching.size)
        parts.look(self.model, self.batch(some, Draw(self.spec.seed)))
        return parts

    def _engines_of(
        self, which: int, block: int
    ) -> tuple[GradDots, GradQuadratics | None, TokenDots | None]:
        """The engines of one term and block, with the term's checkpoint's weights in the model."""
        if self._engines is None or self._engines[0] != (which, block):
            if self._engines is not None:
                for engine in self._engines[1:3]:
                    if engine is not None:
                        engine.close()
                self._engines = None  # its vectors are not needed beside the next ones
            s_test, term = self._terms[which]
            self.load(term.checkpoint)
            vectors_QP = torch.from_numpy(self._vectors(s_test, term, self._blocks[block]))
            space = ParameterSpace(self.model, s_test.modules)
            sizes = None
            if self.spec.relative is not None:
                if which not in self._fitted:  # slow, and the same for every shard
                    self._fitted[which] = self._metrics(s_test)
                sizes = GradQuadratics(
                    self.model, self._fitted[which], self.task.losses, precision=self._precision
                )
            dots = self._dots(space, vectors_QP)
            self.check(dots.check, self.spec.seed)
            tokens = None
            if self.spec.tokens is not None:
                tokens = TokenDots(self.model, space, self._parts, vectors_QP)
            self._engines = (which, block), dots, sizes, tokens
        return self._engines[1:]

    def _dots(self, space: ParameterSpace, vectors_QP: Tensor) -> GradDots:
        precision = self.spec.sample_precision or self._precision
        return GradDots(self.model, space, self.task.losses, vectors_QP, precision=precision)

    def _vectors(self, s_test: STestSpec, term: Term, block: slice) -> npt.NDArray[np.floating]:
        run = Run(self.run_store.root, s_test)
        return run.read_rows(term.array, block.start, block.stop)

    def _metrics(self, s_test: STestSpec) -> dict[str, Metric | None]:
        """Each layer's quadratic form; relative scores are divided by the root of their sum."""
        solver = s_test.solver
        modules = dict(self.model.named_modules())
        layers = [
            name
            for name in s_test.modules
            if name in modules and isinstance(nearest_rule(modules[name]), MatrixRule)
        ]
        if not layers:
            raise SpecError(
                f"relative influence needs {matrix_layers()} layers, and none was chosen: "
                "leave --relative out"
            )
        for layer in layers:
            if not all(p.requires_grad for p in modules[layer].parameters()):
                raise SpecError(
                    f"relative influence measures whole layers, and '{layer}' is partly frozen: "
                    "leave --relative or the layer out"
                )
        if not solver.uses_curvature:
            return dict.fromkeys(layers)
        operator = GaussNewton(
            self.model,
            ParameterSpace(self.model, layers),
            self.task,
            curvature_samples(self.task, s_test.curvature),
            Draw(s_test.curvature.seed),
            self.batching,
        )
        targets = solver.targets if isinstance(solver, EkFacSettings) else "auto"
        fitted = EkFac(self._damping(s_test), seed=s_test.curvature.seed, targets=targets)
        return {**fitted.metrics(operator, power=1 if self.spec.relative == "loss" else 2)}

    def _damping(self, s_test: STestSpec) -> float:
        """The effective damping of the s_test vectors."""
        table = Run(self.run_store.root, s_test).read_table("solutions")
        return float(table.column("damping")[0].as_py())

    def probe(self) -> Iterator[int]:
        # The s_test vectors may not exist yet. Random vectors take the same time.
        s_test = self.spec.s_tests[0]
        space = ParameterSpace(self.model, s_test.modules)
        vectors_QP = torch.randn(self._blocks[0].stop, space.size)
        dots = self._dots(space, vectors_QP)
        tokens = None
        if self.spec.tokens is not None:
            tokens = TokenDots(self.model, space, self._parts, vectors_QP)
        for ids in self.all_batches():
            batch = self.batch(ids, Draw(self.spec.seed))
            totals_BQ = dots.total(batch)
            if tokens is not None:
                tokens(batch, totals_BQ)
            yield len(ids)
