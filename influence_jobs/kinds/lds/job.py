"""Linear datamodeling score: retrain on random subsets, compare losses with sums of scores."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from influence_jobs.experiments.lds import lds, mean_lds, subset
from influence_jobs.jobs.base import Result
from influence_jobs.jobs.retraining import RetrainJob
from influence_jobs.kinds.lds.spec import LdsSpec
from influence_jobs.specs.rankings import Ranking
from influence_jobs.store.rankings import score_blocks
from influence_jobs.training.changes import Changes
from influence_jobs.training.ensemble import Variant

SEED_STEP = 2**32  # distance between the seeds of one subset


class LdsJob(RetrainJob[LdsSpec]):
    """One row for each (subset, seed), with all seeds of a subset together.

    The trainings depend only on recipe, subsets and seeds. So all methods share them, in other runs
    too.
    """

    spec_type = LdsSpec

    @property
    def title(self) -> str:
        return f"lds {self.spec.task.slug} {self.spec.subsets} subsets"

    @cached_property
    def sizes(self) -> Sequence[int]:
        count = self.spec.subsets * len(self.spec.seeds)
        n = len(self.task.train_data())
        return [n if self.spec.same_run else len(self._subset(0))] * count

    def _subset(self, index: int) -> npt.NDArray[np.int64]:
        n = len(self.task.train_data())
        return subset(n, self.spec.fraction, index)

    def variant(self, row: int) -> Variant:
        index, which = divmod(row, len(self.spec.seeds))
        everything = np.arange(len(self.task.train_data()))
        others = np.setdiff1d(everything, self._subset(index), assume_unique=True)
        if self.spec.same_run:
            return Variant(self.spec.seeds[0], Changes(masked=others))
        # Each subset has its own seeds: subsets must not share the noise of training.
        return Variant(index + SEED_STEP * self.spec.seeds[which], Changes(removed=others))

    def finish(self) -> Result:
        losses_VQ = self.measured()[0].astype(np.float64)
        found_MQ = losses_VQ.reshape(self.spec.subsets, len(self.spec.seeds), -1).mean(axis=1)
        files = self.write_queries()
        losses = [
            {"subset": i, "query": q, "loss": float(value)}
            for i, row in enumerate(found_MQ)
            for q, value in enumerate(row)
        ]
        files |= self.run_store.write_table("losses", pa.Table.from_pylist(losses))
        members_NM = self._members()
        rows, summary = [], []
        for ranking in self.spec.rankings:
            predicted_QM = self._predicted(ranking, members_NM)
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
        return Result(files=files)

    def _members(self) -> npt.NDArray[np.bool_]:
        """Whether a sample is in a subset, shape (N, M)."""
        members_NM = np.zeros((len(self.task.train_data()), self.spec.subsets), dtype=bool)
        for index in range(self.spec.subsets):
            members_NM[self._subset(index), index] = True
        return members_NM

    def _predicted(
        self, ranking: Ranking, members_NM: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float64]:
        """Minus the sum of each subset's scores, shape (Q, M).

        Minus, because samples with large scores lower the loss.
        """
        sums_QM = np.zeros((len(self.spec.queries.items), self.spec.subsets))
        for start, block in score_blocks(self.run_store.root, ranking):
            members = members_NM[start : start + block.shape[1]].astype(np.float64)
            sums_QM += np.nan_to_num(block, nan=0.0) @ members  # an excluded sample counts as 0
        return -sums_QM

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
