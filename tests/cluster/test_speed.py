"""The speed of a run and its time left, on a clock of the test's own."""

from collections.abc import Callable

import pytest

from infl_cluster.speed import SOON_S, WINDOW_S, Speed


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


class Watched:
    """A run that is looked at once a second."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.speed = Speed(self.clock)
        self.units = 0.0

    def passes(
        self, seconds: int, per_second: float = 0.0, *, all_began: bool = True
    ) -> list[float | None]:
        rates: list[float | None] = []
        for _ in range(seconds):
            self.clock.time += 1
            self.units += per_second
            self.speed.sees(int(self.units), all_began=all_began)
            rates.append(self.speed.rate)
        return rates


@pytest.fixture
def run() -> Watched:
    return Watched()


def test_without_progress_there_is_no_speed(run: Watched) -> None:
    run.speed.works(True)
    assert {*run.passes(100)} == {None}


def test_the_start_of_workers_does_not_count(run: Watched) -> None:
    run.passes(40)  # until a worker is ready
    run.speed.works(True)
    assert {*run.passes(35, all_began=False)} == {None}  # its first step loads the model
    rates = run.passes(20, 50)
    assert rates[0] is None  # nothing is known of a step but the first
    assert {*rates[1:]} == {50.0}


def test_what_was_done_before_does_not_count(run: Watched) -> None:
    """A resumed run: what `sees` is told is of this driver."""
    run.speed.works(True)
    run.passes(3)
    assert run.passes(10, 7)[-1] == 7


def test_a_wait_for_room_does_not_count(run: Watched) -> None:
    run.speed.works(True)
    run.passes(30, 10)
    run.speed.works(False)
    assert {*run.passes(900)} == {10.0}  # what it was is what is expected
    run.speed.works(True)
    assert {*run.passes(30, 10)} == {10.0}


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_a_change_of_speed_is_followed(run: Watched, factor: float) -> None:
    run.speed.works(True)
    run.passes(3600, 100)
    rates = [*run.passes(int(WINDOW_S), 100 * factor)]
    assert rates == sorted(rates, reverse=factor < 1)
    assert rates[-1] == pytest.approx(100 * factor)


def test_a_run_that_has_come_to_a_stop_gets_slower(run: Watched) -> None:
    run.speed.works(True)
    run.passes(300, 10)
    assert run.passes(int(9 * WINDOW_S))[-1] == pytest.approx(1.0)


def test_shards_done_again_are_work_and_no_loss(run: Watched) -> None:
    run.speed.works(True)
    run.passes(100, 10)
    run.units -= 500
    assert run.passes(1)[-1] == pytest.approx(10, rel=0.02)
    assert run.passes(50, 10)[-1] == pytest.approx(10, rel=0.02)


def steps_of(workers: int, seconds: int, run: Watched, samples: int) -> Callable[[], float | None]:
    """Workers whose steps take long, and end within some seconds of each other."""

    def a_round() -> float | None:
        run.passes(seconds - workers)
        for number in range(workers):
            run.passes(1, samples, all_began=number == workers - 1)
        return run.speed.rate

    return a_round


@pytest.mark.parametrize("seconds", [30, 600])
def test_long_steps_of_workers_that_began_together_are_not_taken_for_a_fast_run(
    run: Watched, seconds: int
) -> None:
    run.speed.works(True)
    a_round = steps_of(4, seconds, run, samples=90)
    rates = [a_round() for _ in range(12)]
    assert rates[1:] == pytest.approx([4 * 90 / seconds] * 11, rel=0.2)
    run.passes(seconds // 2)
    assert run.speed.rate == pytest.approx(4 * 90 / seconds, rel=0.4)


def test_the_only_progress_so_far_is_taken_after_a_while(run: Watched) -> None:
    """Shards of minutes that tell none until they are done."""
    run.speed.works(True)
    run.passes(600, all_began=False)
    run.units = 900
    rates = run.passes(int(SOON_S) + 1)
    assert rates[:-1] == [None] * int(SOON_S)
    assert rates[-1] == pytest.approx(900 / 606)
