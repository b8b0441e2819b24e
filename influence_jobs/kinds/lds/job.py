"""Linear datamodeling score: retrain on random subsets, compare losses with sums of scores."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from influence_jobs.experiments.lds import ceiling, lds, mean_lds
from influence_jobs.jobs.base import Result
from influence_jobs.jobs.subsets import SubsetsJob
from influence_jobs.kinds.lds.spec import LdsSpec
from influence_jobs.training.changes import Changes
from influence_jobs.training.ensemble import Variant


class LdsJob(SubsetsJob[LdsSpec]):
    """The score of every method, over the same subsets."""

    spec_type = LdsSpec

    @property
    def title(self) -> str:
        return f"lds {self.spec.task.slug} {self.spec.subsets} subsets"

    @property
    def indices(self) -> Sequence[int]:
        return range(self.spec.subsets)

    @cached_property
    def sizes(self) -> Sequence[int]:
        if not self.spec.same_run:
            return super().sizes
        return [len(self.task.train_data())] * self.spec.subsets

    def variant(self, row: int) -> Variant:
        variant = super().variant(row)
        if not self.spec.same_run:
            return variant
        return Variant(self.spec.seeds[0], Changes(masked=variant.changes.removed))

    def finish(self) -> Result:
        found_MSQ = self.found()
        found_MQ = found_MSQ.mean(axis=1)
        files = self.write_queries()
        losses = [
            {"subset": i, "query": q, "loss": float(value)}
            for i, row in enumerate(found_MQ)
            for q, value in enumerate(row)
        ]
        files |= self.run_store.write_table("losses", pa.Table.from_pylist(losses))
        rows, summary = [], []
        for ranking in self.spec.rankings:
            predicted_QM = self.predicted(ranking)
            rows += self._by_query(ranking.name, predicted_QM, found_MQ.T)
            mean = mean_lds(predicted_QM, found_MQ.T)
            summary.append(
                {
                    "method": ranking.name,
                    "mean_lds": mean.mean,
                    "low": mean.low,
                    "high": mean.high,
                    "queries": sum(
                        not np.isnan(r["lds"]) for r in rows if r["method"] == ranking.name
                    ),
                }
            )
        files |= self.run_store.write_table("results", pa.Table.from_pylist(rows))
        files |= self.run_store.write_table("summary", pa.Table.from_pylist(summary))
        # Trainings that share their initial weights agree more than the ceiling allows for.
        if len(self.spec.seeds) > 1 and self.spec.own_starts:
            limit = pa.Table.from_pylist([ceiling(found_MSQ)._asdict()])
            files |= self.run_store.write_table("ceiling", limit)
        return Result(files=files)

    def _by_query(
        self,
        method: str,
        predicted_QM: npt.NDArray[np.float64],
        found_QM: npt.NDArray[np.float64],
    ) -> list[dict[str, Any]]:
        rows = []
        for query, item in enumerate(self.spec.queries.items):
            found = lds(predicted_QM[query], found_QM[query])
            rows.append(
                {
                    "method": method,
                    "query": query,
                    "test": item.test,
                    "lds": found.value,
                    "low": found.low,
                    "high": found.high,
                }
            )
        return rows
