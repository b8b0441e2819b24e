"""Values in the addresses of the viewer's pages."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from starlette.datastructures import QueryParams

from influence_jobs.errors import SpecError


def number(given: QueryParams, name: str, default: int, *, below: int | None = None) -> int:
    """A whole number, 0 or larger.

    Raises:
        SpecError: The value is not a whole number, or it is too large.
    """
    text = given.get(name, str(default))
    if (
        not text.isascii()
        or not text.isdigit()
        or len(text) > 18
        or (below is not None and int(text) >= below)
    ):
        limit = f" below {below}" if below is not None else ""
        raise SpecError(f"{name}={text}: write a whole number{limit}")
    return int(text)


def positive(given: QueryParams, name: str) -> float | None:
    """A number above 0; None if it is left empty.

    Raises:
        SpecError: The value is not a number above 0.
    """
    text = given.get(name, "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise SpecError(f"{name}={text}: write a number above 0")
    return value


def values(samples: pa.Table, name: str) -> list[Any]:
    """The distinct values of a column, sorted; a missing value comes last."""
    found: list[Any] = pc.unique(samples.column(name)).sort().to_pylist()
    return found


def having(samples: pa.Table, name: str, text: str) -> npt.NDArray[np.bool_]:
    """Whether a sample's value in a column reads `text`, shape (N,)."""
    column = samples.column(name)
    meant = [value for value in values(samples, name) if str(value) == text]
    found: npt.NDArray[np.bool_] = pc.is_in(column, pa.array(meant, column.type)).to_numpy()
    return found
