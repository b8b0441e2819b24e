"""Results in Python: `influence_jobs.open_run`."""

from collections.abc import Sequence
from os import PathLike
from textwrap import indent
from typing import Any, Literal

import pyarrow as pa
import xarray as xr
from matplotlib.figure import Figure

from influence_jobs.errors import DataError, SpecError, StoreError
from influence_jobs.kinds import view_of
from influence_jobs.kinds.self_influence.view import SelfInfluenceView
from influence_jobs.report.html import array_rows, results_html
from influence_jobs.report.sample_rows import SampleRows
from influence_jobs.specs.base import Spec
from influence_jobs.store import layout
from influence_jobs.store.find import find_run
from influence_jobs.store.status import read_status
from influence_jobs.terms import shown
from influence_jobs.views.base import View
from influence_jobs.views.figure import Shown
from influence_jobs.views.ranking import Side


class Results:
    """A run, to look at from Python. Arrays and tables are read on demand.

    Args:
        root: Folder of all runs.
        run_id: The run, or the first characters of its id.

    Attributes:
        run: The run in the store.
    """

    def __init__(self, root: str, run_id: str):
        self.run = find_run(root, run_id)

    def __repr__(self) -> str:
        view, state = self._view, self.state
        lines = [f"{self.run.id}: {state}", view.title]
        if state == "done":
            for table in view.tables():
                lines += ["", table.title, table.text(), ""]
            lines += view.certainty()
        lines += [", ".join(filter(None, row)) for row in array_rows(self.run)]
        lines += [f"tables: {', '.join(self.tables)}"] if self.tables else []
        return indent("\n".join(map(shown, lines)), "  ").strip()

    @property
    def spec(self) -> Spec:
        """The spec of the run."""
        return self.run.spec

    @property
    def state(self) -> str:
        """`new`, `running`, `stopped`, `interrupted`, `failed` or `done`."""
        return str(read_status(self.run)["state"])

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays."""
        return tuple(self.run.array_names())

    def __getitem__(self, name: str) -> xr.DataArray:
        """An array with named dimensions, read piece by piece as it is indexed.

        Its `attrs` have meaning, sign and unit of the numbers. The dimension `query` has the test
        ids as coordinate `test`. Values that are not computed yet are NaN.

        Raises:
            StoreError: The run has no such array.
        """
        self.run.array(name)  # its error names the arrays that exist
        group, _, own = name.rpartition("/")
        folder = f"{layout.ARRAYS}/{group}" if group else layout.ARRAYS
        siblings = [n.removeprefix(f"{group}/") for n in self.arrays if n != name]
        # Opened alone: in one group, a dimension may have several lengths.
        dataset = xr.open_zarr(
            self.run.files.zarr_store(folder),
            consolidated=False,
            chunks=None,
            drop_variables=siblings,
            mask_and_scale=False,
        )
        found: xr.DataArray = dataset[own].rename(name)
        if "query" in found.dims and "queries" in self.tables:
            tests = self.table("queries").column("test").to_numpy()
            found = found.assign_coords(test=("query", tests))
        return found

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables."""
        return tuple(self.run.table_names())

    def table(self, name: str) -> pa.Table:
        """A table.

        Raises:
            StoreError: It is missing or damaged.
        """
        if name not in self.tables:
            has = ", ".join(self.tables) or "none yet"
            raise StoreError(f"run {self.run.id} has no table {name!r}; it has {has}")
        return self.run.read_table(name)

    def top_k(
        self,
        k: int = 10,
        *,
        test: int | Sequence[int] | None = None,
        side: Side = "both",
        layer: str | None = None,
        channel: int | None = None,
    ) -> pa.Table:
        """The top samples with their descriptions, as in `infl top`.

        Args:
            k: Number of samples, for each query and side or for each layer.
            test: Only queries of these test samples (scores only).
            side: "helpful" for the largest scores, "harmful" for the smallest, or "both".
            layer: Only this layer; for a run with scores, rank by the scores of this layer.
            channel: Rank by the norm of this channel instead of the sum over channels (norms only).

        Returns:
            For scores, columns `test`, `side`, `rank`, `score`, `sample` and the task's description
            of the sample. For norms, `layer` and `norm` replace the first four. For other kinds
            `sample`, the description, and the number.

        Raises:
            SpecError: The run ranks nothing, or has no such query, layer or channel.
            StoreError: The run is not done.
        """
        view = self._view
        if view.ranks:
            self._require_done()
        tests = [test] if isinstance(test, int) else test
        ranked = view.top(k, layer=layer, tests=tests, side=side, channel=channel)
        if view.ranks != "norms":
            return pa.Table.from_pylist([row for rows in ranked.values() for row in rows])
        named = {array: self.run.array(array).attrs.get("layer", array) for array in ranked}
        rows = [{"layer": named[array], **row} for array, found in ranked.items() for row in found]
        return pa.Table.from_pylist(rows)

    def suspects(self, k: int = 20, *, by: Literal["self-influence", "loss"] = "loss") -> pa.Table:
        """The samples whose labels are most likely wrong, as in `infl suspects`.

        Returns:
            Columns `rank`, `sample`, `label`, `predicted`, `probability` (of what is predicted),
            `loss`, the task's description of the sample, and `self_influence`.

        Raises:
            SpecError: The run is none of self-influence, or its samples have not one class each.
            StoreError: The run is not done.
        """
        view = self._view
        if not isinstance(view, SelfInfluenceView):
            raise SpecError(
                f"{self.run.id} has no predictions beside its labels: submit self-influence with "
                "the same checkpoint, and take its results"
            )
        self._require_done()
        return pa.Table.from_pylist(view.suspects(k, by=by))

    def show(self, table: pa.Table) -> SampleRows:
        """A table of this run to look at, such as that of `top_k` or `suspects`.

        In a notebook the picture or text of each row's sample stands beside it, if the task has one
        and its data are here. Elsewhere it is plain text. Its `table` is the table.
        """
        try:
            return SampleRows(table, self._view.task)
        except DataError:  # such as code that nobody has named on this machine
            return SampleRows(table, None)

    def _require_done(self) -> None:
        if self.state != "done":
            raise StoreError(f"{self.run.id} is not done yet: {self.run.resume_command}")

    @property
    def _view(self) -> View[Any]:
        return view_of(self.run)

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the figures."""
        return tuple(self._figures())

    def figure(self, name: str) -> Figure:
        """A figure, as `infl report` draws it.

        Raises:
            SpecError: The run has no such figure.
        """
        found = self._figures()
        if name not in found:
            raise SpecError(
                f"{self.run.id} has no figure {name!r}; it has {', '.join(found) or 'none'}"
            )
        return found[name].draw()

    def _figures(self) -> dict[str, Shown]:
        whole = self._view
        members = whole.members()
        several = len(members) > 1
        return {
            f"{member.id}/{shown.name}" if several else shown.name: shown
            for member in members
            for shown in whole.member_figures(view_of(member), lambda _: None)
        }

    def _repr_html_(self) -> str:
        return results_html(self.run)


def open_run(path: str | PathLike[str]) -> Results:
    """Open a run.

    Args:
        path: The run's folder, on a disk, s3:// or gs://. The first characters of the id suffice.

    Raises:
        StoreError: There is no such run.
    """
    root, _, run_id = str(path).rstrip("/").rpartition("/")
    return Results(root or ".", run_id)
