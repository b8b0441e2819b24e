"""Random schedules of faults; `--seed N` repeats one."""

import time

import pytest
from fault_schedules import Course, schedule
from faults_base import World
from faults_page import note_schedule

FIXTURES = {"local": "world", "s3": "s3_world", "ray": "ray_world"}


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_schedule(seed: int, request: pytest.FixtureRequest) -> None:
    plan = schedule(seed)
    world: World = request.getfixturevalue(FIXTURES[plan.where])
    began, outcome = time.monotonic(), "the promise was broken"
    try:
        outcome = Course(world, plan).run()
    finally:
        note_schedule(plan, outcome, time.monotonic() - began)


def test_a_seed_makes_the_same_schedule() -> None:
    assert [schedule(seed) for seed in range(50)] == [schedule(seed) for seed in range(50)]
    assert len({str(schedule(seed)).partition(":")[2] for seed in range(50)}) > 40
