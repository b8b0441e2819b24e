"""Print results: tables for people, one line of JSON for programs."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.cells import cell_len
from rich.console import Console

from influence_jobs.terms import in_a_line, is_missing, shown

if TYPE_CHECKING:
    from influence_jobs.store.run import Run


class _Plain(Console):
    """Prints texts of any source: names of files and runs, messages from a run's folder.

    They are not wrapped, and nothing in them is markup; what a terminal would obey is written out.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def print(self, *texts: Any, **options: Any) -> None:
        super().print(*(shown(str(text)) for text in texts), **options)


FEW = 10  # rows that are printed of a table that a file has

# Results go to standard output, messages to standard error.
out = _Plain()
err = _Plain(stderr=True)


def say(line: str) -> None:
    """Print a message for the user."""
    err.print(line)


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on one line of standard output; NaN and infinity become null."""
    strict = json.loads(json.dumps(value), parse_constant=lambda _: None)
    typer.echo(json.dumps(strict))


def print_fields(fields: Sequence[tuple[str, object]]) -> None:
    """Print a name and its value on each line."""
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        out.print(f"{name:<{width}}  {in_a_line(str(value))}")


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, written: Path | None = None
) -> None:
    """Print rows under headings. Numbers are flush right; no cell is cut.

    Args:
        written: A file that has all rows, so that a few are enough here.
    """
    left = 0 if written is None else len(rows) - FEW
    if left > 0:
        rows = rows[:FEW]
    flushed = []
    for name, values in zip(columns, zip(*rows, strict=True), strict=True):
        cells = [in_a_line(cell) for cell in (name, *_cells(values))]
        width = max(map(cell_len, cells))
        numbers = all(isinstance(value, (int, float)) for value in values)
        for i, cell in enumerate(cells):
            pad = " " * (width - cell_len(cell))
            cells[i] = pad + cell if numbers else cell + pad
        flushed.append(cells)
    for i, line in enumerate(zip(*flushed, strict=True)):
        out.print("  ".join(line).rstrip(), style="bold" if i == 0 else None)
    if left > 0:
        out.print(f"and {left:,} more rows in {written}")


def _cells(values: Sequence[object]) -> list[str]:
    """A column as text. Fractions have five digits of the largest, and aligned decimal points.

    `-` stands for a number that there is not.
    """
    fractions = [value for value in values if isinstance(value, float) and math.isfinite(value)]
    if not fractions:
        return ["-" if is_missing(value) else str(value) for value in values]
    largest = max(map(abs, fractions))
    decimals = 4 - math.floor(math.log10(largest)) if largest else 0
    form = f".{decimals}f" if 0 <= decimals <= 8 else ".5g"
    return [
        "-"
        if is_missing(value)
        else format(value, form)
        if isinstance(value, float)
        else str(value)
        for value in values
    ]


def run_summary(run: "Run", status: str) -> dict[str, Any]:
    """What `--json` prints of a run: its id, path, status, arrays and tables."""
    arrays = {}
    for name in run.array_names():
        array = run.array(name)
        arrays[name] = {
            "path": f"data.zarr/{name}",
            "shape": list(array.shape),
            "dtype": str(array.dtype),
        }
    return {
        "run": run.id,
        "path": run.files.url,
        "status": status,
        "arrays": arrays,
        "tables": {name: f"tables/{name}.parquet" for name in run.table_names()},
    }
