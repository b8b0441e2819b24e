"""The runs that a viewer shows: what they have, and how their samples are seen."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from influence_jobs.errors import DataError, SpecError, UntrustedCode
from influence_jobs.kinds import view_of
from influence_jobs.report.explain import Explainer
from influence_jobs.report.html import environment
from influence_jobs.store.run import Run
from influence_jobs.store.status import read_status
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.registry import make_task, task_class
from influence_jobs.tasks.seen import Wave, contents
from influence_jobs.views.base import RankedRow
from influence_jobs.views.contact_sheet import Cell
from influence_jobs.views.ranking import places
from influence_jobs.views.scores import ScoresView
from influence_jobs.views.sheets import NoData, TokenScores, query_cell, sample_cells

FIRST = 24  # samples of a ranking without queries
QUERY = ("query", "test", "region", "quantity")  # columns that are not the task's description


class Shelf:
    """Runs of one task, with the task. Several threads may use it.

    Attributes:
        given: The runs that were named.
        runs: Their members by id.
        task: The task; `NoData` if its data are missing.
        absent: Why its data are missing; None if they are not.
    """

    def __init__(self, runs: Sequence[Run]):
        self.given = runs
        members = [member for run in runs for member in view_of(run).members()]
        self.runs = {member.id: member for member in members}
        _require_one_task(members)
        self.task: Task = NoData()
        self.absent: str | None = None
        try:
            self.task = make_task(members[0].spec.task)
            # Many tasks read their data only now.
            len(self.task.train_data()), len(self.task.test_data())
        except DataError as error:  # the rest can be shown without pictures
            self.absent = str(error)
        self.explainer = lru_cache(maxsize=4)(self._explainer)
        self.first = lru_cache(maxsize=len(self.runs))(self._first)
        self.samples = lru_cache(maxsize=len(self.runs))(self._samples)

    @property
    def title(self) -> str:
        """The runs in words."""
        return "; ".join(view_of(run).title for run in self.given)

    def render(self, template: str, **values: Any) -> Response:
        """A page."""
        page = environment().get_template(template)
        links = {"link": lambda i: f"/sample/{i}", "sound": self.sound_address}
        return HTMLResponse(page.render(title=self.title, **links, **values))

    @property
    def finished(self) -> list[Run]:
        """The runs that are done."""
        return [run for run in self.runs.values() if read_status(run)["state"] == "done"]

    @property
    def scored(self) -> list[ScoresView[Any]]:
        """Views of the finished runs with scores."""
        views = [view_of(run) for run in self.finished]
        return [view for view in views if isinstance(view, ScoresView)]

    def queries(self) -> list[dict[str, Any]]:
        """Rows of the query tables of all scored runs, each query once."""
        found: dict[tuple[int, str | None], dict[str, Any]] = {}
        for view in self.scored:
            for row in view.run.read_table("queries").to_pylist():
                found.setdefault((row["test"], row["region"]), row)
        return list(found.values())

    def _samples(self, run_id: str) -> pa.Table:
        return self.runs[run_id].read_table("samples")

    def _explainer(self, run_id: str) -> Explainer | None:
        norms = view_of(self.runs[run_id]).stored_norms
        return Explainer(norms) if norms is not None else None

    def explaining(self) -> Explainer | None:
        """An explainer by the first finished run with norms of channels; None if there is none."""
        if not self.has_regions:
            return None
        # Prefer a run with scores: it has the layers that the user chose.
        for run in sorted(self.finished, key=lambda run: view_of(run).ranks != "scores"):
            if (found := self.explainer(run.id)) is not None:
                return found
        return None

    @property
    def has_regions(self) -> bool:
        """Whether points of the test samples can be asked for."""
        if self.absent or len(self.task.test_data()) == 0:
            return False
        return self.task.test_size(0) is not None

    def _first(self, run_id: str) -> tuple[str, list[dict[str, Any]]]:
        view = view_of(self.runs[run_id])
        if view.ranks in ("", "scores", "norms"):
            return view.title, []
        return view.title, next(iter(view.top(FIRST).values()))

    # -- how samples are seen ---------------------------------------------------------------------

    def query_cell(self, query: Mapping[str, Any]) -> Cell:
        """The cell of a query, in words if the data are missing."""
        known = {name: query[name] for name in query if name not in QUERY}
        try:
            return query_cell(self.task, query["test"], query["region"], known)[0]
        except DataError:
            return query_cell(NoData(), query["test"], query["region"], known)[0]

    def sample_cells(
        self,
        ranked: Sequence[RankedRow],
        query: Mapping[str, Any],
        tokens: TokenScores | None = None,
    ) -> Sequence[Cell]:
        """Cells of ranked samples, in words if the data are missing.

        Args:
            query: The row of their query; empty if there is none.
            tokens: What tokens bring to the scores of this query.
        """
        known = {name: query[name] for name in query if name not in QUERY}
        parts = None
        if tokens:
            parts = [tokens(query["test"], query["region"], row["sample"]) for row in ranked]
        try:
            return sample_cells(self.task, ranked, known, token_scores=parts)
        except DataError:
            return sample_cells(NoData(), ranked, known, token_scores=parts)

    @staticmethod
    def query_link(row: Mapping[str, Any]) -> str:
        """The address of a query's page."""
        return f"/query?{urlencode(places([row])[0])}"

    @staticmethod
    def sound_address(cell: Cell) -> str:
        """The address of a cell's sound."""
        if cell.sample is None:
            return f"/sound/test/{cell.lines[0].removeprefix('test ')}.wav"
        return f"/sound/sample/{cell.sample}.wav"

    def sound(self, sample: int) -> Wave:
        """The sound of a training sample.

        Raises:
            HTTPException: It has none.
        """
        if sample < len(self.task.train_data()):
            (found,) = contents(self.task, np.array([sample]), [{}])
            if isinstance(found, Wave):
                return found
        raise HTTPException(404, f"training sample {sample} has no sound")


def _require_one_task(runs: Sequence[Run]) -> None:
    """Refuse runs in which sample ids name different samples."""
    first = runs[0].spec.task
    try:
        unused = task_class(first).attribution_options
    except UntrustedCode:
        unused = frozenset()
    for run in runs[1:]:
        other = run.spec.task
        options = {**first.options, **dict.fromkeys(unused)}
        others = {**other.options, **dict.fromkeys(unused)}
        if (other.name, other.data, others) != (first.name, first.data, options):
            raise SpecError(
                f"{run.id} is of another task or data than {runs[0].id}: view them one by one"
            )
