"""Self-influence: a quadratic form of every training sample's gradient."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F

from influence_jobs.curvature import EkFac, GaussNewton, make_solver
from influence_jobs.curvature.ek_fac_factors import likely_bytes
from influence_jobs.errors import ModelError
from influence_jobs.gradients import GradQuadratics, Metric
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.jobs.base import Plan, Progress, Result, Shard
from influence_jobs.jobs.rows import Rows
from influence_jobs.jobs.samples import SampleJob, trained_inputs
from influence_jobs.jobs.saved_state import SavedFactors
from influence_jobs.kinds.s_test.job import curvature_samples
from influence_jobs.kinds.self_influence.spec import SelfInfluenceSpec
from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.specs.base import AnySpec
from influence_jobs.store.layout import (
    LABELS,
    LOSSES_OF_ROWS,
    PREDICTED,
    PROBABILITY,
    SELF_INFLUENCE,
    ArrayLayout,
    chunk_rows,
)
from influence_jobs.tasks.base import Batch, Draw
from influence_jobs.tasks.output_loss import has_one_class_each
from influence_jobs.terms import stored_as

SHARD_TABLES = "damping"  # folder with one table for each shard
EVIDENCE = {
    LOSSES_OF_ROWS: "the sample's own training loss",
    LABELS: "the class that the training set gives the sample",
    PREDICTED: "the class that the model finds most likely",
    PROBABILITY: "the model's probability of the predicted class",
}


class SelfInfluenceJob(SampleJob[SelfInfluenceSpec]):
    """Each sample has its self-influence and its loss; one of a class also what the model says.

    The factors of the curvature are kept in the run's folder while it is at work, so that other
    workers and a resumed run do not compute them again.
    """

    spec_type = SelfInfluenceSpec
    passes = 1
    _notes: Sequence[str] = ()

    @property
    def title(self) -> str:
        return f"self-influence {self.spec.task.slug} {self.spec.solver.name}"

    @staticmethod
    def inputs(spec: SelfInfluenceSpec) -> tuple[AnySpec, ...]:
        return trained_inputs((spec.checkpoint,))

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return (self.spec.checkpoint,)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, stored_as(self.spec.precision))
        return found

    @cached_property
    def _evidence(self) -> tuple[str, ...]:
        return (LOSSES_OF_ROWS, *((LABELS, PREDICTED, PROBABILITY) if self._classes else ()))

    @cached_property
    def _classes(self) -> bool:
        return has_one_class_each(self.task)

    @property
    def meaning(self) -> dict[str, str]:
        """Quantity, sign and unit, stored as attributes of the array."""
        if self.spec.solver.uses_curvature:
            return {
                "quantity": "g^T (G + lambda I)^-1 g of the gradient g of the sample's loss: N x "
                "the predicted rise of its own loss when it is removed",
                "sign": "never negative; large = the model fits the sample only because it has "
                "seen it",
                "unit": "loss",
            }
        return {
            "quantity": "the squared norm of the gradient of the sample's loss",
            "sign": "never negative",
            "unit": "squared gradient norm",
        }

    def layouts(self) -> tuple[ArrayLayout, ...]:
        n, stored = self.num_rows, stored_as(self.spec.precision)
        rows = chunk_rows(n, np.dtype(stored).itemsize)
        whole = {LABELS, PREDICTED}
        meanings = {SELF_INFLUENCE: self.meaning} | {
            name: {"quantity": EVIDENCE[name]} for name in self._evidence
        }
        return tuple(
            ArrayLayout(
                name=name,
                shape=(n,),
                row_axis=0,
                chunk_rows=rows,
                dims=("sample",),
                dtype="int32" if name in whole else stored,
                attributes=meaning,
            )
            for name, meaning in meanings.items()
        )

    def held_bytes(self, plan: Plan) -> int:
        # Factors, and what the eigenvectors take.
        space = ParameterSpace(self.task.model(), self.spec.modules)
        return plan.largest_shard_bytes + 2 * likely_bytes(space.parameters())

    def run(self, shard: Shard, progress: Progress) -> Result:
        progress(done := 0)
        self.load(self.spec.checkpoint)
        found, checks = Rows(shard), self.checks(shard)
        for ids, values in self.each(shard, Draw(self.spec.seed), self._values):
            checks.finite("the self-influence", values[SELF_INFLUENCE], ids)
            checks.finite("the loss", values[LOSSES_OF_ROWS], ids)
            found.add(ids, values)
            done += len(ids)
            progress(done)
        tables = {}
        if self._damping is not None:
            # One table for each shard: two shards must not write to one file.
            tables[f"{SHARD_TABLES}/{shard.id}"] = pa.table({"damping": [self._damping]})
        return Result(found.arrays(checks), tables=tables)

    def _values(self, ids: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        forms_B = torch.stack([*self._engine(batch).values()]).double().sum(dim=0)
        return {SELF_INFLUENCE: forms_B, **self._said(ids, batch)}

    @torch.no_grad()
    def _said(self, ids: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """What the model says of the samples, by array."""
        losses_B = self.task.losses(self.model, batch)
        if not self._classes:
            return {LOSSES_OF_ROWS: losses_B}
        outputs_BC = self.task.outputs(self.model, batch)
        if outputs_BC.ndim != 2:
            raise ModelError(
                f"outputs() of {type(self.task).__name__} has shape {tuple(outputs_BC.shape)} for "
                f"{len(ids)} samples that have one class each, and (samples, classes) is needed"
            )
        probability_B, predicted_B = F.softmax(outputs_BC.double(), dim=1).max(dim=1)
        return {
            LOSSES_OF_ROWS: losses_B,
            LABELS: self.task.targets(batch),
            PREDICTED: predicted_B,
            PROBABILITY: probability_B,
        }

    @cached_property
    def _fitted(self) -> tuple[dict[str, Metric | None], float | None]:
        """Each layer's quadratic form, and lambda; the weights must be in the model."""
        spec = self.spec
        solver = make_solver(spec.solver, seed=spec.curvature.seed)
        if not isinstance(solver, EkFac):
            return dict.fromkeys(spec.modules), None
        solver.saved = SavedFactors(self.run_store.files)
        operator = self._operator()
        return {**solver.metrics(operator, power=1)}, solver.damping_for(operator)

    def _operator(self) -> GaussNewton:
        spec = self.spec
        return GaussNewton(
            self.model,
            ParameterSpace(self.model, spec.modules),
            self.task,
            curvature_samples(self.task, spec.curvature),
            Draw(spec.curvature.seed),
            self.batching,
        )

    @property
    def _damping(self) -> float | None:
        return self._fitted[1]

    @cached_property
    def _engine(self) -> GradQuadratics:
        engine = GradQuadratics(
            self.model, self._fitted[0], self.task.losses, precision=self.spec.precision
        )
        self.check(engine.check, self.spec.seed)
        return engine

    def probe(self) -> Iterator[int]:
        # The checkpoint may not exist yet. Untrained weights, and no curvature, take as long.
        if self.spec.solver.uses_curvature:
            solver = make_solver(self.spec.solver, seed=self.spec.curvature.seed)
            operator = self._operator()
            vectors_QP = torch.zeros(1, operator.space.size, dtype=self.dtype, device=self.device)
            said = solver.trial(operator, vectors_QP, self.spec.solver.passes).said
            self._notes = [
                f"besides, each worker's first shard needs the factors: {'; '.join(said)}"
            ]
        engine = GradQuadratics(
            self.model,
            dict.fromkeys(self.spec.modules),
            self.task.losses,
            precision=self.spec.precision,
        )
        for ids in self.all_batches():
            batch = self.batch(ids, Draw(self.spec.seed))
            engine(batch)
            self._said(ids, batch)
            yield len(ids)

    def notes(self) -> Sequence[str]:
        return self._notes

    def finish(self) -> Result:
        run, plan = self.run_store, self.run_store.plan()
        files = self.write_samples()
        if self.spec.solver.uses_curvature:
            shards = plan["shards"] if plan else []
            tables = [run.read_table(f"{SHARD_TABLES}/{shard['id']}") for shard in shards]
            files |= run.write_table("curvature", pa.concat_tables(tables).slice(0, 1))
            SavedFactors(run.files).delete()
        return Result(files=files)
