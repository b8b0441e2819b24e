"""Stability: how much of each method's ranking remains after training from other seeds."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from influence_jobs.errors import SpecError
from influence_jobs.experiments.intervals import mean_interval
from influence_jobs.experiments.stability import overlap, rank_correlation
from influence_jobs.jobs.base import Job, Plan, Progress, Result, Shard
from influence_jobs.jobs.queries import require_queries, write_queries
from influence_jobs.kinds.stability.spec import StabilitySpec
from influence_jobs.specs.base import AnySpec
from influence_jobs.specs.rankings import Ranking
from influence_jobs.store.rankings import digests, needed_runs, query_scores


class StabilityJob(Job[StabilitySpec]):
    """A job without shards: it compares the results of other runs."""

    spec_type = StabilitySpec

    @property
    def title(self) -> str:
        return f"stability {self.spec.task.slug}"

    @staticmethod
    def inputs(spec: StabilitySpec) -> tuple[AnySpec, ...]:
        return needed_runs(_all(spec))

    def input_digests(self) -> dict[str, str]:
        return digests(self.run_store.root, _all(self.spec))

    def plan(self, shard_rows: int | None = None) -> Plan:
        require_queries(self.task, self.spec.queries)
        n = len(self.task.train_data())
        if self.spec.top > n:
            raise SpecError(f"--top {self.spec.top} is too many: there are {n:,} training samples")
        return Plan((), (), units=0, batch_size=self.batch_size)

    def run(self, shard: Shard, progress: Progress) -> Result:
        raise AssertionError("a stability run has no shards")

    def probe(self) -> Iterator[int]:
        yield 0

    def finish(self) -> Result:
        rows = [row for rankings in self.spec.methods for row in self._compared(rankings)]
        files = write_queries(self.run_store, self.task, self.spec.queries)
        files |= self.run_store.write_table("results", pa.Table.from_pylist(rows))
        files |= self.run_store.write_table("summary", pa.Table.from_pylist(_summary(rows)))
        return Result(files=files)

    def _compared(self, rankings: tuple[Ranking, ...]) -> list[dict[str, Any]]:
        rows = []
        for query, item in enumerate(self.spec.queries.items):
            first, *others = (query_scores(self.run_store.root, r, query) for r in rankings)
            rows += [
                {
                    "method": rankings[0].name,
                    "retraining": i,
                    "query": query,
                    "test": item.test,
                    "top": self.spec.top,
                    "overlap": overlap(first, other, self.spec.top, largest=rankings[0].largest),
                    "rank_correlation": rank_correlation(first, other),
                }
                for i, other in enumerate(others, start=1)
            ]
        return rows


def _all(spec: StabilitySpec) -> list[Ranking]:
    return [ranking for rankings in spec.methods for ranking in rankings]


def _summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method: the overlap, first averaged over retrainings, then over queries."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        queries = dict.fromkeys(row["query"] for row in of_method)
        by_query = [
            np.mean([row["overlap"] for row in of_method if row["query"] == query])
            for query in queries
        ]
        mean = mean_interval(np.array(by_query))
        correlations = np.array([row["rank_correlation"] for row in of_method])
        there = correlations[~np.isnan(correlations)]
        found.append(
            {
                "method": method,
                "mean_overlap": mean.mean,
                "low": mean.low,
                "high": mean.high,
                "least": float(min(by_query)),
                "most": float(max(by_query)),
                "mean_rank_correlation": float(there.mean()) if len(there) else float("nan"),
            }
        )
    return found
