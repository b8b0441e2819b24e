"""Read stored scores for experiments."""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from influence_jobs.specs.base import AnySpec
from influence_jobs.specs.rankings import Ranking
from influence_jobs.store.layout import SCORES
from influence_jobs.store.run import Run


def needed_runs(rankings: Iterable[Ranking]) -> tuple[AnySpec, ...]:
    """The runs that hold the scores of some rankings, each once."""
    runs = [scores for ranking in rankings for scores in ranking.scores]
    return tuple({scores.run_id: scores for scores in runs}.values())


def digests(root: str, rankings: Iterable[Ranking]) -> dict[str, str]:
    """Digests of the runs that hold the scores of some rankings, by run id."""
    return {spec.run_id: Run(root, spec).digest() for spec in needed_runs(rankings)}


def score_blocks(root: str, ranking: Ranking) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """A ranking's scores in blocks of B samples.

    Yields:
        The id of the block's first sample, and scores (Q, B); NaN for samples that are left out.
    """
    runs = [Run(root, spec) for spec in ranking.scores]
    array = runs[0].array(SCORES)
    axis = runs[0].row_axis(SCORES)
    for start in range(0, array.shape[axis], array.chunks[axis]):
        stop = min(start + array.chunks[axis], array.shape[axis])
        blocks = [run.read_rows(SCORES, start, stop).astype(np.float64) for run in runs]
        yield start, np.mean(blocks, axis=0)


def query_scores(root: str, ranking: Ranking, query: int) -> npt.NDArray[np.float64]:
    """A ranking's scores for one query, (N,)."""
    runs = [Run(root, spec) for spec in ranking.scores]
    rows = np.stack([np.asarray(run.array(SCORES)[query], dtype=np.float64) for run in runs])
    mean_N: npt.NDArray[np.float64] = rows.mean(axis=0)
    return mean_N
