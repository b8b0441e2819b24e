"""Two workers at the same shard: whoever is first, the run ends with the right bytes."""

import contextlib
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from infl_cluster.driver import drive
from influence_jobs.jobs.base import Receipt, Result
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.kinds.runner import ShardRunner
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.kinds.self_influence.spec import SelfInfluenceSpec
from influence_jobs.specs.base import Spec, make_spec
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.specs.solvers import EkFacSettings, IdentitySettings
from influence_jobs.store import layout
from influence_jobs.store.manifest import checksum
from influence_jobs.store.run import Run
from influence_jobs.store.status import is_done
from influence_jobs.store.verify import find_damage

# Before which operation the other worker is at the shard (see `test_the_operations_are_known`), and
# whether the first worker is ended after it.
MOMENTS = [(1, True), (2, False), (3, True), (4, False), (4, True), (6, False)]


class Ended(BaseException):
    """The worker is ended here."""


class Contested:
    """Two workers at the first shard; the second does it as a whole within the first one's attempt.

    Args:
        at: Before which operation of the first worker on manifest and arrays the second is at it.
        ends: Whether the first worker is ended at the operation after that, or finishes too.
        rounds: Whether the second worker's processor rounds in another way.
    """

    most_workers = 1

    def __init__(self, at: int, *, ends: bool, rounds: bool = False):
        self.at, self.ends, self.rounds = at, ends, rounds
        self.operations: list[str] = []
        self.passes = 0

    def show(self, *_: Any) -> None:
        pass

    def run(
        self,
        run: Run,
        shards: Any,
        *,
        on_start: Callable[[str, str], None],
        on_receipt: Callable[[Receipt, bool], None],
        **_: Any,
    ) -> None:
        self.passes += 1
        first, second = ShardRunner(run.root, run.id), ShardRunner(run.root, run.id)
        for shard in shards:
            on_start(shard.id, "host:1")
            if shard.id != shards[0].id or self.passes > 1:
                on_receipt(first.run(shard), False)
                continue
            won: list[Receipt] = []

            def the_other(shard: Any = shard, won: list[Receipt] = won) -> None:
                if self.rounds:
                    compute = second._job.run
                    second._job.run = lambda *given: rounded(compute(*given))  # type: ignore[method-assign]
                on_start(shard.id, "host:2")
                won.append(second.run(shard))

            self._disturb(first, the_other)
            with contextlib.suppress(Ended):
                won.append(first.run(shard))
            first = ShardRunner(run.root, run.id)
            on_receipt(won[0], False)

    def _disturb(self, runner: ShardRunner, act: Callable[[], None]) -> None:
        count = itertools.count()

        def wrapped(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*given: Any, **options: Any) -> Any:
                self.operations.append(name)
                now = next(count)
                if now == self.at:
                    act()
                if now == self.at + 1 and self.ends:
                    raise Ended
                return method(*given, **options)

            return call

        run = runner._run
        for owner, name in ((run.manifest, "read"), (run.manifest, "write"), (run, "write_rows")):
            setattr(owner, name, wrapped(name, getattr(owner, name)))


def rounded(result: Result) -> Result:
    return Result({name: values * (1 + 1e-6) for name, values in result.arrays.items()})


def arrays(run: Run) -> dict[str, bytes]:
    root = Path(run.files.url, layout.ARRAYS)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def run(tmp_path: Path, trained_root: Path, grad_norms_spec: GradNormsSpec) -> Run:
    shutil.copytree(trained_root, tmp_path / "runs")
    return Run.create(str(tmp_path / "runs"), grad_norms_spec)


def carry_out(run: Run, backend: Contested) -> None:
    drive(run.root, run.id, backend, shard_rows=700)
    assert is_done(run)
    check = find_damage(run)
    assert (check.planned, check.damaged, check.missing) == (check.good, {}, ())
    assert run.files.names(layout.PROGRESS) == []


def test_the_operations_are_known(run: Run) -> None:
    backend = Contested(-2, ends=False)
    carry_out(run, backend)
    # What is done, "running", whether another was faster, three layers, "done".
    expected = ["read", "write", "read", "write_rows", "write_rows", "write_rows", "write"]
    assert backend.operations == expected


@pytest.mark.parametrize(("at", "ends"), MOMENTS)
def test_the_bytes_are_those_of_one_worker(
    run: Run, finished_run: Run, at: int, ends: bool
) -> None:
    carry_out(run, Contested(at, ends=ends))
    assert arrays(run) == arrays(finished_run)


@pytest.mark.parametrize(("at", "ends"), MOMENTS)
def test_workers_that_round_in_other_ways_do_not_leave_half_of_each(
    run: Run, at: int, ends: bool
) -> None:
    backend = Contested(at, ends=ends, rounds=True)
    carry_out(run, backend)
    # The first worker marks as running what is done, or leaves its rows under the other's entry, or
    # the other's rows under its own entry. The driver sees each of them.
    assert (backend.passes > 1) == (at in (4, 6) or ends)


@pytest.mark.parametrize("kind", ["s-test", "self-influence"])
def test_a_worker_that_is_late_writes_no_table(run: Run, kind: str) -> None:
    """Only the winner's record names a table, so only the winner may write it."""
    spec = cast("GradNormsSpec", run.spec)
    common = {"task": spec.task, "checkpoint": spec.checkpoints[0], "modules": ("head",)}
    wanted: Spec
    if kind == "s-test":
        items = (Query(test=0), Query(test=1))
        wanted = make_spec(
            STestSpec, queries=Queries(items=items), solver=IdentitySettings(), **common
        )
    else:
        wanted = make_spec(SelfInfluenceSpec, solver=EkFacSettings(damping=0.1), **common)
    contested = Run.create(run.root, wanted)
    first, second = (ShardRunner(run.root, contested.id) for _ in range(2))
    (shard, *_), arrays_of = first._job.plan().shards, first._job.plan().arrays
    contested.create_arrays(arrays_of)
    compute, tables = first._job.run, Path(contested.files.url, layout.TABLES)

    def late(*given: Any) -> Result:
        found = compute(*given)
        assert second.run(shard).status == "done"
        for path in tables.rglob("*.parquet"):
            path.with_suffix(".winner").write_bytes(path.read_bytes())
            path.write_bytes(b"the winner's")  # whoever writes now is seen
        return found

    first._job.run = late  # type: ignore[method-assign,assignment]
    assert first.run(shard).status == "done"
    found = [path.read_bytes() for path in tables.rglob("*.parquet")]
    assert found == [b"the winner's"]
    entry = contested.manifest.read(shard.id)
    (winner,) = tables.rglob("*.winner")
    assert entry is not None
    assert [*entry.files.values()] == [checksum(winner.read_bytes())]
