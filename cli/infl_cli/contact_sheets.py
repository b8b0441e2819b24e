"""`infl top --png`: the ranked samples of a run as pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from infl_cli.top import by_query
from influence_jobs.report.contact_sheet import Cell, Row, contact_sheet
from influence_jobs.store.run import Run
from influence_jobs.tasks.registry import make_task

_RANKING = {"test", "region", "side", "rank", "score", "sample"}


def sheet(run: Run, ranked: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the rows that `infl top` prints, a line for every query and side.

    Raises:
        SpecError: The task has no pictures.
        DataError: Its data are not there.
    """
    task = make_task(run.spec.task)
    rows = []
    for (test, region, side), line in by_query(ranked).items():
        known = {k: v[0] for k, v in task.describe_test(np.array([test])).items()}
        pictures = task.pictures(np.array([row["sample"] for row in line]))
        query = Cell(task.test_picture(test), _caption(f"test {test}", known))
        cells = [
            Cell(
                picture,
                _caption(f"{row['sample']}: {row['score']:.3g}", _described(row)),
                matches="label" in known and row.get("label") == known["label"],
            )
            for picture, row in zip(pictures, line, strict=True)
        ]
        marked = tuple(map(int, region.split(","))) if region else None
        rows.append(Row(query, marked, side, cells))  # type: ignore[arg-type]
    return contact_sheet(rows)


def _described(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in _RANKING}


def _caption(first: str, known: Mapping[str, Any]) -> str:
    values = known.values() if len(known) > 1 else (f"{k} {v}" for k, v in known.items())
    return f"{first}\n{' '.join(map(str, values))}"
