"""s_test vectors: a query's gradient times the inverse of the curvature of the training loss."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from influence_jobs.curvature import (
    ConjugateGradient,
    EkFac,
    GaussNewton,
    Hessian,
    Operator,
    Solution,
    make_solver,
)
from influence_jobs.curvature.ek_fac_factors import likely_bytes
from influence_jobs.curvature.halves import cosines_of_halves
from influence_jobs.curvature.solver import Solver, Trial
from influence_jobs.curvature.source import Segment, Source
from influence_jobs.errors import SpecError
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.jobs.base import Job, Plan, Progress, Result, Shard
from influence_jobs.jobs.queries import query_gradients, require_queries, write_queries
from influence_jobs.jobs.recipe import scheduled_damping
from influence_jobs.jobs.samples import trained_inputs
from influence_jobs.jobs.saved_state import SavedFactors
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.kinds.s_test.terms import Stretch, stretches_of, terms_of
from influence_jobs.kinds.train.spec import TrainedCheckpoint
from influence_jobs.specs.base import AnySpec
from influence_jobs.specs.solvers import Curvature, DampedSettings, SourceSettings
from influence_jobs.store.checkpoints import load_checkpoint, recorded_digest
from influence_jobs.store.layout import (
    S_TEST,
    S_TEST_VARIANCE,
    ArrayLayout,
    repeat_name,
    segment_name,
)
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.placement import converted, copy_of, device_of
from influence_jobs.terms import ScorePrecision, stored_as

# A block of queries, which is a chunk, shares each product. The bytes limit a shard's vectors.
MAX_QUERIES, MAX_BLOCK_BYTES = 64, 64 * 2**20
# Repeats in a shard: side by side they take 3/4 of the time, but more shards occupy more workers.
MAX_REPEATS = 3
# Blocks of vectors at a time: the queries' gradients, solution, residual and direction, and of a
# product the vectors, their part of a batch, and a sum in float64.
VECTORS_HELD = 8
SHARD_TABLES = "solutions"  # folder with one table for each shard
SAMPLES_DRAW = 2**32  # Philox key of the subset; solvers use other keys
# Queries whose s_test are compared between halves of a subset, and the cosine below which it warns.
COMPARED, STABLE = 3, 0.9


class STestJob(Job[STestSpec]):
    """A shard is some blocks of queries, with some of their repeats."""

    spec_type = STestSpec
    _notes: Sequence[str] = ()

    @property
    def title(self) -> str:
        return f"s-test {self.spec.task.slug} {self.spec.solver.name}"

    @staticmethod
    def inputs(spec: STestSpec) -> tuple[AnySpec, ...]:
        return trained_inputs((spec.checkpoint,))

    def input_digests(self) -> dict[str, str]:
        checkpoints = [term.checkpoint for term in terms_of(self.spec)] + [self.spec.checkpoint]
        trained = [c for c in checkpoints if isinstance(c, TrainedCheckpoint)]
        root = self.run_store.root
        return {f"{c.train.run_id}@{c.epoch}": recorded_digest(root, c) for c in trained}

    @property
    def _stored(self) -> ScorePrecision:
        return stored_as(self.spec.precision)

    @cached_property
    def _repeats(self) -> int:
        return self.spec.solver.num_repeats

    @cached_property
    def _space(self) -> ParameterSpace:
        return ParameterSpace(self._model, self.spec.modules)

    def plan(self, shard_rows: int | None = None) -> Plan:
        require_queries(self.task, self.spec.queries)
        num_queries, size = len(self.spec.queries.items), self._space.size
        row_bytes = np.dtype(self._stored).itemsize * size
        block = max(1, min(MAX_QUERIES, MAX_BLOCK_BYTES // row_bytes, num_queries))
        rows = -(-(shard_rows or block) // block) * block
        names = list(dict.fromkeys(term.array for term in terms_of(self.spec)))
        if self._repeats > 1:
            names += [S_TEST_VARIANCE, *(repeat_name(r) for r in range(self._repeats))]
        arrays = tuple(
            ArrayLayout(
                name=name,
                shape=(num_queries, size),
                row_axis=0,
                chunk_rows=block,
                dims=("query", "parameter"),
                dtype=self._stored,
                attributes={
                    "quantity": _quantity(name, self.spec),
                    "parameters": [[n, list(shape)] for n, shape in self._space.shapes.items()],
                },
            )
            for name in names
        )
        fitting = min(MAX_REPEATS, MAX_BLOCK_BYTES // (row_bytes * block))
        groups = np.array_split(range(self._repeats), -(-self._repeats // max(1, fitting)))
        shards = tuple(
            Shard(f"{repeats[0]:03d}-{start:06d}-{min(start + rows, num_queries):06d}", start,
                  min(start + rows, num_queries), part=int(repeats[0]), parts=len(repeats))
            for repeats in groups
            for start in range(0, num_queries, rows)
        )  # fmt: skip
        units = sum(self._units(shard) for shard in shards)
        return Plan(arrays, shards, units=units, batch_size=self.batch_size)

    def _units(self, shard: Shard) -> int:
        return len(self._samples) * shard.parts

    def run(self, shard: Shard, progress: Progress) -> Result:
        load_checkpoint(self._model, self.run_store.root, self.spec.checkpoint)
        progress(0)
        if isinstance(self.spec.solver, SourceSettings):
            return self._run_source(shard, self.spec.solver, progress)
        block = self.plan().arrays[0].chunk_rows
        starts = range(shard.start, shard.stop, block)
        repeats, units = shard.repeats, self._units(shard)
        vectors: dict[int, list[npt.NDArray[np.floating[Any]]]] = {r: [] for r in repeats}
        rows = []
        solver = self._solver
        for i, start in enumerate(starts):
            stop = min(start + block, shard.stop)
            rhs_QP = query_gradients(
                self.task, self._model, self._space, self.spec.queries, start, stop
            )

            def solved(fraction: float, blocks_done: int = i) -> None:
                progress(round((blocks_done + fraction) / len(starts) * units))

            solutions = solver.solve_repeats(self._operator, rhs_QP, repeats, solved)
            for repeat, solution in zip(repeats, solutions, strict=True):
                vectors[repeat].append(solution.x_QP.cpu().numpy())
                said = dict[str, Any]()
                if start == repeat == 0:
                    said = self._said(solution.damping, rhs_QP)
                    said["messages"] += solution.record.get("messages", ())
                rows += _rows(solution, start, repeat, said)
        found = {
            repeat_name(repeat) if self._repeats > 1 else S_TEST: np.concatenate(blocks)
            for repeat, blocks in vectors.items()
        }
        return Result(found, tables=_table(shard, rows))

    @cached_property
    def _solver(self) -> Solver:
        solver = make_solver(self.spec.solver, seed=self.spec.curvature.seed)
        if isinstance(solver, EkFac):
            solver.saved = SavedFactors(self.run_store.files)
        return solver

    def held_bytes(self, plan: Plan) -> int:
        block = plan.arrays[0].chunk_rows
        vector_bytes = np.dtype(self._stored).itemsize * self._space.size
        held = plan.largest_shard_bytes + VECTORS_HELD * block * vector_bytes
        if self.spec.solver.needs_factors:
            held += 2 * likely_bytes(self._space.parameters())  # and what the eigenvectors take
        return held

    def _run_source(self, shard: Shard, settings: SourceSettings, progress: Progress) -> Result:
        rhs_QP = query_gradients(
            self.task, self._model, self._space, self.spec.queries, shard.start, shard.stop
        )
        stretches, units = stretches_of(self.spec), self._units(shard)
        found: dict[str, npt.NDArray[Any]] = {}
        rows: list[dict[str, Any]] = []

        def solved(fraction: float) -> None:
            progress(round((len(found) + fraction) / len(stretches) * units))

        solver = Source(settings.exponential, seed=self.spec.curvature.seed)
        segments = (self._segment(stretch) for stretch in reversed(stretches))
        for solution in solver.solve(segments, rhs_QP, solved):
            number = len(stretches) - 1 - len(found)
            stretch = stretches[number]
            found[segment_name(number)] = solution.x_QP.cpu().numpy()
            time = stretch.time(len(self.task.train_data()))
            record: dict[str, Any] = {"messages": []}
            if shard.start == 0 and number == len(stretches) - 1:
                record = self._said(1 / time, rhs_QP)
            record["messages"] += solution.messages
            rows += [
                {
                    "query": query,
                    "repeat": 0,
                    "segment": number + 1,
                    "epochs": f"{stretch.begin} to {stretch.end}",
                    "checkpoints": len(stretch.checkpoints),
                    "time": time,
                    "products": solution.products,
                    "record": json.dumps(record),
                }
                for query in range(shard.start, shard.stop)
            ]
        return Result(found, tables=_table(shard, rows))

    def _segment(self, stretch: Stretch) -> Segment:
        """A segment, with a model for each of its checkpoints."""
        operators = []
        for checkpoint in stretch.checkpoints:
            model = copy_of(self._model)
            load_checkpoint(model, self.run_store.root, checkpoint)
            operators.append(self._gauss_newton(model))
        train = stretch.checkpoints[0].train
        return Segment(operators, stretch.time(len(self.task.train_data())), train.weight_decay)

    def _said(self, damping: float, rhs_QP: torch.Tensor) -> dict[str, Any]:
        """What the record of a run's first row says of lambda and of the samples."""
        messages = self._defaults
        if not self._of_subset:
            return {"messages": messages}
        solver: Solver = ConjugateGradient()
        if self.spec.solver.needs_factors:
            solver = EkFac(seed=self.spec.curvature.seed)
        try:
            cosines = cosines_of_halves(solver, self._operator, rhs_QP[:COMPARED], damping)
        except SpecError:  # only of a Hessian: what makes all of it positive may not make a half so
            said = (
                "s_test vectors of two halves of these samples cannot be compared: lambda does not "
                "make both their curvatures positive; more --curvature-samples make them alike"
            )
            return {"messages": [*messages, said]}
        said = f"s_test vectors of two halves of these samples have cosines from {min(cosines):.2f}"
        if min(cosines) < STABLE:
            said += f", below {STABLE:g}: more --curvature-samples make them more stable"
        return {"cosines_of_halves": cosines, "messages": [*messages, said]}

    @property
    def _defaults(self) -> list[str]:
        """Where lambda comes from, and which samples the curvature is of, in lines."""
        solver, lines, n = self.spec.solver, list[str](), len(self.task.train_data())
        scheduled = scheduled_damping(self.spec.checkpoint, n)
        if not isinstance(solver, DampedSettings):
            pass
        elif solver.damping is None:
            more = ""
            if self.spec.curvature.operator == "hessian":
                more = ", and what makes the smallest positive"
            lines.append(f"lambda is {solver.damping_share:g} of the largest eigenvalue{more}")
        elif scheduled is not None and solver.damping == scheduled.value:
            lines.append(f"lambda is {scheduled.how} of the training")
        if self._of_subset:
            lines.append(
                f"curvature of {len(self._samples):,} of {n:,} samples; --curvature-samples all "
                "takes all"
            )
        return lines

    @property
    def _of_subset(self) -> bool:
        """Whether the curvature is of a subset that can be halved."""
        uses, n = self.spec.solver.uses_curvature, len(self.task.train_data())
        return uses and 1 < len(self._samples) < n

    def probe(self) -> Iterator[float]:
        notes: list[str] = []
        if self._weights_exist:
            load_checkpoint(self._model, self.run_store.root, self.spec.checkpoint)
        elif self.spec.solver.uses_curvature:
            notes.append("measured with untrained weights, as there are no others yet")
        rhs_QP = torch.randn(self.plan().arrays[0].chunk_rows, self._space.size).to(
            device_of(self._model), next(self._model.parameters()).dtype
        )
        trial = self._trial(rhs_QP)
        if self._of_subset:
            notes.append(
                "at the end the s_test of two halves of these samples are compared, which takes up "
                "to as long again"
            )
        self._notes = [*notes, *self._defaults, *trial.said]
        for fraction in trial.pieces:
            yield fraction * len(self._samples)

    def _trial(self, rhs_QP: torch.Tensor) -> Trial:
        settings, n = self.spec.solver, len(self.task.train_data())
        if not isinstance(settings, SourceSettings):
            solver = make_solver(settings, seed=self.spec.curvature.seed)
            return solver.trial(self._operator, rhs_QP, settings.passes)
        source = Source(settings.exponential, seed=self.spec.curvature.seed)
        assert isinstance(self._operator, GaussNewton)
        segments = [
            (Segment([self._operator], stretch.time(n)), len(stretch.checkpoints))
            for stretch in stretches_of(self.spec)
        ]
        return source.trial(segments, rhs_QP)

    def notes(self) -> Sequence[str]:
        return self._notes

    @property
    def _weights_exist(self) -> bool:
        checkpoint = self.spec.checkpoint
        if not isinstance(checkpoint, TrainedCheckpoint):
            return True
        return bool(recorded_digest(self.run_store.root, checkpoint))

    @cached_property
    def _model(self) -> torch.nn.Module:
        return converted(self.task, self.device, getattr(torch, self._stored))[0]

    @cached_property
    def _samples(self) -> torch.Tensor:
        return curvature_samples(self.task, self.spec.curvature)

    @cached_property
    def _operator(self) -> Operator:
        curvature = self.spec.curvature
        # The identity solver uses neither. The Hessian needs only the losses of a task.
        if curvature.operator == "gauss-newton" and self.spec.solver.uses_curvature:
            return self._gauss_newton(self._model)
        return Hessian(
            self._model,
            self._space,
            self.task,
            self._samples,
            Draw(curvature.seed),
            self.batching,
            finite_difference=curvature.product == "finite-difference",
        )

    def _gauss_newton(self, model: torch.nn.Module) -> GaussNewton:
        draw = Draw(self.spec.curvature.seed)
        space = self._space.of(model)
        return GaussNewton(model, space, self.task, self._samples, draw, self.batching)

    def finish(self) -> Result:
        run, spec = self.run_store, self.spec
        plan = run.plan()
        shards = plan["shards"] if plan else []
        names = [f"{SHARD_TABLES}/{shard['id']}" for shard in shards]
        tables = pa.concat_tables([run.read_table(name) for name in names])
        order = [name for name in ("query", "repeat", "segment") if name in tables.column_names]
        files = run.write_table("solutions", tables.sort_by([(o, "ascending") for o in order]))
        files |= write_queries(run, self.task, spec.queries)
        SavedFactors(run.files).delete()
        if self._repeats == 1:
            return Result(files=files)
        mean = np.empty(run.array(S_TEST).shape, dtype=self._stored)
        variance = np.empty_like(mean)
        for row in range(len(mean)):
            names = [repeat_name(repeat) for repeat in range(self._repeats)]
            # In float64: the variance is a small difference of large numbers.
            found = np.concatenate([run.read_rows(n, row, row + 1) for n in names]).astype(
                np.float64
            )
            mean[row], variance[row] = found.mean(axis=0), found.var(axis=0, ddof=1)
        return Result({S_TEST: mean, S_TEST_VARIANCE: variance}, files)


