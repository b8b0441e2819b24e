"""A faiss index of stored projected gradients."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from influence_jobs.jobs.base import Job, Plan, Progress, Result, Shard
from influence_jobs.kinds.gradient_index.spec import TOP, GradientIndexSpec
from influence_jobs.kinds.gradient_index.vectors import ScoreVectors
from influence_jobs.kinds.gradients.store import GradientStore
from influence_jobs.specs.base import AnySpec
from influence_jobs.store.files import LocalFiles
from influence_jobs.store.layout import INDEX
from influence_jobs.store.run import Run
from influence_jobs.store.top import top_of

# Numbers as bfloat16: gradients may be too small for float16, and outliers leave a byte few steps
# for all others. Of long vectors a first look takes one bit a number, after a random rotation by
# fast Hadamard transforms (RaBitQ: Gao and Long, SIGMOD 2024); the numbers tell which of those
# found are the best.
NUMBERS, BITS_FIRST = "SQbf16", "HR,RaBitQ,Refine(SQbf16)"
LONG = 512  # numbers
FIRST_LOOK = 100  # times as many samples as asked for
TRAINED_ON = 16_384  # rows, for their centre
TRIED = 32  # stored rows as queries, for the recall


class GradientIndexJob(Job[GradientIndexSpec]):
    """One shard."""

    spec_type = GradientIndexSpec
    reads_data = False

    @property
    def title(self) -> str:
        return f"gradient-index {self.spec.task.slug}"

    @staticmethod
    def inputs(spec: GradientIndexSpec) -> tuple[AnySpec, ...]:
        return (spec.gradients,) if spec.gram is None else (spec.gradients, spec.gram)

    def input_digests(self) -> dict[str, str]:
        runs = [Run(self.run_store.root, spec) for spec in self.inputs(self.spec)]
        return {run.id: run.digest() for run in runs}

    @cached_property
    def _store(self) -> GradientStore:
        return GradientStore(self.run_store.root, self.spec.gradients)

    def plan(self, shard_rows: int | None = None) -> Plan:
        count, numbers = self._store.num_rows, sum(self._store.sizes.values())
        size = count * (2 * numbers + numbers // 8) + 4 * numbers**2
        return Plan((), (Shard("00000", 0, 1),), count, batch_size=1, file_bytes=size)

    def run(self, shard: Shard, progress: Progress) -> Result:
        progress(0)
        faiss.omp_set_num_threads(torch.get_num_threads())
        self._vectors = ScoreVectors(self.run_store.root, self.spec)
        count = self._store.num_rows
        index = new_index(sum(self._store.sizes.values()))
        make_room(index, count)
        index.train(self._spread(TRAINED_ON))
        queries = self._spread(TRIED)

        def added() -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
            for start, stop in self._store.blocks():
                block = self._block(start, stop)
                index.add(block)
                progress(stop)
                yield start, (queries @ block.T).astype(np.float64)

        exact = top_of(added(), range(len(queries)), min(TOP, count))
        found, _ = nearest(index, queries, min(TOP, count))
        shared = [len({*ids} & {*a}) / len(ids) for (ids, _), a in zip(exact, found, strict=True)]
        files = self.run_store.files
        files.write_by(INDEX, lambda path: faiss.write_index(index, str(path)))
        recall = pa.table({"recall": shared})
        return Result(files={INDEX: files.checksum(INDEX)}, tables={"recall": recall})

    def _block(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        groups = self._store.groups
        return self._vectors({group: self._store.rows(group, start, stop) for group in groups})

    def _spread(self, most: int) -> npt.NDArray[np.float32]:
        """At most so many rows, chunk by chunk from all parts of the store."""
        chunks = list(self._store.chunks())
        take = max(1, -(-most // len(chunks)))
        picked = chunks[:: max(1, len(chunks) * take // most)]
        blocks = [self._block(start, min(stop, start + take)) for start, stop in picked]
        return np.concatenate(blocks)[:most]

    def probe(self) -> Iterator[float]:
        # The store may not exist yet.
        yield from ()


def new_index(numbers: int) -> faiss.Index:
    """An empty index of vectors with so many numbers."""
    factory = BITS_FIRST if numbers > LONG else NUMBERS
    return faiss.index_factory(numbers, factory, faiss.METRIC_INNER_PRODUCT)


def make_room(index: Any, rows: int) -> None:
    """Get the memory for so many rows at once: growing copies it, and takes up to three times."""
    numbers: Any = faiss.downcast_index(index.refine_index) if index.d > LONG else index
    numbers.codes.resize(rows * numbers.code_size)


def open_index(run: Run) -> faiss.Index:
    """The index of a run; on a disk it is mapped, not read."""
    if isinstance(run.files, LocalFiles):
        return faiss.read_index(str(run.files.plain(INDEX)), faiss.IO_FLAG_MMAP_IFC)
    return faiss.deserialize_index(np.frombuffer(run.files.read(INDEX), dtype=np.uint8))


def nearest(
    index: faiss.Index, queries_QD: npt.NDArray[np.float32], k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The samples of largest dot product, ids and values (Q, k), approximately; id -1: none."""
    settings = None
    if index.d > LONG:
        settings = faiss.IndexRefineSearchParameters()
        settings.k_factor = FIRST_LOOK
    values_QK, ids_QK = index.search(queries_QD, k, params=settings)
    return ids_QK, values_QK
