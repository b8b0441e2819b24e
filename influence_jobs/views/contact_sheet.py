"""Queries and the training samples that explain them, side by side."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from influence_jobs.tasks.seen import Content, Picture, Text, Wave
from influence_jobs.terms import Region, in_a_line
from influence_jobs.views.drawing import Drawing
from influence_jobs.views.table import cell_text

_CELL, _CAPTION, _MARGIN = 1.15, 0.5, 0.35  # inches
_PHOTO = 64  # pixels: larger pictures are photographs
_MATCH, MARK = "#2e8b57", "#e4572e"
_LONGEST = 160  # characters of a text in a cell
Kind = Literal["picture", "text", "columns", "sound", ""]


@dataclass(frozen=True)
class Cell:
    """What people see of a sample, with lines of text that describe it.

    Attributes:
        content: What is seen; None if the sample has no more than its description.
        lines: The description.
        sample: Id of the training sample; None for a query.
        matches: Whether the sample has the query's label.
        token_scores: What each token brings to the sample's score, if the run keeps it.
        span: The first token that a query explains, and the first that it does not.
    """

    content: Content | None
    lines: Sequence[str]
    sample: int | None = None
    matches: bool = False
    token_scores: Sequence[float] | None = None
    span: tuple[int, int] | None = None

    @property
    def kind(self) -> Kind:
        """What the content is."""
        match self.content:
            case np.ndarray():
                return "picture"
            case Text():
                return "text"
            case Wave():
                return "sound"
            case Mapping():
                return "columns"
        return ""

    @property
    def picture(self) -> Picture | None:
        """The picture, if it is one."""
        return self.content if isinstance(self.content, np.ndarray) else None

    @property
    def is_photo(self) -> bool:
        """Whether the picture is large; small pictures are magnified."""
        return self.picture is not None and self.picture.shape[0] > _PHOTO


@dataclass(frozen=True)
class Row:
    """A query and the samples that explain it, best first.

    Attributes:
        query: The query; None if the row explains something else, such as an output node.
        region: The explained region (y, x, height, width) of the query; None for the whole.
        title: What the samples are.
    """

    query: Cell | None
    region: Region | None
    title: str
    samples: Sequence[Cell]


def contact_sheet(rows: Sequence[Row]) -> Figure:
    """Draw each row as a line of pictures: the query with its region marked, then its samples."""
    columns = 1 + max(len(row.samples) for row in rows)
    height = _CELL + _CAPTION + _MARGIN
    # The last row's caption lies below its pictures.
    size = columns * (_CELL + 0.25) + 0.3, len(rows) * height + _CAPTION
    figure = Drawing(figsize=size, dpi=150)
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    figure.subplots_adjust(
        left=0.01,
        right=0.99,
        top=1 - _MARGIN / figure.get_figheight(),
        bottom=_CAPTION / figure.get_figheight(),
    )
    for axes, row in zip(grid, rows, strict=True):
        for axis in axes:
            axis.set_axis_off()
        if row.query is not None:
            _draw(axes[0], row.query)
            if row.query.picture is not None:
                _mark(axes[0], row.region)
            axes[0].set_title("query", fontsize=7, loc="left", color="0.4")
        for axis, cell in zip(axes[1:], row.samples, strict=False):
            _draw(axis, cell)
        axes[1].set_title(row.title, fontsize=7, loc="left", color="0.4")
    return figure


def _draw(axis: Axes, cell: Cell) -> None:
    text: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 5.5}
    axis.text(0.5, -0.04, "\n".join(cell.lines), transform=axis.transAxes, **text)
    match cell.content:
        case Text():
            _write(axis, textwrap.fill(in_a_line(str(cell.content))[:_LONGEST], 26))
        case Wave():
            axis.plot(cell.content.values[:, 0], linewidth=0.4, color="0.3")
        case Mapping():
            _write(axis, "\n".join(f"{k} {cell_text(v)}" for k, v in cell.content.items()))
    if cell.picture is None:
        return
    options: dict[str, Any] = {"vmin": 0, "vmax": 255, "interpolation": "nearest"}
    axis.imshow(cell.picture, cmap="gray" if cell.picture.ndim == 2 else None, **options)
    if cell.matches:
        height, width = cell.picture.shape[:2]
        axis.add_patch(
            Rectangle((-0.5, -0.5), width, height, fill=False, edgecolor=_MATCH, linewidth=2)
        )


def _write(axis: Axes, text: str) -> None:
    plain: dict[str, Any] = {"parse_math": False, "fontsize": 5, "va": "top", "clip_on": True}
    axis.text(0.02, 0.96, text, transform=axis.transAxes, **plain)


def _mark(axis: Axes, region: Region | None) -> None:
    if region is None:
        return
    y, x, height, width = region
    if (height, width) == (1, 1):  # a single pixel would be invisible
        pixels = max(axis.get_images()[0].get_array().shape[:2])  # type: ignore[union-attr]
        ring = Circle((x, y), min(8, pixels / 10), fill=False, edgecolor=MARK, linewidth=1.2)
        axis.add_patch(ring)
        axis.plot(x, y, marker="+", color=MARK, markersize=4, markeredgewidth=0.8)
    else:
        axis.add_patch(
            Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=MARK, linewidth=1.2)
        )
