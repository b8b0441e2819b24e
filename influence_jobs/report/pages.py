"""The viewer's pages, one for each kind of address."""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
from PIL import Image
from starlette.background import BackgroundTask
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from influence_jobs.errors import DataError, SpecError, UntrustedCode
from influence_jobs.experiments.stability import head
from influence_jobs.kinds import view_of
from influence_jobs.report.addresses import having, number, positive, values
from influence_jobs.report.explain import Explainer
from influence_jobs.report.html import environment
from influence_jobs.store.layout import SCORES, TABLES
from influence_jobs.store.run import Run
from influence_jobs.store.status import progress_line, read_status, under_way
from influence_jobs.store.top import ranks
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.registry import make_task, task_class
from influence_jobs.views.base import RankedRow
from influence_jobs.views.contact_sheet import Cell, Row
from influence_jobs.views.norms import StoredNorms
from influence_jobs.views.ranking import places
from influence_jobs.views.scores import ScoresView
from influence_jobs.views.sheets import NoData, query_cell, query_words, region_of, sample_cells

TOP = 10  # samples in a row
PER_PAGE = 24  # queries on a page
INFLUENCED = 20  # queries on a sample's page, for each side
QUERY = ("query", "test", "region", "quantity")  # columns that are not the task's description
IMAGES = 200  # test images in the list


