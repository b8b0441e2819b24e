"""Reading a store of projected gradients."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from influence_jobs.errors import StoreError
from influence_jobs.kinds import open_job
from influence_jobs.kinds.gradients.spec import GradientsSpec
from influence_jobs.kinds.query_gradients.spec import QueryGradientsSpec
from influence_jobs.methods.packing import unpacked, without_scales
from influence_jobs.store.folder import for_runs
from influence_jobs.store.layout import LOSSES_OF_ROWS, ArrayLayout, gradients_name, scales_name
from influence_jobs.store.run import Run
from influence_jobs.terms import Stored

BLOCK_NUMBERS = 2**24  # in a block of rows: 64 MB in float32


class GradientStore:
    """The rows of projected gradients, of samples or of queries, as float32.

    Neither the model nor the data are needed.

    Args:
        root: Folder of all runs.
        spec: Of the run; if it has not begun, only its sizes are known.
    """

    def __init__(self, root: str, spec: GradientsSpec | QueryGradientsSpec) -> None:
        self.run = Run(root, spec)
        self._stored: Stored = "float32"  # of queries
        if isinstance(spec, GradientsSpec):
            self._stored = spec.stored

    @cached_property
    def _layouts(self) -> dict[str, ArrayLayout]:
        """The layouts of a run that has not begun, by array name."""
        return {array.name: array for array in open_job(self.run).plan().arrays}

    @cached_property
    def _begun(self) -> bool:
        return bool(self.run.array_names())

    @cached_property
    def sizes(self) -> dict[str, int]:
        """D by group of parameters."""
        if not self._begun:
            attributes = [array.attributes for array in self._layouts.values()]
        else:
            attributes = [dict(self.run.array(n).attrs) for n in self.run.array_names()]
        return {str(a["layer"]): int(a["numbers"]) for a in attributes if "numbers" in a}

    @property
    def groups(self) -> list[str]:
        """The groups of parameters with projections of their own."""
        return [*self.sizes]

    @cached_property
    def num_rows(self) -> int:
        """N."""
        if not self._begun:
            return self._layouts[LOSSES_OF_ROWS].shape[0]
        return int(self.run.array(LOSSES_OF_ROWS).shape[0])

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Bounds of blocks of rows that are read at once, whole chunks."""
        chunk = self.run.array(LOSSES_OF_ROWS).chunks[0]
        return self._cut(max(1, BLOCK_NUMBERS // max(self.sizes.values()) // chunk) * chunk)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Bounds of the chunks of rows."""
        return self._cut(self.run.array(LOSSES_OF_ROWS).chunks[0])

    def _cut(self, step: int) -> Iterator[tuple[int, int]]:
        for start in range(0, self.num_rows, step):
            yield start, min(start + step, self.num_rows)

    def rows(self, group: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Projected gradients (B, D).

        Raises:
            StoreError: Some are missing.
        """
        codes, scales_B = self._read(group, start, stop)
        rows_BD = unpacked(codes, scales_B, self.sizes[group], self._stored)
        self._require_all(rows_BD, start, stop)
        return rows_BD

    def dots(
        self, queries_QD: npt.NDArray[np.float32], group: str, start: int, stop: int
    ) -> npt.NDArray[np.float32]:
        """Dot products (Q, B) with vectors.

        Raises:
            StoreError: Some rows are missing.
        """
        codes, scales_B = self._read(group, start, stop)
        rows_BD = without_scales(codes, scales_B, self.sizes[group], self._stored)
        dots_QB: npt.NDArray[np.float32] = queries_QD @ rows_BD.T
        if scales_B is not None:
            dots_QB *= scales_B
        self._require_all(dots_QB, start, stop)
        return dots_QB

    def _read(
        self, group: str, start: int, stop: int
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]:
        """Codes and scales."""
        codes = self.run.read_rows(gradients_name(group), start, stop)
        if self._stored == "float32":
            return codes, None
        return codes, self.run.read_rows(scales_name(group), start, stop)

    def _require_all(self, values: npt.NDArray[np.float32], start: int, stop: int) -> None:
        if not np.isfinite(values).all():
            raise StoreError(
                f"run {self.run.id} lacks gradients of samples {start} to {stop}: "
                f"infl verify {self.run.id}{for_runs(self.run.root)}"
            )

    def losses(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """The losses (B,)."""
        return self.run.read_rows(LOSSES_OF_ROWS, start, stop).astype(np.float64)
