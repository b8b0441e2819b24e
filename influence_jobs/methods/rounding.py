"""What rounding stored gradients costs: dot products and top lists, before and after."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from influence_jobs.methods.packing import CODES, packed, row_bytes, unpacked
from influence_jobs.terms import Stored, size

QUERIES = 32  # of the rows, whose dot products with all others are compared
TOP = 100


def rounding_lines(rows: Sequence[npt.NDArray[Any]], *, chosen: Stored) -> list[str]:
    """For every way to store the rows: bytes a sample, and how dot products rank samples after.

    Args:
        rows: Of some samples, (B, D) for each group.
        chosen: The way that was asked for.
    """
    exact_QB = _dots(rows, "float32")
    top = min(TOP, exact_QB.shape[1] // 4)
    lines = []
    for stored in CODES:
        taken = size(sum(row_bytes(part.shape[1], stored) for part in rows))
        line = f"stored as {stored}: {taken} a sample"
        if stored != "float32" and top:
            found_QB = _dots(rows, stored)
            pairs = list(zip(exact_QB, found_QB, strict=True))
            rank = np.mean([stats.spearmanr(a, b).statistic for a, b in pairs])
            same = np.mean([_overlap(a, b, top) for a, b in pairs])
            line += (
                f"; dot products of {len(pairs)} with {exact_QB.shape[1]:,} samples: rank "
                f"correlation {rank:.4f} with float32, {same:.1%} of the top {top} are the same"
            )
        lines.append(line + (" (chosen)" if stored == chosen else ""))
    return lines


def _dots(rows: Sequence[npt.NDArray[Any]], stored: Stored) -> npt.NDArray[np.float32]:
    """Dot products of the first samples, unrounded, with the others, rounded."""
    queries = min(QUERIES, len(rows[0]) // 2)
    total = np.zeros((queries, len(rows[0]) - queries), dtype=np.float32)
    for part in rows:
        codes, scales = packed(part[queries:], stored)
        total += part[:queries] @ unpacked(codes, scales, part.shape[1], stored).T
    return total


def _overlap(a: npt.NDArray[Any], b: npt.NDArray[Any], top: int) -> float:
    return len({*np.argsort(-a)[:top]} & {*np.argsort(-b)[:top]}) / top
