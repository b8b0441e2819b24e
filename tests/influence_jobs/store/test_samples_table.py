"""The table of samples is written in blocks: the same bytes, and one block in memory."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from influence_jobs.jobs import base
from influence_jobs.kinds import open_job
from influence_jobs.store import layout
from influence_jobs.store import run as runs
from influence_jobs.store.run import Run

ROWS = 500  # of 1,500


@pytest.fixture
def run(finished_run: Run, tmp_path, monkeypatch) -> Run:
    monkeypatch.setattr(base, "BLOCK_ROWS", ROWS)
    monkeypatch.setattr(runs, "BLOCK_ROWS", ROWS)
    return Run.create(str(tmp_path), finished_run.spec)


def file_of(run: Run) -> bytes:
    return run.files.read(f"{layout.TABLES}/samples.parquet")


def test_one_block_is_described_at_a_time_and_the_bytes_are_those_of_one_table(
    run: Run, monkeypatch
) -> None:
    asked: list[int] = []
    kind = type(open_job(run).task)
    describe = kind.describe

    def counted(task, ids):
        asked.append(len(ids))
        return describe(task, ids)

    monkeypatch.setattr(kind, "describe", counted)
    files = open_job(run).write_samples()
    assert asked == [ROWS] * 3
    found = file_of(run)
    whole = pq.read_table(pa.BufferReader(found))
    assert whole["sample"].to_pylist() == [*range(1500)]
    sink = pa.BufferOutputStream()
    pq.write_table(whole, sink, row_group_size=ROWS)
    assert sink.getvalue().to_pybytes() == found
    assert files == {f"{layout.TABLES}/samples.parquet": run.files.checksum(*files)}


def test_a_table_of_one_block_has_the_bytes_that_it_always_had(finished_run: Run) -> None:
    before = file_of(finished_run)
    sink = pa.BufferOutputStream()
    pq.write_table(finished_run.read_table("samples"), sink)
    assert sink.getvalue().to_pybytes() == before


def test_a_column_that_has_another_type_further_on_is_written_all_the_same(
    run: Run, monkeypatch
) -> None:
    def late(task, ids):
        return {"note": [None if i < ROWS else f"n{i}" for i in ids]}

    monkeypatch.setattr(type(open_job(run).task), "describe", late)
    open_job(run).write_samples()
    notes = run.read_table("samples")["note"].to_pylist()
    assert notes == [None if i < ROWS else f"n{i}" for i in range(1500)]


def test_memory_does_not_grow_with_the_samples(run: Run) -> None:
    pool, alive = pa.default_memory_pool(), []

    def block(start: int) -> pa.Table:
        alive.append(pool.bytes_allocated())
        return pa.table({"sample": pa.array(np.random.default_rng(start).permutation(10**5))})

    run.write_table_in_blocks("samples", map(block, range(12)))
    assert max(alive) - alive[0] < 3 * 8 * 10**5  # of twelve blocks


def test_blocks_of_another_run_are_taken_over(run: Run, finished_run: Run) -> None:
    run.write_table_in_blocks("samples", finished_run.table_blocks("samples"))
    assert run.read_table("samples").equals(finished_run.read_table("samples"))
