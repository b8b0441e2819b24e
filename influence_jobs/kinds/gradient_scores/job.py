"""Scores from stored projected gradients: reads runs, and neither the model nor the data."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from influence_jobs.jobs.base import Plan, Result
from influence_jobs.jobs.rows import Checks
from influence_jobs.jobs.samples import MAX_SHARD_BYTES, row_bytes, trained_inputs
from influence_jobs.jobs.scores import Scores, ScoresJob
from influence_jobs.kinds.gradient_index.spec import DAMPING, gram_of
from influence_jobs.kinds.gradient_index.vectors import ScoreVectors
from influence_jobs.kinds.gradient_scores.spec import GradientScoresSpec
from influence_jobs.kinds.gradients.store import GradientStore
from influence_jobs.kinds.gram.spec import GramSpec
from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.methods.projected import margin_factors, preconditioned
from influence_jobs.specs.base import AnySpec
from influence_jobs.store.layout import GRAM, SCORES, part_name
from influence_jobs.store.run import Run

_MEANING = {
    "influence": "projected q^T (G + lambda I)^-1 g, an estimate of N x the predicted rise of the "
    "query's {quantity} when the sample is removed",
    "trak": "TRAK: an estimate of N x the predicted fall of the query's margin when the sample is "
    "removed",
    "dot": "dot product of the two projected gradients",
    "cosine": "cosine of the two projected gradients",
}
_UNIT = {"influence": "{quantity}", "trak": "margin", "dot": "{quantity}", "cosine": "cosine"}

Rows = npt.NDArray[np.float32]


class GradientScoresJob(ScoresJob[GradientScoresSpec]):
    """The scores have one term for every store."""

    spec_type = GradientScoresSpec
    reads_data = False
    reads_samples = False

    @staticmethod
    def inputs(spec: GradientScoresSpec) -> tuple[AnySpec, ...]:
        trained = trained_inputs(tuple(store.checkpoint for store in spec.gradients))
        return (*trained, *spec.gradients, *spec.of_queries, *_derived(spec))

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return ()

    def input_digests(self) -> dict[str, str]:
        spec = self.spec
        specs = (*spec.gradients, *spec.of_queries, *_derived(spec))
        runs = [Run(self.run_store.root, one) for one in specs]
        return {run.id: run.digest() for run in runs}

    @property
    def num_rows(self) -> int:
        return self._stores[0].num_rows

    @property
    def batch_size(self) -> int:
        return self._batch_size or 1024  # a chunk at most

    def plan(self, shard_rows: int | None = None) -> Plan:
        if self.spec.approximate and not shard_rows:
            # An index is asked once, so the only cost of a shard is its overhead.
            shard_rows = MAX_SHARD_BYTES // row_bytes(self.layouts())
        return super().plan(shard_rows)

    @property
    def terms(self) -> int:
        return len(self.spec.gradients)

    @property
    def kept_layers(self) -> tuple[str, ...]:
        return tuple(self._stores[0].groups) if self.spec.keep_modules else ()

    @property
    def meaning(self) -> dict[str, str]:
        spec, quantity = self.spec, self.spec.queries.quantity
        said = _MEANING[spec.method].format(quantity=quantity)
        if len(spec.gradients) > 1:
            over = {"sum": "summed", "mean": "averaged"}[spec.combine]
            said += f", {over} over {len(spec.gradients)} stores"
        if spec.approximate:
            said += f"; only the {spec.approximate} largest and smallest that an index finds"
        helps = "helpful" if quantity == "loss" else f"it lowers the {quantity}"
        harms = "harmful" if quantity == "loss" else f"it raises the {quantity}"
        return {
            "quantity": said,
            "sign": f"positive = {helps}, negative = {harms}",
            "unit": _UNIT[spec.method].format(quantity=quantity),
        }

    @cached_property
    def _stores(self) -> list[GradientStore]:
        return [GradientStore(self.run_store.root, store) for store in self.spec.gradients]

    @cached_property
    def _prepared(self) -> dict[int, dict[str, Rows]]:
        """What each store's rows are multiplied with, by group; filled on demand."""
        return {}

    def score(self, term: int, ids: torch.Tensor, fetched: Any, checks: Checks) -> Scores:
        store, start, stop = self._stores[term], int(ids[0]), int(ids[-1]) + 1
        if self.spec.approximate:
            return {SCORES: self._found_between(start, stop)}
        if term not in self._prepared:
            self._prepared[term] = self._queries(term)
        found: dict[str, npt.NDArray[Any]] = {}
        total_QB = np.zeros((len(self.spec.queries.items), len(ids)))
        squares_B = np.zeros(len(ids))
        for group, queries_QD in self._prepared[term].items():
            if self.spec.method == "cosine":
                rows_BD = store.rows(group, start, stop)
                part_QB = queries_QD @ rows_BD.T
                squares_B += np.square(rows_BD, dtype=np.float64).sum(axis=1)
            else:
                part_QB = store.dots(queries_QD, group, start, stop)
            total_QB += part_QB
            if self.kept_layers:
                found[part_name(group)] = part_QB
        if self.spec.method == "cosine":
            size_B = np.sqrt(squares_B)
            total_QB = total_QB / np.where(size_B > 0, size_B, 1)
        found[SCORES] = total_QB
        terms = self.terms if self.spec.combine == "mean" else 1
        return {name: values / terms for name, values in found.items()}

    @cached_property
    def _found(self) -> tuple[npt.NDArray[np.int64], Rows]:
        """What an index finds: ids and scores (Q, 2 k), the largest and the smallest; -1: none."""
        from influence_jobs.kinds.gradient_index.job import nearest, open_index  # needs faiss

        spec, root = self.spec, self.run_store.root
        assert spec.index is not None and spec.approximate is not None
        queries_QD = ScoreVectors(root, spec.index)(self._gradients(0))
        index, k = open_index(Run(root, spec.index)), min(spec.approximate, self.num_rows)
        # Of both signs at once: faiss gives each query a thread.
        ids_QK, scores_QK = nearest(index, np.concatenate([queries_QD, -queries_QD]), k)
        (ids, least), (largest, negative) = np.split(ids_QK, 2), np.split(scores_QK, 2)
        return np.hstack([ids, least]), np.hstack([largest, -negative])

    def _found_between(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """Scores (Q, B) of a range of samples; NaN for those that the index did not find."""
        ids_QK, scores_QK = self._found
        block_QB = np.full((len(ids_QK), stop - start), np.nan)
        rows, columns = np.nonzero((ids_QK >= start) & (ids_QK < stop))
        block_QB[rows, ids_QK[rows, columns] - start] = scores_QK[rows, columns]
        return block_QB

    def _gradients(self, term: int) -> dict[str, npt.NDArray[np.float64]]:
        """The queries' projected gradients, by group; for TRAK those of the margin."""
        spec = self.spec
        store = GradientStore(self.run_store.root, spec.of_queries[term])
        count = len(spec.queries.items)
        found = {group: store.rows(group, 0, count).astype(np.float64) for group in store.groups}
        if spec.method == "trak":
            factors_Q = margin_factors(store.losses(0, count))
            found = {group: rows * factors_Q[:, None] for group, rows in found.items()}
        return found

    def _queries(self, term: int) -> dict[str, Rows]:
        spec, found = self.spec, self._gradients(term)
        if spec.method in DAMPING:
            gram = Run(self.run_store.root, _grams(spec)[term])
            layers = list(gram.array(GRAM).attrs["layers"])  # type: ignore[arg-type]
            for group, rows in found.items():
                size, at = rows.shape[1], layers.index(group)
                gram_DD = gram.read_rows(GRAM, at, at + 1)[0, :size, :size]
                found[group] = preconditioned(rows, gram_DD, damping=spec.damping)
        if spec.method == "cosine":
            squares_Q = np.sum([np.square(rows).sum(axis=1) for rows in found.values()], axis=0)
            size_Q = np.sqrt(np.where(squares_Q > 0, squares_Q, 1))
            found = {group: rows / size_Q[:, None] for group, rows in found.items()}
        return {group: rows.astype(np.float32) for group, rows in found.items()}

    def probe(self) -> Iterator[int]:
        # The store may not exist yet. Made-up rows take the same time, but for reading.
        sizes, count = self._stores[0].sizes, len(self.spec.queries.items)
        queries = {group: np.ones((count, size), np.float32) for group, size in sizes.items()}
        rows = {g: np.ones((self.batch_size, size), np.float32) for g, size in sizes.items()}
        while True:
            for group in sizes:
                queries[group] @ rows[group].T
            yield self.batch_size

    def finish(self) -> Result:
        """Copies the tables of the inputs: the data need not be here."""
        store = self._stores[0].run
        of_queries = Run(self.run_store.root, self.spec.of_queries[0])
        files = self.run_store.write_table_in_blocks("samples", store.table_blocks("samples"))
        return Result(
            files=files | self.run_store.write_table("queries", of_queries.read_table("queries"))
        )


def _grams(spec: GradientScoresSpec) -> tuple[GramSpec, ...]:
    """The second moments that the method divides by, in the order of `gradients`."""
    found = (gram_of(store, spec.method) for store in spec.gradients)
    return tuple(gram for gram in found if gram is not None)


def _derived(spec: GradientScoresSpec) -> tuple[AnySpec, ...]:
    """What is made once of a store, and used by all queries."""
    return _grams(spec) if spec.index is None else (*_grams(spec), spec.index)
