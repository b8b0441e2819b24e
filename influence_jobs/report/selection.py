"""The samples of a query that an address selects, and tables of them for other programs."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.responses import Response

from influence_jobs.errors import SpecError
from influence_jobs.experiments.stability import head
from influence_jobs.report.addresses import having, number, values
from influence_jobs.report.shelf import Shelf
from influence_jobs.store.layout import SCORES, SCORES_OF_TOKENS
from influence_jobs.store.top import strongest_tokens
from influence_jobs.views.ranking import places
from influence_jobs.views.scores import ScoresView

TOP, MOST = 10, 500  # samples of a side
FILTERS = ("label", "file")  # columns of samples by which they are filtered
# What a spreadsheet takes for a formula if a cell begins with it.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Section:
    """One side of one run's ranking for a query.

    Attributes:
        rows: As of `views.ranking.ranked_scores`; the rank is among the samples that the filters
            leave.
    """

    view: ScoresView[Any]
    side: str
    rows: list[dict[str, Any]]

    @property
    def title(self) -> str:
        return self.view.ranking(self.side)

    @property
    def meaning(self) -> str:
        """What the run's scores are: quantity, sign and unit."""
        said = self.view.run.array(SCORES).attrs
        return f"{said['quantity']}; {said['sign']}; unit: {said['unit']}"


@dataclass(frozen=True)
class Selection:
    """What an address selects.

    Attributes:
        query: Its row of a table of queries.
        choices: The values that samples can be filtered by, by column.
        sides: The sides that can be chosen.
        wanted: The chosen values, by column; also `side`.
        k: Samples of a side.
        picked: The samples that are chosen one by one.
    """

    query: dict[str, Any]
    sections: list[Section]
    choices: dict[str, list[str]]
    sides: list[str]
    wanted: dict[str, str]
    k: int
    picked: frozenset[int]

    def rows(self) -> list[dict[str, Any]]:
        """The rows of all sections, of the picked samples alone if there are any."""
        return [
            {"run": section.view.run.id, "array": SCORES, **row}
            for section in self.sections
            for row in section.rows
            if not self.picked or row["sample"] in self.picked
        ]


def selected(shelf: Shelf, given: QueryParams) -> Selection:
    """The samples that an address selects.

    Raises:
        SpecError: A value in it is none.
        HTTPException: No run explains the query.
    """
    test, region = number(given, "test", 0), given.get("region") or None
    k = number(given, "k", TOP, below=MOST + 1)
    picked = frozenset(_numbers(given, "pick"))
    wanted = {name: value for name in (*FILTERS, "side") if (value := given.get(name, ""))}
    query: dict[str, Any] | None = None
    sections: list[Section] = []
    choices: dict[str, list[str]] = {}
    sides: list[str] = []
    for view in shelf.scored:
        table = view.run.read_table("queries").to_pylist()
        matching = [row for row in table if (row["test"], row["region"]) == (test, region)]
        if not matching:
            continue
        query = query or matching[0]
        samples = shelf.samples(view.run.id)
        for name in FILTERS:
            if name in samples.column_names and name not in choices:
                choices[name] = [str(value) for value in values(samples, name)]
        sides += [side for side in view.sides if side not in sides]
        place = places(table)[table.index(matching[0])]
        sections += _sections(view, samples, matching[0], place, wanted, k)
    if query is None:
        raise HTTPException(404, f"no run here explains test sample {test}")
    return Selection(query, sections, choices, sides, wanted, k, picked)


def _sections(
    view: ScoresView[Any],
    samples: pa.Table,
    query: Mapping[str, Any],
    place: Mapping[str, Any],
    wanted: Mapping[str, str],
    k: int,
) -> Iterator[Section]:
    scores_N = np.array(view.run.array(SCORES)[query["query"]], dtype=np.float64)
    left_out_N = np.zeros(len(scores_N), dtype=bool)
    for name in FILTERS:
        if name in wanted and name in samples.column_names:
            left_out_N |= ~having(samples, name, wanted[name])
    for side, largest in view.sides.items():
        if wanted.get("side", side) != side:
            continue
        of_side_N = scores_N
        if view.spec.top_only:  # the others with a score are of the other end
            of_side_N = np.full_like(scores_N, np.nan)
            kept = head(scores_N, view.spec.top_only, largest=largest)
            of_side_N[kept] = scores_N[kept]
        ids = head(np.where(left_out_N, np.nan, of_side_N), k, largest=largest)
        tokens: list[dict[str, int | None]] = [{}] * len(ids)
        if SCORES_OF_TOKENS in view.run.array_names():
            strongest = strongest_tokens(view.run, query["query"], ids, largest=largest)
            tokens = [{"token": token} for token in strongest]
        rows = []
        described = samples.take(ids).to_pylist()
        for rank, (i, token, row) in enumerate(zip(ids, tokens, described, strict=True), start=1):
            own = {**place, "side": side, "rank": rank, "score": float(scores_N[i]), **token}
            # Ours come first, and count where a column of the task has their name.
            rows.append(own | row | own)
        yield Section(view, side, rows)


def _numbers(given: QueryParams, name: str) -> list[int]:
    return [number(QueryParams({name: text}), name, 0) for text in given.getlist(name)]


def table_file(rows: Sequence[Mapping[str, Any]], kind: str, name: str) -> Response:
    """Rows as a file to keep.

    Args:
        kind: "csv" or "parquet".
        name: Of the file, without its ending.

    Raises:
        SpecError: There is no such kind, or no row.
    """
    if not rows:
        raise SpecError("nothing is selected: there is no row to export")
    names = list(dict.fromkeys(column for row in rows for column in row))
    whole = [{column: row.get(column) for column in names} for row in rows]
    if kind == "parquet":
        data, media = _parquet(whole), "application/vnd.apache.parquet"
    elif kind == "csv":
        data, media = csv_text(names, whole).encode(), "text/csv; charset=utf-8"
    else:
        raise HTTPException(404, f"tables are csv or parquet, not {kind}")
    plain = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in name)
    headers = {"content-disposition": f'attachment; filename="{plain}.{kind}"'}
    return Response(data, media_type=media, headers=headers)


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    columns = {name: _column([row[name] for row in rows]) for name in rows[0]}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def _column(values: list[Any]) -> pa.Array:
    """The values of a column; as text if they are of several types, such as of two runs."""
    try:
        return pa.array(values)
    except pa.ArrowException:
        return pa.array([None if value is None else str(value) for value in values])


def csv_text(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV (RFC 4180) with a line of names; None is an empty cell, numbers are in full.

    A text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow([_cell(name) for name in names])
    writer.writerows([[_cell(row[name]) for name in names] for row in rows])
    return buffer.getvalue()


def _cell(value: object) -> object:
    if value is None or isinstance(value, int | float):
        return value
    text = str(value)
    return f"'{text}" if text.startswith(FORMULA) else text
