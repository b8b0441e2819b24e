"""Find the largest rows of an array or the best samples of a query, one chunk at a time."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from influence_jobs.store.layout import SCORES_OF_TOKENS
from influence_jobs.store.run import Run


def largest_rows(
    run: Run, name: str, k: int, *, channel: int | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The k rows with the largest `row_totals`: ids and totals, largest first, ties by id."""
    totals = row_totals(run, name, channel=channel)
    best = np.argsort(-totals, kind="stable")[:k]
    return best, totals[best]


def row_totals(run: Run, name: str, *, channel: int | None = None) -> npt.NDArray[np.float64]:
    """The sum of each row of an array over all other axes, (N,); with a channel, of it alone."""
    array, axis = run.array(name), run.row_axis(name)
    num_rows, step = array.shape[axis], array.chunks[axis]
    totals = []
    for start in range(0, num_rows, step):
        block: npt.NDArray[Any] = run.read_rows(name, start, min(start + step, num_rows))
        by_row = np.moveaxis(block, axis, 0).astype(np.float64)
        if channel is not None:
            by_row = np.take(by_row, channel, axis=axis + 1)
        totals.append(by_row.reshape(len(by_row), -1).sum(1))
    return np.concatenate(totals)


def top_scores(
    run: Run, name: str, queries: Sequence[int], k: int, *, largest: bool = True
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
    """The samples with the largest or smallest scores for some queries, best first, ties by id.

    Args:
        run: The run.
        name: One of its arrays, (Q, N).
        queries: Row numbers in this array.
        k: Number of samples per query.
        largest: Largest scores first; else smallest first.

    Returns:
        Ids and scores for each query, (k,) each. Samples without a score (NaN) are skipped, so
        there may be fewer.
    """
    array, axis = run.array(name), run.row_axis(name)
    num_rows, step = array.shape[axis], array.chunks[axis]
    blocks = (
        (start, run.read_rows(name, start, min(start + step, num_rows)).astype(np.float64))
        for start in range(0, num_rows, step)
    )
    return top_of(blocks, queries, k, largest=largest)


def top_of(
    blocks: Iterable[tuple[int, npt.NDArray[np.float64]]],
    queries: Sequence[int],
    k: int,
    *,
    largest: bool = True,
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
    """Like `top_scores`, from blocks of samples: the first sample's id, and scores (Q, B)."""
    sign = -1.0 if largest else 1.0
    best = [(np.empty(0, dtype=np.int64), np.empty(0)) for _ in queries]
    for start, block in blocks:
        for i, query in enumerate(queries):
            found = np.flatnonzero(~np.isnan(block[query]))
            ids = np.concatenate([best[i][0], found + start])
            scores = np.concatenate([best[i][1], block[query][found]])
            kept = np.argsort(sign * scores, kind="stable")[:k]
            best[i] = ids[kept], scores[kept]
    return best


def strongest_tokens(
    run: Run, query: int, ids: npt.NDArray[np.int64], *, largest: bool = True
) -> list[int | None]:
    """For each of some samples the token with the largest or smallest score; None without any."""
    array: Any = run.array(SCORES_OF_TOKENS)
    sign = 1.0 if largest else -1.0
    found: list[int | None] = []
    for sample in ids:
        scores_T = sign * np.asarray(array[query, int(sample)], dtype=np.float64)
        known = ~np.isnan(scores_T)
        found.append(int(np.where(known, scores_T, -np.inf).argmax()) if known.any() else None)
    return found


def ranks(
    run: Run, name: str, row: int
) -> tuple[npt.NDArray[np.float64], dict[bool, npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    """The rank of one sample for every query of an array (Q, N).

    Returns:
        Its scores (Q,); its ranks (Q,) from 1, by `largest` as in `top_scores`; and how many
        samples have a rank (Q,). Samples without a score (NaN) have none.
    """
    array, axis = run.array(name), run.row_axis(name)
    num_rows, step = array.shape[axis], array.chunks[axis]
    scores_Q: npt.NDArray[np.float64] = run.read_rows(name, row, row + 1)[:, 0].astype(np.float64)
    above_Q, below_Q, count_Q = np.zeros((3, len(scores_Q)), dtype=np.int64)
    for start in range(0, num_rows, step):
        block_QB = run.read_rows(name, start, min(start + step, num_rows))
        above_Q += (block_QB > scores_Q[:, None]).sum(axis=1)
        below_Q += (block_QB < scores_Q[:, None]).sum(axis=1)
        count_Q += (~np.isnan(block_QB)).sum(axis=1)
    return scores_Q, {True: above_Q + 1, False: below_Q + 1}, count_Q
