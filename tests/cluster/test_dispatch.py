"""Handing out shards, with workers and a clock of the test's own."""

import heapq
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

import pytest

from infl_cluster.dispatch import Dispatch
from infl_cluster.retry import RetryPolicy
from infl_cluster.stragglers import Attempt, Pace
from influence_jobs.errors import RuntimeFault
from influence_jobs.jobs.base import Receipt, Shard

FOREVER = float("inf")


class Simulated:
    """Workers that take as long for a row as `pace` says, of which some hang or die.

    Args:
        pace: Seconds of a row, by the order in which workers were started; 1 for all others.
        fate: What the n-th attempt at a shard comes to: seconds for it, or a kind of failure.
    """

    def __init__(
        self,
        pace: Mapping[int, float] | None = None,
        fate: Mapping[tuple[str, int], Any] | None = None,
    ):
        self.pace, self.fate = pace or {}, fate or {}
        self.idle: list[Hashable] = []
        self.started, self.time = 0, 0.0
        self.events: list[tuple[float, int, Receipt, bool]] = []
        self.given: list[tuple[str, Hashable]] = []
        self.ended: list[Hashable] = []
        self.attempts: Counter[str] = Counter()

    def now(self) -> float:
        return self.time

    def grow(self, size: int) -> None:
        while len(self.idle) + len(self.events) < size:
            self.idle.append(self.started)
            self.started += 1

    def give(self, worker: Any, shard: Shard) -> str:
        self.idle.remove(worker)
        self.given.append((shard.id, worker))
        self.attempts[shard.id] += 1
        fate = self.fate.get((shard.id, self.attempts[shard.id]), None)
        seconds = self.pace.get(worker, 1.0) * (shard.stop - shard.start)
        receipt, dies = Receipt(shard.id, "done", units=shard.stop - shard.start), False
        if isinstance(fate, str):
            receipt = Receipt(shard.id, "failed", f"it is {fate}", fate)  # type: ignore[arg-type]
            dies = fate == "transient"
        elif fate is not None:
            seconds = fate
        heapq.heappush(self.events, (self.time + seconds, worker, receipt, dies))
        return f"host:{worker}"

    def wait(self, timeout_s: float) -> tuple[Hashable, Receipt] | None:
        if not self.events or self.events[0][0] > self.time + timeout_s:
            self.time += timeout_s
            return None
        self.time, worker, receipt, dies = heapq.heappop(self.events)
        if not dies:
            self.idle.append(worker)
        return worker, receipt

    def end(self, worker: Hashable) -> None:
        self.idle = [one for one in self.idle if one != worker]
        self.events = [event for event in self.events if event[1] != worker]
        heapq.heapify(self.events)
        self.ended.append(worker)


