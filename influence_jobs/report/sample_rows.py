"""A table to look at in a notebook, with a picture of each row's sample beside it."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from influence_jobs.errors import DataError, SpecError
from influence_jobs.report.html import picture_uri
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.seen import Picture, Text
from influence_jobs.terms import Region, shown
from influence_jobs.views.contact_sheet import MARK
from influence_jobs.views.sheets import query_cell, region_of
from influence_jobs.views.table import Table, cell_text

MOST = 60  # rows that are shown
SIDE = 56  # pixels of a picture in a row; a query has twice as many, a photograph four times


class SampleRows:
    """Rows of a table, with pictures where the task has them.

    Rows of one query stand below its picture. A notebook shows this as HTML, everything else as
    text.

    Args:
        table: With a column `sample` of training samples, or `test` of test samples, or neither.
        task: Its pictures are shown; None for none.
    """

    def __init__(self, table: pa.Table, task: Task | None) -> None:
        self.table, self._task = table, task

    def __repr__(self) -> str:
        rows = self.table.slice(0, MOST).to_pylist()
        cells = [[shown(cell_text(value)) for value in row.values()] for row in rows]
        return Table("", [*map(shown, self.table.column_names)], cells, self._more).text()

    def _repr_html_(self) -> str:
        rows = self.table.slice(0, MOST).to_pylist()
        of_queries = {"test", "sample"} <= set(self.table.column_names)
        blocks = []
        for key, block in groupby(rows, _query if of_queries else lambda _: None):
            heading = self._heading(*key) if key is not None else ""
            blocks.append(heading + self._block([*block], without=_QUERY if of_queries else ()))
        return "".join(blocks) + (f"<p>{escape(self._more)}</p>" if self._more else "")

    @property
    def _more(self) -> str:
        left = self.table.num_rows - MOST
        return f"and {left:,} more rows" if left > 0 else ""

    def _heading(self, test: int, region: str | None) -> str:
        words, image = f"test {test}", ""
        if self._task is not None:
            cell, _ = query_cell(self._task, test, region)
            seen: list[str] = []  # what is no picture, in words
            if isinstance(cell.content, Text):
                seen = [str(cell.content)]
            elif isinstance(cell.content, Mapping):
                seen = [f"{name} {cell_text(value)}" for name, value in cell.content.items()]
            words = ", ".join([*cell.lines, *seen])
            if cell.picture is not None:
                side = (4 if cell.is_photo else 2) * SIDE
                image = _image(_marked(cell.picture, region_of(region)), side) + " "
        return f"<p>{image}<strong>{escape(shown(words))}</strong></p>"

    def _block(self, rows: Sequence[Mapping[str, Any]], *, without: Sequence[str]) -> str:
        names = [name for name in rows[0] if name not in without]
        pictures = self._pictures(rows)
        head = "".join(_cell("th", name, _side(rows[0][name])) for name in names)
        lines = [f"<tr>{'<th></th>' if pictures else ''}{head}</tr>"]
        for i, row in enumerate(rows):
            image = f"<td>{_image(pictures[i], SIDE)}</td>" if pictures else ""
            cells = "".join(_cell("td", row[name], _side(row[name])) for name in names)
            lines.append(f"<tr>{image}{cells}</tr>")
        return f"<table><thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table>"

    def _pictures(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[Picture]:
        try:
            if self._task is not None and "sample" in rows[0]:
                return [*self._task.pictures(np.array([row["sample"] for row in rows]))]
            if self._task is not None and "test" in rows[0]:
                regions = [region_of(row.get("region")) for row in rows]
                found = [self._task.test_picture(row["test"]) for row in rows]
                return [*map(_marked, found, regions)]
        except (SpecError, DataError):  # a task may have no pictures, and no data here
            pass
        return ()


_QUERY = ("test", "region")


def _query(row: Mapping[str, Any]) -> tuple[int, str | None]:
    return row["test"], row.get("region")


def _cell(tag: str, value: Any, side: str) -> str:
    return f'<{tag} style="text-align: {side}">{escape(shown(cell_text(value)))}</{tag}>'


def _side(value: Any) -> str:
    """Where values stand in their column: numbers flush right."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "right" if number else "left"


def _image(picture: Picture, side: int) -> str:
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = f'width="{round(scale * width)}" height="{round(scale * height)}"'
    small = "; image-rendering: pixelated" if max(height, width) < side else ""
    style = f"display: inline-block; margin: 0; vertical-align: middle{small}"
    return f'<img src="{picture_uri(picture)}" {size} alt="" style="{style}">'


def _marked(picture: Picture, region: Region | None) -> Picture:
    """A picture with a frame around a region."""
    if region is None:
        return picture
    y, x, height, width = region
    image = Image.fromarray(picture).convert("RGB")
    line = max(1, max(image.size) // 100)
    frame = (x - line, y - line, x + width - 1 + line, y + height - 1 + line)
    ImageDraw.Draw(image).rectangle(frame, outline=MARK, width=line)
    return np.asarray(image)
