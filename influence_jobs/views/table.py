"""Tables for people."""

from collections.abc import Sequence
from dataclasses import dataclass

from influence_jobs.terms import is_missing


@dataclass(frozen=True)
class Table:
    """A table for people; `note` explains it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [f"**{self.title}**", "", f"| {' | '.join(self.columns)} |"]
        lines.append(f"|{'---|' * len(self.columns)}")
        lines += [f"| {' | '.join(map(cell_text, row))} |" for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])

    def text(self) -> str:
        """The table in columns of plain text, without its title."""
        lines = [[*self.columns], *([cell_text(value) for value in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        found = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([*found, *([self.note] if self.note else [])])


def cell_text(value: object) -> str:
    """A value as text: fractions with three digits, large numbers with commas; `-` for none."""
    if is_missing(value):
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
    return str(value)
