"""The mean of g g^T over stored projected gradients."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from influence_jobs.jobs.base import Job, Plan, Progress, Result, Shard
from influence_jobs.kinds.gradients.store import GradientStore
from influence_jobs.kinds.gram.spec import GramSpec
from influence_jobs.methods.projected import margin_factors
from influence_jobs.specs.base import AnySpec
from influence_jobs.store.layout import GRAM, ArrayLayout


class GramJob(Job[GramSpec]):
    """A shard is one layer."""

    spec_type = GramSpec
    reads_data = False

    @property
    def title(self) -> str:
        return f"gram {self.spec.task.slug}"

    @staticmethod
    def inputs(spec: GramSpec) -> tuple[AnySpec, ...]:
        return (spec.gradients,)

    def input_digests(self) -> dict[str, str]:
        return {self._store.run.id: self._store.run.digest()}

    @cached_property
    def _store(self) -> GradientStore:
        return GradientStore(self.run_store.root, self.spec.gradients)

    def plan(self, shard_rows: int | None = None) -> Plan:
        groups, widest = self._store.groups, max(self._store.sizes.values())
        array = ArrayLayout(
            name=GRAM,
            shape=(len(groups), widest, widest),
            row_axis=0,
            chunk_rows=1,
            dims=("layer", "number", "number_2"),
            attributes={
                "quantity": f"mean of g g^T, g the projected gradient of the {self.spec.quantity}",
                "layers": groups,
                "numbers": [self._store.sizes[group] for group in groups],
            },
        )
        shards = tuple(Shard(f"{i:05d}", i, i + 1) for i in range(len(groups)))
        units = len(groups) * self._store.num_rows
        return Plan((array,), shards, units, batch_size=1)

    def run(self, shard: Shard, progress: Progress) -> Result:
        progress(0)
        group = self._store.groups[shard.start]
        size, widest = self._store.sizes[group], max(self._store.sizes.values())
        total_DD = np.zeros((size, size))  # in float64
        for start, stop in self._store.blocks():
            rows_BD: npt.NDArray[Any] = self._store.rows(group, start, stop)
            if self.spec.quantity == "margin":
                rows_BD = rows_BD * margin_factors(self._store.losses(start, stop))[:, None]
            total_DD += rows_BD.T @ rows_BD
            progress(stop)
        padded = np.zeros((1, widest, widest))
        padded[0, :size, :size] = total_DD / self._store.num_rows
        return Result({GRAM: padded})

    def probe(self) -> Iterator[float]:
        # The store may not exist yet.
        yield from ()
