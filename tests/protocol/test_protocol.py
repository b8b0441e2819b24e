"""Every order of events: one writer, no lost shard, and somebody always gets on.

What must hold is told in docs/protocol.md. The code that runs is the project's own.
"""

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from influence_jobs.jobs.base import Shard
from influence_jobs.kinds.baseline.spec import BaselineSpec
from influence_jobs.kinds.runner import ShardRunner
from influence_jobs.specs.base import TaskSpec
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.store import layout
from influence_jobs.store.documents import Entry
from influence_jobs.store.lease import Lease, is_alive
from influence_jobs.store.manifest import checksum

from .stand_ins import FakeRun
from .world import Broken, Scenario, explore

SPEC = BaselineSpec(
    task=TaskSpec(name="none", data="none"),
    method="random",
    queries=Queries(items=(Query(test=0),)),
)
ONE_HOST, TWO_HOSTS, THREE_HOSTS = ("a", "a"), ("a", "b"), ("a", "b", "c")

SMALL = {
    "one host, a crash": Scenario(ONE_HOST, crashes=1),
    "two hosts, a clock 26 s ahead": Scenario(TWO_HOSTS, skews=(0, 26)),
    "two hosts, a clock 20 min behind": Scenario(TWO_HOSTS, skews=(1200, 0)),
    "an object store loses an answer": Scenario(TWO_HOSTS, objects=True, lost=1),
    "a power cut": Scenario(("a",), shards=1, cuts=1),
    "a store that fails": Scenario(("a",), shards=1, objects=True, errors=1),
}
LARGE = {
    "two hosts, two crashes": Scenario(TWO_HOSTS, crashes=2),
    "three hosts after a dead driver": Scenario(THREE_HOSTS, stranger="dead", late=False),
    "two hosts after a dead driver, a crash": Scenario(TWO_HOSTS, stranger="dead", crashes=1),
    "a crash and a clock 26 s ahead": Scenario(TWO_HOSTS, skews=(0, 26), crashes=1),
    "a crash and a clock 26 s behind": Scenario(TWO_HOSTS, skews=(26, 0), crashes=1),
    "a lost answer and a crash": Scenario(TWO_HOSTS, objects=True, lost=1, crashes=1),
    "a store that fails and a crash": Scenario(TWO_HOSTS, objects=True, errors=1, crashes=1),
    "everyone is paused": Scenario(TWO_HOSTS, pauses=1),
    "two drivers of two shards": Scenario(TWO_HOSTS, shards=2),
    "two drivers of a shard, a crash": Scenario(TWO_HOSTS, shards=1, crashes=1),
    "two drivers on one host, a power cut": Scenario(ONE_HOST, shards=1, cuts=1),
    "a shard in an object store that loses answers": Scenario(
        TWO_HOSTS, shards=1, objects=True, lost=2
    ),
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("infl_cluster").setLevel(logging.CRITICAL)


@pytest.mark.parametrize("name", SMALL)
def test_every_order_of_a_small_history(name: str) -> None:
    states, _ = explore(SMALL[name], SPEC)
    assert states > 50


@pytest.mark.faults
@pytest.mark.parametrize("name", LARGE)
def test_every_order_of_events(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    states, histories = explore(LARGE[name], SPEC)
    with capsys.disabled():
        print(f"\n{name}: {states:,} states, {histories:,} histories")
    assert states > 1000


@pytest.mark.faults
def test_many_orders_of_a_history_that_has_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    scenario = Scenario(TWO_HOSTS, shards=1, pauses=1, crashes=1)
    states, histories = explore(scenario, SPEC, most=40_000, rng=random.Random(1))
    with capsys.disabled():
        print(f"\na pause and a crash: {states:,} states, {histories:,} histories at random")
    assert states >= 40_000


def takes_over_whoever_holds_it(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lease, "_is_dead", lambda *_: True)


def believes_clocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lease, "_is_dead", lambda _, holder, __: not is_alive(holder))


def claims_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Lease,
        "_take_over",
        lambda self, holder: (
            self._is_dead(holder, layout.LEASE) and self._files.write(layout.LEASE, self._text())
        ),
    )


def takes_its_own_lease_for_anothers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lease, "_created", lambda self, name: self._files.create(name, self._text()))


def records_first(patch: pytest.MonkeyPatch) -> None:
    def do(self: ShardRunner, shard: Shard, attempt: int, started: float) -> int:
        data: Any = FakeRun.right(shard.start)
        sums = {"numbers": checksum(data)}
        self._run.manifest.write(
            Entry(shard.id, shard.start, shard.stop, attempt, "x", "done", arrays=sums)
        )
        self._run.write_rows("numbers", shard.start, data)
        return 1

    patch.setattr(ShardRunner, "_do", do)


def syncs_nothing(patch: pytest.MonkeyPatch) -> None:
    def write_rows(self: FakeRun, name: str, start: int, values: bytes) -> str:
        self.files.write(f"data/{name}/{start}", values, durable=False)
        return checksum(values)

    patch.setattr(FakeRun, "write_rows", write_rows)


@pytest.mark.parametrize(
    ("plant", "scenario", "told"),
    [
        (takes_over_whoever_holds_it, Scenario(TWO_HOSTS), "hold the lease at the same time"),
        (believes_clocks, Scenario(TWO_HOSTS, skews=(0, 26)), "hold the lease at the same time"),
        (claims_nothing, Scenario(TWO_HOSTS, stranger="dead"), "hold the lease at the same time"),
        (
            takes_its_own_lease_for_anothers,
            Scenario(TWO_HOSTS, objects=True, lost=1),
            "waits for ever",
        ),
        (records_first, Scenario(("a",), shards=1), "is done, and its data are not there"),
        (syncs_nothing, Scenario(("a",), shards=1), "after a power cut, shard shard0 is done"),
    ],
)
def test_the_search_finds_a_planted_bug(
    plant: Callable[[pytest.MonkeyPatch], None],
    scenario: Scenario,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    with pytest.raises(Broken, match=told) as found:
        explore(scenario, SPEC)
    assert len(found.value.trace) > 3


def test_the_same_scenario_is_explored_the_same_way() -> None:
    scenario = replace(SMALL["one host, a crash"], crashes=0)
    assert explore(scenario, SPEC) == explore(scenario, SPEC)
