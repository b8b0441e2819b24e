"""A figure: what is drawn, what to see in it, and its data."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
from matplotlib.figure import Figure

from influence_jobs.views.contact_sheet import Row, contact_sheet
from influence_jobs.views.curves import Panel, chart


@dataclass(frozen=True)
class Shown:
    """One figure: rows of pictures, or the panels of a chart.

    Attributes:
        name: Of its files, unique in its run.
        title: What it is.
        caption: What to see.
        data: What is drawn, and more of the same kind where not all is.
        number: Of the research report's figure that it corresponds to.
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
    """A text as part of a file's name."""
    return re.sub(r"[^\w+-]+", "-", text).strip("-")
