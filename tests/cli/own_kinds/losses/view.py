"""The view of losses."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from influence_jobs.store.top import largest_rows
from influence_jobs.views.base import Say, View
from influence_jobs.views.table import Table

from .spec import LossesSpec

if TYPE_CHECKING:
    from influence_jobs.views.figure import Shown


class LossesView(View[LossesSpec]):
    """Which samples fit worst."""

    title = "Losses"
    ranks = "losses"

    def certainty(self) -> list[str]:
        return ["Of one training."]

    def next_step(self) -> str:
        return f"infl top {self.run.id}{self.more}"

    def tables(self) -> list[Table]:
        return [Table("Losses", ("largest",), [(float(self._losses().max()),)])]

    def figures(self, say: Say) -> "Iterator[Shown]":
        from influence_jobs.views.curves import histogram_panels
        from influence_jobs.views.figure import Shown

        counts, edges = np.histogram(self._losses(), bins=5)
        yield Shown(
            "losses",
            "Losses",
            "Most are small.",
            pa.table({"from": edges[:-1], "samples": counts}),
            panels=histogram_panels(counts, edges, 1.0, "loss"),
        )

    def top(
        self,
        k: int,
        *,
        layer: str | None = None,
        tests: Sequence[int] | None = None,
        side: str = "both",
        channel: int | None = None,
    ) -> dict[str, list[dict[str, Any]]]:
        ids, losses = largest_rows(self.run, "losses", k)
        known = self.run.read_table("samples").take(ids).to_pylist()
        rows = [{**row, "loss": float(x)} for row, x in zip(known, losses, strict=True)]
        return {"losses": rows}

    def _losses(self) -> np.ndarray:
        return np.asarray(self.run.array("losses")[:])
