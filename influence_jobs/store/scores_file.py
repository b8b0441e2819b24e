"""Read scores that another program wrote: .npy, Parquet or Zarr."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from influence_jobs.errors import SpecError, first_line
from influence_jobs.store.layout import SCORES

_ZARR = ("zarr.json", ".zarray", ".zgroup")  # what tells a folder of Zarr, of version 3 or 2
SUFFIXES = (".npy", ".parquet", ".zarr")


def is_scores_file(word: str) -> bool:
    """Whether a word names a file of scores, rather than a run or a method."""
    if word.endswith(SUFFIXES):
        return True
    try:
        return any((Path(word) / name).is_file() for name in _ZARR)
    except OSError:  # longer than the name of a file may be
        return False


def read_scores(path: str, shape: tuple[int, int]) -> npt.NDArray[np.floating[Any]]:
    """Scores (Q, N), float64 if the file has float64, else float32.

    A Parquet file has a row a query: with one column of lists, or with a column for each sample. A
    Zarr folder is an array, or a group with an array `scores`.

    Args:
        shape: (Q, N), which the scores must have.

    Raises:
        SpecError: There is no such file, or it has no finite number for every query and sample.
    """
    try:
        values = _read(Path(path))
    except FileNotFoundError:
        raise SpecError(f"there is no file of scores {path}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:  # ArrowInvalid is a ValueError
        said = first_line(error)
        raise SpecError(
            f"cannot read scores from {path} ({said}): write them as .npy, .parquet or .zarr"
        ) from error
    if values.dtype.kind != "f":
        raise SpecError(
            f"the scores in {path} are {values.dtype}: write floating-point numbers, such as "
            "float32"
        )
    if values.shape != shape:
        turned = "; transpose them" if values.shape == shape[::-1] else ""
        raise SpecError(
            f"the scores in {path} have shape {_shape(values.shape)}, and there are {shape[0]:,} "
            f"queries (rows) and {shape[1]:,} training samples (columns){turned}"
        )
    if not (finite_QN := np.isfinite(values)).all():
        query, sample = np.argwhere(~finite_QN)[0]
        raise SpecError(
            f"the scores in {path} are not all finite, the first in row {query}, column {sample}: "
            "every sample needs a number"
        )
    return np.ascontiguousarray(values, np.float64 if values.dtype.itemsize > 4 else np.float32)


def _read(path: Path) -> npt.NDArray[Any]:
    if path.is_dir():
        if not any((path / name).is_file() for name in _ZARR):
            raise ValueError("a folder without an array of Zarr")
        found = zarr.open(str(path), mode="r")
        array = found[SCORES] if isinstance(found, zarr.Group) else found
        if not isinstance(array, zarr.Array):
            raise ValueError(f"{SCORES} is no array of Zarr")
        return np.asarray(array[:])
    if not path.is_file():
        raise FileNotFoundError(path)
    if path.suffix == ".parquet":
        return _of_table(pq.read_table(path))
    return np.asarray(np.load(path, allow_pickle=False))


def _of_table(table: pa.Table) -> npt.NDArray[Any]:
    columns = [column.combine_chunks() for column in table.columns]
    if len(columns) == 1 and hasattr(columns[0].type, "value_type"):
        if missing := columns[0].null_count:
            raise ValueError(f"{missing} of {len(columns[0])} rows are null")
        return np.array([row.values.to_numpy(zero_copy_only=False) for row in columns[0]])
    return np.column_stack([column.to_numpy(zero_copy_only=False) for column in columns])


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{n:,}" for n in shape)
