"""A table to look at in a notebook, with the picture or text of each row's sample beside it."""

import textwrap
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
from influence_jobs.tasks.seen import Content, Picture, Text, content_of_test, contents
from influence_jobs.terms import Region, shown
from influence_jobs.views.contact_sheet import MARK
from influence_jobs.views.sheets import query_cell, region_of
from influence_jobs.views.table import Table, cell_text

MOST = 60  # rows that are shown
MOST_TEXT = 200  # characters of a sample in a row
SIDE = 56  # pixels of a picture in a row; a query has twice as many, a photograph four times


class SampleRows:
    """Rows of a table, with the pictures or texts that the task shows of their samples.

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
        seen = self._seen(rows)
        head = "".join(_cell("th", name, _side(rows[0][name])) for name in names)
        lines = [f"<tr>{'<th></th>' if any(seen) else ''}{head}</tr>"]
        for i, row in enumerate(rows):
            image = f'<td style="text-align: left">{seen[i]}</td>' if any(seen) else ""
            cells = "".join(_cell("td", row[name], _side(row[name])) for name in names)
            lines.append(f"<tr>{image}{cells}</tr>")
        return f"<table><thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table>"

    def _seen(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[str]:
        """What people see of each row's sample, as HTML; empty where the row says all."""
        try:
            if self._task is not None and "sample" in rows[0]:
                ids = np.array([row["sample"] for row in rows], dtype=np.int64)
                found = contents(self._task, ids, [{}] * len(rows))
                return [_seen(one, None, row) for one, row in zip(found, rows, strict=True)]
            if self._task is not None and "test" in rows[0]:
                tests = [content_of_test(self._task, row["test"], {}) for row in rows]
                return [
                    _seen(one, region_of(row.get("region")), row)
                    for one, row in zip(tests, rows, strict=True)
                ]
        except (SpecError, DataError):  # a task may say what cannot be shown, and no data be here
            pass
        return [""] * len(rows)


_QUERY = ("test", "region")


def _query(row: Mapping[str, Any]) -> tuple[int, str | None]:
    return row["test"], row.get("region")


def _cell(tag: str, value: Any, side: str) -> str:
    return f'<{tag} style="text-align: {side}">{escape(shown(cell_text(value)))}</{tag}>'


def _side(value: Any) -> str:
    """Where values stand in their column: numbers flush right."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "right" if number else "left"


def _seen(content: Content | None, region: Region | None, row: Mapping[str, Any]) -> str:
    if isinstance(content, np.ndarray):
        return _image(_marked(content, region), SIDE)
    if isinstance(content, Text) and str(content) not in row.values():
        return escape(shown(textwrap.shorten(str(content), MOST_TEXT, placeholder=" ...")))
    return ""


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
