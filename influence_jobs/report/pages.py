"""The viewer's pages of runs, queries and samples."""

import io
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import numpy as np
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from influence_jobs.experiments.stability import head
from influence_jobs.kinds import view_of
from influence_jobs.report.addresses import number
from influence_jobs.report.selection import Selection, selected, table_file
from influence_jobs.report.shelf import QUERY, Shelf
from influence_jobs.store.layout import SCORES, TABLES
from influence_jobs.store.run import Run
from influence_jobs.store.status import named, progress_line, read_status, under_way
from influence_jobs.store.top import ranks
from influence_jobs.tasks.seen import Wave, content_of_test
from influence_jobs.views.sheets import query_words, region_of, token_scores_of

PER_PAGE = 24  # queries on a page
INFLUENCED = 20  # queries on a sample's page, for each side
IMAGES = 200  # test images in the list


class Pages:
    """Answers requests. Starlette calls it from several threads."""

    def __init__(self, shelf: Shelf, dashboard: Callable[[Run], str | None]):
        self.shelf = shelf
        self.dashboard = dashboard

    def refused(self, _request: Request, error: Exception) -> Response:
        status, message = 400, str(error)
        if isinstance(error, HTTPException):
            status, message = error.status_code, error.detail
        answer = self.shelf.render("viewer-refused.html.j2", message=message)
        answer.status_code = status
        return answer

    # -- the overview -----------------------------------------------------------------------------

    def overview(self, request: Request) -> Response:
        shelf = self.shelf
        choices, wanted, shown = self._filtered(request)
        page = number(request.query_params, "page", 0, below=1 + max(0, len(shown) - 1) // PER_PAGE)
        cells = [
            (shelf.query_link(row), shelf.query_cell(row), region_of(row["region"]))
            for row in shown[page * PER_PAGE :][:PER_PAGE]
        ]
        count = len(shelf.task.test_data()) if shelf.has_regions else 0
        rest = {k: v for k, v in request.query_params.items() if k != "page"}
        return shelf.render(
            "viewer-overview.html.j2",
            states=self._states(),
            absent=shelf.absent,
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
            images=[query_words(shelf.task, test) for test in range(min(IMAGES, count))],
            more_images=max(0, count - IMAGES),
            tables=[(run.id, view_of(run).title, run.table_names()) for run in shelf.runs.values()],
        )

    def queries(self, request: Request) -> Response:
        """The queries that the overview shows, as a file."""
        _, _, shown = self._filtered(request)
        rows = [{name: value for name, value in row.items() if name != "query"} for row in shown]
        return table_file(rows, request.path_params["kind"], "queries")

    def _filtered(
        self, request: Request
    ) -> tuple[dict[str, list[str]], dict[str, str], list[dict[str, Any]]]:
        """What queries can be filtered by, what is wanted, and the queries that are left."""
        queries = self.shelf.queries()
        choices: dict[str, list[str]] = {
            name: sorted({str(row[name]) for row in queries})
            for name in ("label", "file", "test")
            if queries and name in queries[0]
        }
        wanted: dict[str, str] = {n: request.query_params.get(n, "") for n in choices}
        shown = [
            row
            for row in queries
            if all(not value or str(row[name]) == value for name, value in wanted.items())
        ]
        return choices, wanted, shown

    def _ranked(self) -> list[tuple[str, str, Any]]:
        """The first samples of each finished run that ranks them without queries or layers."""
        return [
            (run.id, title, self.shelf.sample_cells(ranked, {}))
            for run in self.shelf.finished
            for title, ranked in [self.shelf.first(run.id)]
            if ranked
        ]

    def ranked(self, request: Request) -> Response:
        """The first samples of a run that ranks them without queries, as a file."""
        name = request.path_params["run"]
        if name not in {run.id for run in self.shelf.finished}:
            raise HTTPException(404, "there is no such run")
        rows = [{"run": name, **row} for row in self.shelf.first(name)[1]]
        return table_file(rows, request.path_params["kind"], name)

    def progress(self, _request: Request) -> Response:
        return self.shelf.render("viewer-progress.html.j2", states=self._states())

    def _states(self) -> list[dict[str, Any]]:
        found = []
        for run in self.shelf.given:
            status = read_status(run)
            at, now_at = under_way(run, status)
            found.append(
                {
                    "run": run.id,
                    "state": status["state"],
                    "message": status.get("message"),
                    "at": named(at.id, status),
                    "done": now_at["units_done"],
                    "total": now_at["units_total"],
                    "said": progress_line(now_at) if now_at["units_total"] else "",
                    "dashboard": self.dashboard(run),
                }
            )
        return found

    # -- a query ----------------------------------------------------------------------------------

    def query(self, request: Request) -> Response:
        shelf, found = self.shelf, selected(self.shelf, request.query_params)
        sections = [
            (
                section.title,
                shelf.sample_cells(
                    [_described(row) for row in section.rows],
                    found.query,
                    token_scores_of(section.view.run),
                ),
            )
            for section in found.sections
        ]
        before, after = self._beside(found)
        return shelf.render(
            "viewer-query.html.j2",
            query=shelf.query_cell(found.query),
            region=region_of(found.query["region"]),
            region_text=found.query["region"] or "",
            test=found.query["test"],
            sections=sections,
            meanings=dict.fromkeys(section.meaning for section in found.sections),
            found=found,
            before=before,
            after=after,
            points=shelf.has_regions,
        )

    def _beside(self, found: Selection) -> tuple[str | None, str | None]:
        """The addresses of the queries before and after this one, with the same filters."""
        queries = self.shelf.queries()
        keys = [(row["test"], row["region"]) for row in queries]
        at = keys.index((found.query["test"], found.query["region"]))
        rest = urlencode({**found.wanted, "k": found.k})
        links = [f"{self.shelf.query_link(row)}&{rest}" for row in queries]
        return (
            links[at - 1] if at else None,
            links[at + 1] if at + 1 < len(links) else None,
        )

    def samples(self, request: Request) -> Response:
        """The samples that a query's page shows, as a file."""
        found = selected(self.shelf, request.query_params)
        name = f"test-{found.query['test']}-{found.query['region'] or 'whole'}"
        return table_file(found.rows(), request.path_params["kind"], name)

    # -- a training sample ------------------------------------------------------------------------

    def sample(self, request: Request) -> Response:
        shelf, sample = self.shelf, request.path_params["sample"]
        described: dict[str, Any] = {"score": 0.0}
        count = 0
        for run in shelf.finished:
            if "samples" in run.table_names():
                table = shelf.samples(run.id)
                count = max(count, table.num_rows)
                if sample < table.num_rows:
                    described |= table.slice(sample, 1).to_pylist()[0]
        if "sample" not in described:
            raise HTTPException(404, f"there is no training sample {sample}")
        blocks = [
            (
                title,
                [
                    (shelf.query_link(q), shelf.query_cell(q), region_of(q["region"]), row)
                    for q, row in lines
                ],
            )
            for title, lines in self._influenced(sample)
        ]
        numbers = [
            (view.run.id, name, value)
            for view in map(view_of, shelf.finished)
            for name, value in view.numbers_of(sample)
        ]
        (cell,) = shelf.sample_cells([described], {})
        return shelf.render(
            "viewer-sample.html.j2",
            cell=cell,
            sample=sample,
            count=count,
            described={k: v for k, v in described.items() if k not in ("sample", "score")},
            blocks=blocks,
            numbers=numbers,
        )

    def influenced(self, request: Request) -> Response:
        """The queries that a sample influences most, as a file."""
        sample = request.path_params["sample"]
        rows = [row for _, lines in self._influenced(sample) for _, row in lines]
        return table_file(rows, request.path_params["kind"], f"sample-{sample}")

    def _influenced(
        self, sample: int
    ) -> list[tuple[str, list[tuple[dict[str, Any], dict[str, Any]]]]]:
        """By ranking the queries that a sample influences most, each with a row of the file."""
        found = []
        for view in self.shelf.scored:
            scores_Q, ranks_Q, count_Q = ranks(view.run, SCORES, sample)
            queries = view.run.read_table("queries").to_pylist()
            for side, largest in view.sides.items():
                lines = []
                for i in head(scores_Q, INFLUENCED, largest=largest):
                    if len(view.sides) > 1 and (scores_Q[i] if largest else -scores_Q[i]) <= 0:
                        break  # from here on the effect has the other sign
                    query = queries[i]
                    row = {"run": view.run.id, "array": SCORES, "sample": sample, "side": side}
                    row |= {"test": query["test"], "region": query["region"]}
                    row |= {"score": float(scores_Q[i]), "rank": int(ranks_Q[largest][i])}
                    row |= {"of": int(count_Q[i])}
                    row |= {k: v for k, v in query.items() if k not in QUERY}
                    lines.append((query, row))
                found.append((view.ranking(side), lines))
        return found

    # -- files ------------------------------------------------------------------------------------

    def picture(self, request: Request) -> Response:
        test, task = request.path_params["test"], self.shelf.task
        found = content_of_test(task, test, {}) if test < len(task.test_data()) else None
        if not isinstance(found, np.ndarray):
            raise HTTPException(404, f"test sample {test} has no picture")
        buffer = io.BytesIO()
        Image.fromarray(found).save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png")

    def sound(self, request: Request) -> Response:
        return Response(
            self.shelf.sound(request.path_params["sample"]).file(), media_type="audio/wav"
        )

    def test_sound(self, request: Request) -> Response:
        test, task = request.path_params["test"], self.shelf.task
        found = content_of_test(task, test, {}) if test < len(task.test_data()) else None
        if not isinstance(found, Wave):
            raise HTTPException(404, f"test sample {test} has no sound")
        return Response(found.file(), media_type="audio/wav")

    def table(self, request: Request) -> Response:
        run, name = self.shelf.runs.get(request.path_params["run"]), request.path_params["name"]
        if run is None or name not in run.table_names():
            raise HTTPException(404, "there is no such table")
        data = run.files.read(f"{TABLES}/{name}.parquet")
        return Response(data, media_type="application/vnd.apache.parquet")


def _described(row: dict[str, Any]) -> dict[str, Any]:
    """A ranked row as its cell says it, score first."""
    return {"score": row["score"], **{k: v for k, v in row.items() if k != "score"}}
