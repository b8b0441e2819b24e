"""Linear datamodeling score: retrain on random subsets, and compare the losses with sums of scores."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from influence_jobs.experiments.intervals import mean_interval
from influence_jobs.experiments.lds import lds, subset
from influence_jobs.jobs.base import Result
from influence_jobs.jobs.rankings import score_blocks
from influence_jobs.jobs.retraining import RetrainJob
from influence_jobs.specs import LdsSpec, Ranking
from influence_jobs.training.changes import Changes
from influence_jobs.training.ensemble import Variant


class LdsJob(RetrainJob[LdsSpec]):
    """One row for each (subset, seed), all seeds of a subset together.

    The trainings depend on nothing but recipe, subsets and seeds: every method, also in another run, uses the same.
    """

    spec_type = LdsSpec

    @property
    def title(self) -> str:
        return f"lds {self.spec.task.slug} {self.spec.subsets} subsets"

    @cached_property
    def sizes(self) -> Sequence[int]:
        return [len(self._subset(0))] * (self.spec.subsets * len(self.spec.seeds))

    def _subset(self, index: int) -> npt.NDArray[np.int64]:
        n = len(self.task.train_data())
        return subset(n, self.spec.fraction, seed=self.spec.subset_seed, index=index)

    def variant(self, row: int) -> Variant:
        index, which = divmod(row, len(self.spec.seeds))
        everything = np.arange(len(self.task.train_data()))
        removed = np.setdiff1d(everything, self._subset(index), assume_unique=True)
        # Seeds of its own for each subset: noise of the training must not be common to all.
        seed = self.spec.seeds[which] + index * (max(self.spec.seeds) + 1)
        return Variant(seed, Changes(removed=removed))

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
        rows = [
            row
            for ranking in self.spec.rankings
            for row in self._by_query(ranking, members_NM, found_MQ)
        ]
        files |= self.run_store.write_table("results", pa.Table.from_pylist(rows))
        files |= self.run_store.write_table("summary", pa.Table.from_pylist(_summary(rows)))
        return Result(files=files)

    def _members(self) -> npt.NDArray[np.bool_]:
        """Which samples each subset has, (N, M)."""
        members_NM = np.zeros((len(self.task.train_data()), self.spec.subsets), dtype=bool)
        for index in range(self.spec.subsets):
            members_NM[self._subset(index), index] = True
        return members_NM

    def _by_query(
        self,
        ranking: Ranking,
        members_NM: npt.NDArray[np.bool_],
        found_MQ: npt.NDArray[np.float64],
    ) -> list[dict[str, Any]]:
        sums_QM = np.zeros(found_MQ.T.shape)
        for start, block in score_blocks(self.run_store.root, ranking):
            members = members_NM[start : start + block.shape[1]].astype(np.float64)
            sums_QM += np.nan_to_num(block, nan=0.0) @ members  # samples left out score nothing
        sign = -1.0 if ranking.largest else 1.0  # what ranks first lowers the loss
        rows = []
        for query, item in enumerate(self.spec.queries.items):
            found = lds(sign * sums_QM[query], found_MQ[:, query])
            rows.append(
                {
                    "method": ranking.name,
                    "query": query,
                    "test": item.test,
                    "lds": found.value,
                    "low": found.low,
                    "high": found.high,
                }
            )
        return rows


def _summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean over queries with its interval, by method; queries without a correlation do not count."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        values = np.array([row["lds"] for row in rows if row["method"] == method])
        there = values[~np.isnan(values)]
        mean = mean_interval(there) if len(there) else (float("nan"),) * 3
        found.append(
            {
                "method": method,
                "mean_lds": mean[0],
                "low": mean[1],
                "high": mean[2],
                "queries": len(there),
            }
        )
    return found