def curvature_samples(task: Task, curvature: Curvature) -> torch.Tensor:
    """Ids of the samples that the curvature is measured on, ascending: all or a random subset."""
    n = len(task.train_data())
    if curvature.samples is None or curvature.samples >= n:
        return torch.arange(n)
    generator = np.random.Generator(np.random.Philox(key=[curvature.seed, SAMPLES_DRAW]))
    return torch.from_numpy(np.sort(generator.choice(n, curvature.samples, replace=False)))


def _table(shard: Shard, rows: list[dict[str, Any]]) -> dict[str, pa.Table]:
    # One table for each shard: two shards must not write to one file.
    return {f"{SHARD_TABLES}/{shard.id}": pa.Table.from_pylist(rows)}


def _rows(
    solution: Solution, start: int, repeat: int, said: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The rows of a solution in the table, one for each query; `said` is added to the record."""
    return [
        {
            "query": start + i,
            "repeat": repeat,
            "damping": solution.damping,
            "residual": float(solution.residual_Q[i]),
            "iterations": int(solution.iterations_Q[i]),
            "gradient_equivalents": solution.gradient_equivalents,
            "record": json.dumps({**solution.record, **said}),
        }
        for i in range(len(solution.x_QP))
    ]


def _quantity(name: str, spec: STestSpec) -> str:
    if name == S_TEST_VARIANCE:
        return "variance over repeats of each entry of s_test"
    if isinstance(spec.solver, SourceSettings):
        stretch = stretches_of(spec)[int(name.rpartition("/")[2]) - 1]
        return (
            "(1 - exp(-t curvature)) / curvature times the gradient of the query's "
            f"{spec.queries.quantity} at the end of the segment, epochs {stretch.begin} to "
            f"{stretch.end}"
        )
    which = "" if name == S_TEST else ", one repeat"
    return f"(curvature + lambda I)^-1 gradient of the query's {spec.queries.quantity}{which}"