class Pages:
    """Answers requests. Starlette calls it from several threads."""

    def __init__(self, runs: Sequence[Run], dashboard: Callable[[Run], str | None]):
        self.given = runs
        self.dashboard = dashboard
        members = [member for run in runs for member in view_of(run).members()]
        self.runs = {member.id: member for member in members}
        _require_one_task(members)
        self.task: Task = NoData()
        self.absent: str | None = None  # the reason if pictures are missing
        try:
            self.task = make_task(members[0].spec.task)
            # Many tasks read their data only now.
            len(self.task.train_data()), len(self.task.test_data())
        except DataError as error:  # the rest can be shown without pictures
            self.absent = str(error)
        self.explainer = lru_cache(maxsize=4)(self._explainer)
        self.first = lru_cache(maxsize=len(self.runs))(self._first)
        self.samples = lru_cache(maxsize=len(self.runs))(self._samples)

    def render(self, template: str, **values: Any) -> Response:
        page = environment().get_template(template)
        title = "; ".join(view_of(run).title for run in self.given)
        return HTMLResponse(page.render(title=title, link=lambda i: f"/sample/{i}", **values))

    def refused(self, _request: Request, error: Exception) -> Response:
        status, message = 400, str(error)
        if isinstance(error, HTTPException):
            status, message = error.status_code, error.detail
        answer = self.render("viewer-refused.html.j2", message=message)
        answer.status_code = status
        return answer

    # -- runs and queries -------------------------------------------------------------------------

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
        if self.absent or len(self.task.test_data()) == 0 or self.task.test_size(0) is None:
            return None
        # Prefer a run with scores: it has the layers that the user chose.
        for run in sorted(self.finished, key=lambda run: view_of(run).ranks != "scores"):
            if (found := self.explainer(run.id)) is not None:
                return found
        return None

    # -- pages ------------------------------------------------------------------------------------

    def overview(self, request: Request) -> Response:
        queries = self.queries()
        choices = {
            name: sorted({str(row[name]) for row in queries})
            for name in ("label", "file", "test")
            if queries and name in queries[0]
        }
        wanted = {name: request.query_params.get(name, "") for name in choices}
        shown = [
            row
            for row in queries
            if all(not value or str(row[name]) == value for name, value in wanted.items())
        ]
        page = number(request.query_params, "page", 0, below=1 + max(0, len(shown) - 1) // PER_PAGE)
        cells = [
            (self._query_link(row), self._query_cell(row), region_of(row["region"]))
            for row in shown[page * PER_PAGE :][:PER_PAGE]
        ]
        images = range(min(IMAGES, len(self.task.test_data()) if self.explaining() else 0))
        rest = {k: v for k, v in request.query_params.items() if k != "page"}
        return self.render(
            "viewer-overview.html.j2",
            states=self._states(),
            absent=self.absent,
            ranked=self._ranked(),
            choices=choices,
            wanted=wanted,
            cells=cells,
            total=len(shown),
            pages=[
                (i, f"/?{urlencode({**rest, 'page': i})}")
                for i in range(1 + max(0, len(shown) - 1) // PER_PAGE)
            ],
            page=page,
            images=[query_words(self.task, test) for test in images],
            tables=[(run.id, view_of(run).title, run.table_names()) for run in self.runs.values()],
        )

    def _ranked(self) -> list[Row]:
        """The first samples of each finished run that ranks them without queries or layers."""
        return [
            Row(None, None, title, self._sample_cells(ranked, {}))
            for title, ranked in (self.first(run.id) for run in self.finished)
            if ranked
        ]

    def _first(self, run_id: str) -> tuple[str, list[dict[str, Any]]]:
        view = view_of(self.runs[run_id])
        if view.ranks in ("", "scores", "norms"):
            return view.title, []
        return view.title, next(iter(view.top(PER_PAGE).values()))

    def progress(self, _request: Request) -> Response:
        return self.render("viewer-progress.html.j2", states=self._states())

    def _states(self) -> list[dict[str, Any]]:
        found = []
        for run in self.given:
            status = read_status(run)
            at, now_at = under_way(run, status)
            found.append(
                {
                    "run": run.id,
                    "state": status["state"],
                    "message": status.get("message"),
                    "at": at.id,
                    "done": now_at["units_done"],
                    "total": now_at["units_total"],
                    "said": progress_line(now_at) if now_at["units_total"] else "",
                    "dashboard": self.dashboard(run),
                }
            )
        return found

    def query(self, request: Request) -> Response:
        test = number(request.query_params, "test", 0)
        region = request.query_params.get("region") or None
        wanted = {
            name: value
            for name in ("label", "file")
            if (value := request.query_params.get(name, ""))
        }
        rows: list[Row] = []
        choices: dict[str, list[str]] = {}
        query: dict[str, Any] | None = None
        for view in self.scored:
            run = view.run
            table = run.read_table("queries")
            matching = [
                row for row in table.to_pylist() if (row["test"], row["region"]) == (test, region)
            ]
            if not matching:
                continue
            query = query or matching[0]
            samples = self.samples(run.id)
            for name in ("label", "file"):
                if name in samples.column_names and name not in choices:
                    choices[name] = [str(value) for value in values(samples, name)]
            scores_N = np.array(run.array(SCORES)[matching[0]["query"]], dtype=np.float64)
            left_out_N = np.zeros(len(scores_N), dtype=bool)
            for name, value in wanted.items():
                if name in samples.column_names:
                    left_out_N |= ~having(samples, name, value)
            for side, largest in view.sides.items():
                of_side_N = scores_N
                if view.spec.top_only:  # the others with a score are of the other end
                    of_side_N = np.full_like(scores_N, np.nan)
                    kept = head(scores_N, view.spec.top_only, largest=largest)
                    of_side_N[kept] = scores_N[kept]
                ids = head(np.where(left_out_N, np.nan, of_side_N), TOP, largest=largest)
                found = [
                    {"score": float(scores_N[i]), **row}
                    for i, row in zip(ids, samples.take(ids).to_pylist(), strict=True)
                ]
                rows.append(
                    Row(
                        None,
                        None,
                        view.ranking(side),
                        self._sample_cells(found, query),
                    )
                )
        if query is None:
            raise HTTPException(404, f"no run here explains test sample {test}")
        return self.render(
            "viewer-query.html.j2",
            query=self._query_cell(query),
            region=region_of(region),
            region_text=region or "",
            test=test,
            rows=rows,
            choices=choices,
            wanted=wanted,
            points=self.explaining() is not None,
        )

    def _query_cell(self, query: Mapping[str, Any]) -> Cell:
        """The cell of a query, without its picture if the data are missing."""
        known = {name: query[name] for name in query if name not in QUERY}
        try:
            return query_cell(self.task, query["test"], query["region"], known)[0]
        except DataError:
            return query_cell(NoData(), query["test"], query["region"], known)[0]

    def _sample_cells(
        self, ranked: Sequence[RankedRow], known: Mapping[str, Any]
    ) -> Sequence[Cell]:
        """Cells of ranked samples, without pictures if the data are missing."""
        try:
            return sample_cells(self.task, ranked, known)
        except DataError:
            return sample_cells(NoData(), ranked, known)

    @staticmethod
    def _query_link(row: dict[str, Any]) -> str:
        return f"/query?{urlencode(places([row])[0])}"

    def sample(self, request: Request) -> Response:
        sample = request.path_params["sample"]
        described: dict[str, Any] = {"score": 0.0}
        for run in self.finished:
            if "samples" in run.table_names() and sample < (table := self.samples(run.id)).num_rows:
                described |= table.slice(sample, 1).to_pylist()[0]
        if "sample" not in described:
            raise HTTPException(404, f"there is no training sample {sample}")
        blocks = []
        for view in self.scored:
            run = view.run
            scores_Q, ranks_Q, count_Q = ranks(run, SCORES, sample)
            queries = run.read_table("queries").to_pylist()
            for side, largest in view.sides.items():
                lines = []
                for i in head(scores_Q, INFLUENCED, largest=largest):
                    if len(view.sides) > 1 and (scores_Q[i] if largest else -scores_Q[i]) <= 0:
                        break  # from here on the effect has the other sign
                    lines.append(
                        (
                            self._query_link(queries[i]),
                            self._query_cell(queries[i]),
                            region_of(queries[i]["region"]),
                            float(scores_Q[i]),
                            int(ranks_Q[largest][i]),
                            int(count_Q[i]),
                        )
                    )
                blocks.append((view.ranking(side), lines))
        numbers = [
            (view.run.id, name, value)
            for view in map(view_of, self.finished)
            for name, value in view.numbers_of(sample)
        ]
        (cell,) = self._sample_cells([described], {})
        return self.render(
            "viewer-sample.html.j2",
            cell=cell,
            sample=sample,
            described={k: v for k, v in described.items() if k not in ("sample", "score")},
            blocks=blocks,
            numbers=numbers,
        )

    def image(self, request: Request) -> Response:
        test = request.path_params["test"]
        explainer, size = self._explaining(test)
        norms, given = explainer.norms, request.query_params
        has_point = "y" in given
        layers = _layers(norms, given)
        page = self.render(
            "viewer-image.html.j2",
            test=test,
            known=query_words(self.task, test),
            size=size,
            pictured=query_cell(self.task, test)[0].picture is not None,
            count=len(self.task.test_data()),
            norms=norms,
            chosen=layers,
            values=given,
            normalize=given.get("normalize") == "yes" if has_point else norms.normalize,
            limit=given.get("limit", "") if has_point else norms.exclude_norm_above or "",
            answer=self._explained(request, test) if has_point else None,
        )
        if set(layers) <= set(norms.layers):
            page.background = BackgroundTask(explainer.prepare, test, layers)
        return page

    def explained(self, request: Request) -> Response:
        return self.render(
            "viewer-explained.html.j2", answer=self._explained(request, request.path_params["test"])
        )

    def _explaining(self, test: int) -> tuple[Explainer, tuple[int, int]]:
        explainer = self.explaining()
        if explainer is None or not 0 <= test < len(self.task.test_data()):
            why = f": {self.absent}" if self.absent else ""
            raise HTTPException(
                404, f"there is no test image {test} whose points can be explained{why}"
            )
        size = explainer.task.test_size(test)
        assert size is not None
        return explainer, size

    def _explained(self, request: Request, test: int) -> dict[str, Any]:
        explainer, size = self._explaining(test)
        given = request.query_params
        point = number(given, "y", 0, below=size[0]), number(given, "x", 0, below=size[1])
        layers = _layers(explainer.norms, given)
        limit = positive(given, "limit")
        found = explainer.top(
            test,
            point,
            TOP,
            layers=layers,
            normalize=given.get("normalize") == "yes",
            exclude_norm_above=limit,
        )
        ids = np.array([sample for sample, _ in found], dtype=np.int64)
        described = {k: v.tolist() for k, v in explainer.task.describe(ids).items()}
        ranked = [
            {"sample": sample, "score": score, **{k: v[i] for k, v in described.items()}}
            for i, (sample, score) in enumerate(found)
        ]
        return {
            "point": point,
            "row": Row(None, None, "", sample_cells(explainer.task, ranked, {})),
            "of": explainer.norms.run.id,
            "layers": layers,
        }

    def picture(self, request: Request) -> Response:
        test = request.path_params["test"]
        if test >= len(self.task.test_data()):
            raise HTTPException(404, f"there is no test sample {test}")
        buffer = io.BytesIO()
        Image.fromarray(self.task.test_picture(test)).save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png")

    def table(self, request: Request) -> Response:
        run, name = self.runs.get(request.path_params["run"]), request.path_params["name"]
        if run is None or name not in run.table_names():
            raise HTTPException(404, "there is no such table")
        data = run.files.read(f"{TABLES}/{name}.parquet")
        return Response(data, media_type="application/vnd.apache.parquet")


def _layers(norms: StoredNorms, given: QueryParams) -> tuple[str, ...]:
    """The layer that the address names, or else the chosen layers."""
    return (given["layer"],) if given.get("layer") else norms.chosen


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
