"""Rankings read block by block, compared with a sort of the whole array."""

from pathlib import Path

import numpy as np
import pytest

from influence_jobs.kinds.baseline.spec import BaselineSpec
from influence_jobs.specs.base import TaskSpec
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.store.layout import SCORES, ArrayLayout
from influence_jobs.store.run import Run
from influence_jobs.store.top import ranks, row_totals, top_scores

Q, N, CHUNK = 3, 1000, 256


@pytest.fixture
def run(tmp_path: Path) -> Run:
    items = tuple(Query(test=test) for test in range(Q))
    task = TaskSpec(name="mnist", data="")
    spec = BaselineSpec(task=task, method="random", queries=Queries(items=items))
    run = Run.create(str(tmp_path), spec)
    run.create_arrays(
        [ArrayLayout(SCORES, (Q, N), 1, CHUNK, ("query", "sample"), {}, "float32", 2)]
    )
    scores = np.random.default_rng(0).integers(0, 50, (Q, N)).astype(np.float32)  # with many ties
    scores[0, ::7] = np.nan
    for start in range(0, N, CHUNK):
        run.write_rows(SCORES, start, scores[:, start : start + CHUNK])
    return run


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 10, N])
def test_the_best_samples_are_those_of_a_sort_and_left_out_ones_do_not_count(
    run: Run, k: int, largest: bool
) -> None:
    scores = run.read_rows(SCORES, 0, N)
    for query, (ids, values) in zip(
        (2, 0), top_scores(run, SCORES, (2, 0), k, largest=largest), strict=True
    ):
        row = scores[query]
        sign = -1 if largest else 1
        expected = sorted((sign * value, i) for i, value in enumerate(row) if not np.isnan(value))[
            :k
        ]
        assert ids.tolist() == [i for _, i in expected]
        assert values.tolist() == [sign * value for value, _ in expected]


def test_score_chunks_hold_several_queries(run: Run) -> None:
    assert run.array(SCORES).chunks == (2, CHUNK)


def test_a_sample_has_its_rank_among_those_that_a_query_scores(run: Run) -> None:
    scores = run.read_rows(SCORES, 0, N)
    for sample in (1, 500, 999):
        values, by_end, counts = ranks(run, SCORES, sample)
        assert values.tolist() == scores[:, sample].tolist()
        assert counts.tolist() == [N - len(range(0, N, 7)), N, N]
        for query in range(Q):
            row = scores[query][~np.isnan(scores[query])]
            assert by_end[True][query] == 1 + (row > scores[query, sample]).sum()
            assert by_end[False][query] == 1 + (row < scores[query, sample]).sum()


def test_totals_of_norms_that_several_checkpoints_have(run: Run) -> None:
    layout = ArrayLayout("norms/a", (2, N, 3), 1, CHUNK, ("checkpoint", "sample", "channel"))
    run.create_arrays([layout])
    run = Run.open(run.root, run.id)
    norms = np.random.default_rng(1).random((2, N, 3)).astype(np.float32)
    for start in range(0, N, CHUNK):
        run.write_rows("norms/a", start, norms[:, start : start + CHUNK])
    exact = norms.astype(np.float64)
    np.testing.assert_allclose(row_totals(run, "norms/a"), exact.sum(axis=(0, 2)), rtol=1e-12)
    by_channel = row_totals(run, "norms/a", channel=1)
    np.testing.assert_allclose(by_channel, exact[:, :, 1].sum(axis=0), rtol=1e-12)