class Told:
    """What a driver is told."""

    def __init__(self) -> None:
        self.receipts: list[tuple[str, str, bool]] = []
        self.rescues: list[tuple[str, str, int]] = []
        self.at: set[tuple[str, str]] = set()  # shards and the processes that have them

    def of(self, shard: str) -> list[tuple[str, bool]]:
        return [(status, again) for name, status, again in self.receipts if name == shard]

    @property
    def counts(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for rescue, _, workers in self.rescues:
            counts[rescue] += workers
        return counts


def carry_out(workers: Simulated, shards: int, *, most: int, rows: int = 10, **others: Any) -> Told:
    told = Told()
    given = [Shard(f"s{i}", rows * i, rows * i + rows) for i in range(shards)]
    options: dict[str, Any] = {"stalled_after_s": FOREVER, "quiet_s": lambda _: 0.0, **others}
    Dispatch(
        workers,
        given,
        most=most,
        policy=RetryPolicy(),
        pace=Pace(),
        on_start=lambda *at: told.at.add(at),
        on_leave=lambda *at: told.at.remove(at),
        on_receipt=lambda r, again: told.receipts.append((r.shard, r.status, again)),
        on_rescue=lambda *rescue: told.rescues.append(rescue),
        on_idle=lambda: None,
        **options,
    ).run()
    assert not told.at
    return told


def done_once(told: Told, shards: int) -> bool:
    done = Counter(name for name, status, _ in told.receipts if status == "done")
    return done == Counter(f"s{i}" for i in range(shards))


def test_workers_of_one_pace_get_no_backups() -> None:
    workers = Simulated()
    told = carry_out(workers, 10, most=4)
    assert done_once(told, 10)
    assert (told.rescues, workers.ended, max(workers.attempts.values())) == ([], [], 1)
    assert workers.time == 30.0  # 10 shards of 10 s on 4 workers


def test_an_idle_worker_doubles_a_shard_that_hangs_and_the_first_to_finish_wins() -> None:
    workers = Simulated(fate={("s5", 1): FOREVER})
    told = carry_out(workers, 8, most=2)
    assert done_once(told, 8)
    assert told.counts == {"backup": 1, "backup won": 1}
    assert workers.attempts == {f"s{i}": 1 + (i == 5) for i in range(8)}
    slow = next(worker for shard, worker in workers.given if shard == "s5")
    assert workers.ended == [slow]
    line = told.rescues[0][1]
    assert line.startswith("shard s5 has taken ")
    assert f"in process host:{slow}: process host:{1 - slow} computes it too" in line


def test_the_first_attempt_may_win_and_its_backup_is_ended() -> None:
    workers = Simulated(fate={("s5", 1): 41.0, ("s5", 2): FOREVER})
    told = carry_out(workers, 8, most=2)
    assert done_once(told, 8)
    assert told.counts == {"backup": 1}
    backup = [worker for shard, worker in workers.given if shard == "s5"][1]
    assert workers.ended == [backup]


def test_nothing_is_doubled_while_shards_are_left() -> None:
    workers = Simulated(fate={("s0", 1): FOREVER})
    told = carry_out(workers, 12, most=2)
    last = max(i for i, (shard, _) in enumerate(workers.given) if shard != "s0")
    assert [i for i, (shard, _) in enumerate(workers.given) if shard == "s0"] == [0, last + 1]
    assert done_once(told, 12)


def test_a_short_last_shard_counts_as_what_it_is() -> None:
    pace = Pace()
    for i in range(3):
        pace.finished(i, Shard("", 0, 100), 100.0)
    assert pace.expected_s(Shard("", 0, 10)) == 10.0
    assert pace.expected_s(Shard("", 0, 10, 0, 5)) == 50.0
    short = Attempt(Shard("short", 0, 10), "w", "", began=0.0)
    assert pace.backup([short], [0], now=15.0) is None
    assert pace.backup([short], [0], now=15.1) == (short, 0)


@pytest.mark.parametrize("rows", [1, 10])
def test_a_slow_worker_gets_no_last_shard_and_no_backup(rows: int) -> None:
    workers = Simulated(pace={0: 5.0})
    told = carry_out(workers, 17, most=4, rows=rows)
    assert done_once(told, 17)
    # With 10 rows, worker 0 does its first shard until 50 s, and would do another until 100 s.
    assert [worker for _, worker in workers.given].count(0) == 1
    assert (workers.time, told.rescues) == (6.0 * rows, [])


def test_a_slow_worker_does_not_wait_for_one_that_hangs() -> None:
    workers = Simulated(pace={0: 5.0}, fate={("s4", 1): FOREVER})
    told = carry_out(workers, 6, most=2, stalled_after_s=1000.0, quiet_s=lambda _: FOREVER)
    assert done_once(told, 6)
    assert workers.given[4:] == [("s4", 1), ("s5", 0), ("s4", 0)]
    assert told.counts == {"backup": 1, "backup won": 1}
    assert workers.time < 200.0


def test_a_slow_worker_that_is_alone_does_everything() -> None:
    workers = Simulated(pace={0: 5.0}, fate={("s3", 1): "transient", ("s4", 1): "transient"})
    told = carry_out(workers, 6, most=1)
    assert done_once(told, 6)


def test_a_failed_attempt_does_not_count_while_another_is_under_way() -> None:
    workers = Simulated(fate={("s5", 1): 80.0, ("s5", 2): "transient"})
    told = carry_out(workers, 8, most=2)  # nobody has it at the end, as `on_leave` tells
    assert told.of("s5") == [("done", False)]
    assert done_once(told, 8)


@pytest.mark.parametrize("kind", ["transient", "user", "fatal"])
def test_failures_are_handled_by_their_kind(kind: str) -> None:
    workers = Simulated(fate={("s2", n): kind for n in (1, 2, 3)})
    if kind == "fatal":
        with pytest.raises(RuntimeFault, match="it is fatal"):
            carry_out(workers, 4, most=2)
        return
    told = carry_out(workers, 4, most=2)
    again = [True, True, False] if kind == "transient" else [False]
    assert told.of("s2") == [("failed", retried) for retried in again]


def test_a_worker_that_cannot_go_on_is_ended_and_its_shard_tried_again() -> None:
    workers = Simulated(fate={("s2", 1): "worker"})
    told = carry_out(workers, 4, most=2)
    assert told.of("s2") == [("failed", True), ("done", False)]
    failed = next(worker for shard, worker in workers.given if shard == "s2")
    assert workers.ended == [failed]
    assert done_once(told, 4)


def test_a_worker_without_progress_is_ended_and_its_shard_tried_again() -> None:
    workers = Simulated(fate={("s0", 1): FOREVER})
    told = carry_out(workers, 1, most=1, stalled_after_s=100.0, quiet_s=lambda _: 101.0)
    assert told.of("s0") == [("failed", True), ("done", False)]
    assert workers.ended == [0]
    assert told.rescues == [
        ("stalled", "shard s0: no progress for 1:40 in process host:0, which was ended", 1)
    ]
    assert 110 <= workers.time <= 112


def test_a_worker_that_makes_progress_is_left_alone() -> None:
    workers = Simulated(fate={("s0", 1): 5000.0})
    told = carry_out(workers, 1, most=1, stalled_after_s=100.0, quiet_s=lambda _: 99.0)
    assert (told.of("s0"), told.rescues) == ([("done", False)], [])


def test_each_attempt_gets_twice_as_long_and_a_shard_that_always_hangs_is_given_up() -> None:
    workers = Simulated(fate={("s0", n): FOREVER for n in (1, 2, 3)})
    told = carry_out(workers, 1, most=1, stalled_after_s=100.0, quiet_s=lambda _: FOREVER)
    assert told.of("s0") == [("failed", True), ("failed", True), ("failed", False)]
    assert 700 <= workers.time <= 703  # 100 + 200 + 400


def test_both_workers_of_a_shard_are_ended_if_neither_makes_progress() -> None:
    workers = Simulated(fate={("s5", 1): FOREVER, ("s5", 2): FOREVER})
    told = carry_out(workers, 8, most=2, stalled_after_s=100.0, quiet_s=lambda _: FOREVER)
    assert told.counts == {"backup": 1, "stalled": 2}
    assert told.rescues[-1][1].endswith("in process host:1 and host:0, which were ended")
    assert set(workers.ended) == {0, 1}
    assert told.of("s5") == [("failed", True), ("done", False)]
