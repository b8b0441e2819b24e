"""A whole run in an S3 bucket."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.errors import RuntimeFault
from influence_jobs.kinds import runner as runner_module
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.store import layout
from influence_jobs.store.find import find_run, run_ids
from influence_jobs.store.run import Run
from influence_jobs.store.status import is_done
from influence_jobs.store.verify import find_damage


@pytest.fixture
def root(bucket: str, tmp_path: Path) -> str:
    return f"{bucket}/{tmp_path.name}"


def assert_same(run: Run, expected: Run) -> None:
    assert is_done(run)
    check = find_damage(run)
    assert (check.planned, check.damaged) == (check.good, {})
    assert run.array_names() == expected.array_names() != []
    for name in run.array_names():
        np.testing.assert_array_equal(run.array(name)[:], expected.array(name)[:])
    assert run.table_names() == expected.table_names()
    for name in run.table_names():
        assert run.read_table(name).equals(expected.read_table(name))


def test_training_and_norms_are_those_of_a_local_run(
    root: str, grad_norms_spec: GradNormsSpec, finished_run: Run
) -> None:
    run = Run.create(root, grad_norms_spec)
    drive(root, run.id, InlineBackend())
    assert_same(run, finished_run)
    assert run_ids(root) == run_ids(finished_run.root)
    assert find_run(root, run.id[:-2]).id == run.id
    assert layout.LEASE not in run.files.names("")
    assert run.files.names(layout.PROGRESS) == []


def test_an_interrupted_run_is_resumed(
    root: str, grad_norms_spec: GradNormsSpec, finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(root, grad_norms_spec)
    original = runner_module.ShardRunner.run

    def dies_at_the_third(self: runner_module.ShardRunner, shard: Any) -> Any:
        if shard.start == 512:
            raise KeyboardInterrupt
        return original(self, shard)

    monkeypatch.setattr(runner_module.ShardRunner, "run", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        drive(root, run.id, InlineBackend(), shard_rows=256)
    finished_at = {s: e.finished_at for s, e in run.manifest.done().items()}
    assert len(finished_at) == 2

    monkeypatch.setattr(runner_module.ShardRunner, "run", original)
    drive(root, run.id, InlineBackend())
    done = run.manifest.done()
    assert {s: e.finished_at for s, e in done.items() if s in finished_at} == finished_at
    assert_same(run, finished_run)


@pytest.mark.parametrize("failures", [1, 3])
def test_errors_of_the_store_below_zarr_are_tried_again(
    root: str,
    grad_norms_spec: GradNormsSpec,
    finished_run: Run,
    monkeypatch: pytest.MonkeyPatch,
    failures: int,
) -> None:
    from obstore.exceptions import GenericError
    from zarr.storage import ObjectStore

    original, failed = ObjectStore.set, []

    async def failing(self: ObjectStore, key: str, value: Any) -> None:
        if "/c/" in key and len(failed) < failures:
            failed.append(key)
            raise GenericError("slow down")
        await original(self, key, value)

    run = Run.create(root, grad_norms_spec)
    monkeypatch.setattr(ObjectStore, "set", failing)
    if failures == 1:
        drive(root, run.id, InlineBackend())
        assert max(entry.attempt for entry in run.manifest.done().values()) == 2
    else:
        with pytest.raises(RuntimeFault, match="GenericError: slow down"):
            drive(root, run.id, InlineBackend())
        drive(root, run.id, InlineBackend())
    assert_same(run, finished_run)
