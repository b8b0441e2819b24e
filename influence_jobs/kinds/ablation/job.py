"""Ablation: remove or relabel a query's top samples, retrain, and measure the query."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from influence_jobs.errors import SpecError
from influence_jobs.experiments.ablation import new_labels, psnr_falls, summary
from influence_jobs.experiments.stability import head
from influence_jobs.jobs.base import Plan, Result
from influence_jobs.jobs.retraining import RetrainJob
from influence_jobs.kinds.ablation.spec import AblationSpec
from influence_jobs.store.rankings import query_scores
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.training.changes import Changes, num_classes
from influence_jobs.training.ensemble import Variant
from influence_jobs.training.own import require_relabels


@dataclass(frozen=True)
class Cell:
    """One training of the grid. Without a mode, no sample is removed or relabelled."""

    seed: int
    mode: str | None = None
    k: int = 0
    ranking: int = 0
    query: int = 0


class AblationJob(RetrainJob[AblationSpec]):
    """One row for each (seed, mode, k, method, query), after a row for each seed's unchanged model.

    This order keeps variants of one seed and size together. So the variants of a shard share steps,
    and those that are relabelled also share batches.
    """

    spec_type = AblationSpec

    @property
    def title(self) -> str:
        return f"ablation {self.spec.task.slug} {len(self._cells)} trainings"

    @cached_property
    def _cells(self) -> Sequence[Cell]:
        return list(_cells(self.spec))

    @cached_property
    def sizes(self) -> Sequence[int]:
        n = len(self.task.train_data())
        taken_out = not self.spec.same_run
        return [n - cell.k * (cell.mode == "remove" and taken_out) for cell in self._cells]

    def plan(self, shard_rows: int | None = None) -> Plan:
        require_ablation(self.spec, self.task)
        return super().plan(shard_rows)

    def variant(self, row: int) -> Variant:
        cell = self._cells[row]
        if cell.mode is None:
            return Variant(cell.seed)
        ranking = self.spec.rankings[cell.ranking]
        scores_N = query_scores(self.run_store.root, ranking, cell.query)
        ids = head(scores_N, cell.k, largest=ranking.largest)
        if len(ids) < cell.k:
            raise SpecError(
                f"method {ranking.name} scores {len(ids):,} samples only, so it has no top "
                f"{cell.k:,}: choose a smaller --k"
            )
        if cell.mode == "remove":
            changes = Changes(masked=ids) if self.spec.same_run else Changes(removed=ids)
            return Variant(cell.seed, changes)
        labels = new_labels(
            self.spec.relabel,
            ids,
            self.task.targets(self.task.batch(torch.from_numpy(ids), Draw(0))).numpy(),
            int(self._query_labels[cell.query]),
            num_classes=self._num_classes,
            seed=cell.seed,
        )
        return Variant(cell.seed, Changes(relabelled=ids, labels=labels))

    @cached_property
    def _num_classes(self) -> int:
        return num_classes(self.task)

    @cached_property
    def _query_labels(self) -> npt.NDArray[np.int64]:
        tests = torch.tensor([query.test for query in self.spec.queries.items])
        labels: npt.NDArray[np.int64] = self.task.targets(
            self.task.test_batch(tests, Draw(0))
        ).numpy()
        return labels

    @cached_property
    def _beside(self) -> Sequence[Sequence[int]]:
        """For each query the other queries of the same test sample, such as its other regions."""
        tests = [query.test for query in self.spec.queries.items]
        return [
            [other for other, its in enumerate(tests) if its == test and other != query]
            for query, test in enumerate(tests)
        ]

    def finish(self) -> Result:
        rows = self._rows()
        files = self.write_queries()
        files |= self.run_store.write_table("results", pa.Table.from_pylist(rows))
        files |= self.run_store.write_table("summary", pa.Table.from_pylist(summary(rows)))
        return Result(files=files)

    def _rows(self) -> list[dict[str, Any]]:
        losses_VQ, decisions_VQ = self.measured()
        before = {cell.seed: i for i, cell in enumerate(self._cells) if cell.mode is None}

        def decision(row: int, query: int) -> int | None:
            value = decisions_VQ[row, query]
            return None if np.isnan(value) else int(value)

        def elsewhere(row: int, query: int) -> float | None:
            found = losses_VQ[row, self._beside[query]]
            return float(found.mean()) if len(found) else None

        def falls(row: int, cell: Cell) -> dict[str, float | None]:
            if not (self.task.output_loss == "mse" and self.spec.queries.quantity == "loss"):
                return {}
            fall_Q = psnr_falls(losses_VQ[row], losses_VQ[before[cell.seed]])
            beside = fall_Q[self._beside[cell.query]]
            return {
                "psnr_fall": float(fall_Q[cell.query]),
                "psnr_fall_elsewhere": float(beside.mean()) if len(beside) else None,
            }

        return [
            {
                "query": cell.query,
                "test": self.spec.queries.items[cell.query].test,
                "k": cell.k,
                "mode": cell.mode,
                "by": self.spec.rankings[cell.ranking].name,
                "seed": cell.seed,
                "quantity": self.spec.queries.quantity,
                "loss": float(losses_VQ[row, cell.query]),
                "decision": decision(row, cell.query),
                "loss_before": float(losses_VQ[before[cell.seed], cell.query]),
                "decision_before": decision(before[cell.seed], cell.query),
                "loss_elsewhere": elsewhere(row, cell.query),
                "loss_elsewhere_before": elsewhere(before[cell.seed], cell.query),
                **falls(row, cell),
            }
            for row, cell in enumerate(self._cells)
            if cell.mode is not None
        ]


def _cells(spec: AblationSpec) -> Iterator[Cell]:
    for seed in spec.seeds:
        yield Cell(seed)
        for mode in spec.modes:
            for k in spec.sizes:
                for ranking in range(len(spec.rankings)):
                    for query in range(len(spec.queries.items)):
                        yield Cell(seed, mode, k, ranking, query)


def require_ablation(spec: AblationSpec, task: Task) -> None:
    """Refuse a grid that a task cannot have.

    Raises:
        SpecError: A k is larger than the training set, the samples to relabel have no classes, or
            the task's own training takes no labels.
    """
    largest, num_samples, output_loss = max(spec.sizes), len(task.train_data()), task.output_loss
    if largest > num_samples or (largest == num_samples and "remove" in spec.modes):
        raise SpecError(
            f"--k {largest}: there are {num_samples:,} training samples, and removal must leave "
            "some: choose a smaller --k"
        )
    if "relabel" in spec.modes and output_loss != "cross-entropy":
        loss = output_loss if isinstance(output_loss, str) else "its own"
        raise SpecError(
            f"task {spec.task.name} cannot be relabelled: its samples have no classes (its loss is "
            f"{loss}, not cross-entropy); use --mode remove"
        )
    if "relabel" in spec.modes and spec.recipe.trainer == "task":
        require_relabels(task)
