"""A figure with its caption and its data."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
from matplotlib.figure import Figure

from influence_jobs.views.contact_sheet import Row, contact_sheet
from influence_jobs.views.curves import Panel, chart


@dataclass(frozen=True)
class Shown:
    """A figure: rows of pictures, or the panels of a chart.

    Attributes:
        name: Name of its files, unique in the run.
        title: What the figure shows.
        caption: What to see in it.
        data: Its data, including rows that are not drawn.
        number: Number of the corresponding figure in the research report, if there is one.
    """

    name: str
    title: str
    caption: str
    data: pa.Table
    rows: Sequence[Row] = ()
    panels: Sequence[Panel] = ()
    number: str | None = None

    @property
    def heading(self) -> str:
        """Number and title."""
        return f"Figure {self.number}. {self.title}" if self.number else self.title

    def draw(self) -> Figure:
        """The whole figure, for print."""
        return contact_sheet(self.rows) if self.rows else chart(self.panels)


def file_name(text: str) -> str:
    """A text with only the characters that a file name may have."""
    return re.sub(r"[^\w+-]+", "-", text).strip("-")
