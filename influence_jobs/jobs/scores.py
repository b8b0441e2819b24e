"""The base of jobs with scores (Q, N). A shard is a range of training samples."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from influence_jobs.jobs.base import Progress, Result, Shard
from influence_jobs.jobs.queries import require_queries, write_queries
from influence_jobs.jobs.rows import Checks, Numbers, Rows
from influence_jobs.jobs.samples import SampleJob
from influence_jobs.specs.scores import ScoresSpec
from influence_jobs.store.layout import SCORES, ArrayLayout, chunk_rows, part_name
from influence_jobs.terms import ScorePrecision
from influence_jobs.transfers import loader_for

QUERIES_PER_CHUNK = 64

S = TypeVar("S", bound=ScoresSpec)

# By array name: scores of every query for the samples of a batch, shape (Q, B).
Scores = Mapping[str, Numbers]


def sides_of(quantity: str) -> dict[str, str]:
    """Sign and unit of scores of influence, as attributes of their arrays."""
    ends = "helpful" if quantity == "loss" else f"it lowers the {quantity}"
    other = "harmful" if quantity == "loss" else f"it raises the {quantity}"
    return {"sign": f"positive = {ends}, negative = {other}", "unit": quantity}


def scores_layout(
    name: str,
    num_queries: int,
    num_samples: int,
    *,
    dtype: ScorePrecision,
    attributes: Mapping[str, str],
) -> ArrayLayout:
    """The layout of scores (Q, N) whose rows are the samples."""
    row_bytes = np.dtype(dtype).itemsize * min(num_queries, QUERIES_PER_CHUNK)
    return ArrayLayout(
        name=name,
        shape=(num_queries, num_samples),
        row_axis=1,
        chunk_rows=chunk_rows(num_samples, row_bytes),
        chunk_leading=QUERIES_PER_CHUNK,
        dims=("query", "sample"),
        dtype=dtype,
        attributes=attributes,
    )


class ScoresJob(SampleJob[S]):
    """Base of the jobs that compute a score for every (query, training sample)."""

    @property
    def terms(self) -> int:
        """Number of terms that scores are the sum of, such as checkpoints or noise draws."""
        return 1

    @property
    def kept_layers(self) -> tuple[str, ...]:
        """The layers whose scores are also kept."""
        return ()

    @property
    def stored(self) -> ScorePrecision:
        """The dtype of the scores' arrays."""
        return "float32"

    @property
    @abstractmethod
    def meaning(self) -> dict[str, str]:
        """Quantity, sign and unit of the scores, stored as attributes of the arrays."""

    def fetch(self, term: int, ids: torch.Tensor) -> Any:
        """What a term needs of the samples, on the device; for a GPU it is fetched in advance."""
        return None

    @abstractmethod
    def score(self, term: int, ids: torch.Tensor, fetched: Any, checks: Checks) -> Scores:
        """One term of the scores of training samples, by array name.

        Args:
            term: Its number.
            ids: Samples of one chunk: any of them, or, if the job `reads_samples` not, neighbours.
            fetched: From `fetch`.
            checks: Takes what must hold of the scores.
        """

    @property
    def title(self) -> str:
        return f"{self.spec.kind} {self.spec.task.slug} {len(self.spec.queries.items)} queries"

    @property
    def passes(self) -> int:
        return self.terms

    def layouts(self) -> tuple[ArrayLayout, ...]:
        n, q = self.num_rows, len(self.spec.queries.items)
        names = {SCORES: "all", **{part_name(layer): layer for layer in self.kept_layers}}
        return tuple(
            scores_layout(name, q, n, dtype=self.stored, attributes={**self.meaning, "of": of})
            for name, of in names.items()
        )

    def run(self, shard: Shard, progress: Progress) -> Result:
        require_queries(self.task, self.spec.queries)
        progress(done := 0)
        found, checks = Rows(shard, axis=1), self.checks(shard)
        for term in range(self.terms):
            for ids, scores in self.batching.map(
                partial(self.score, term, checks=checks),
                self.chunks(shard),
                fetch=partial(self.fetch, term),
                loader=loader_for(self.device),
            ):
                found.add(ids, scores)
                done += len(ids)
                progress(done)
        return Result(found.arrays(checks))

    def probe(self) -> Iterator[int]:
        checks = self.checks(None)
        for ids in self.all_batches():
            self.score(0, ids, self.fetch(0, ids), checks)
            yield len(ids)

    def finish(self) -> Result:
        queries = write_queries(self.run_store, self.task, self.spec.queries)
        return Result(files={**queries, **self.write_samples()})
