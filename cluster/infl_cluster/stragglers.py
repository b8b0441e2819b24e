"""Which shards are stragglers, and which worker may take a shard: pure functions of times.

A shard that takes much longer than it should is given to an idle worker as well, and the first to
finish wins: the *backup tasks* of MapReduce (Dean and Ghemawat, OSDI 2004, section 3.6), elsewhere
*speculative execution*. As in LATE (Zaharia et al., OSDI 2008) it is the expected end that counts,
and slow workers get no backups.
"""

import bisect
import itertools
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass

from influence_jobs.jobs.base import Shard

WELL_OVER = 1.5  # times the expected time of a shard
LEAST_S = 5.0  # to be won by what is done here: a worker must take the shard and read its data
MIN_FINISHED = 3  # shards, before anything is expected of the others


@dataclass(eq=False)
class Attempt:
    """One worker at one shard.

    Attributes:
        process: Of the worker, as HOST:PID.
        began: Time in seconds, of any clock that does not jump.
        backup: Whether another worker was at the shard already.
    """

    shard: Shard
    worker: Hashable
    process: str
    began: float
    backup: bool = False


class Pace:
    """How long shards take: the median of those finished, and the last one of each worker.

    Times are seconds per row, so that a short last shard counts as what it is.
    """

    def __init__(self) -> None:
        self._finished: list[float] = []  # sorted
        self._of_worker: dict[Hashable, float] = {}

    def finished(self, worker: Hashable, shard: Shard, seconds: float) -> None:
        """Note how long a worker took for a shard."""
        pace = seconds / _size(shard)
        bisect.insort(self._finished, pace)
        self._of_worker[worker] = pace

    def forget(self, worker: Hashable) -> None:
        """Forget a worker that has ended."""
        self._of_worker.pop(worker, None)

    def expected_s(self, shard: Shard) -> float | None:
        """Seconds that a shard should take; None as long as too few are finished."""
        if len(self._finished) < MIN_FINISHED:
            return None
        return self._finished[len(self._finished) // 2] * _size(shard)

    def may_take(
        self, worker: Hashable, shard: Shard, left: int, running: Collection[Attempt], now: float
    ) -> bool:
        """Whether a worker should get a shard, of which `left` are not handed out yet.

        A slow worker should not if others would have finished it earlier, after all the rest. Who
        is late with its own shard may hang, and so is not waited for.

        Args:
            running: Attempts of the other workers, in the order in which they began.
            now: Of the clock of the attempts.
        """
        expected, own = self.expected_s(shard), self._own_s(worker, shard)
        if expected is None or own is None or own <= WELL_OVER * expected:
            return True
        late = itertools.takewhile(lambda attempt: self._is_late(attempt, now), running)
        others = len(running) - len([*late])
        return not others or own <= expected * (left / others + 1)

    def backup(
        self, running: Iterable[Attempt], idle: Sequence[Hashable], now: float
    ) -> tuple[Attempt, Hashable] | None:
        """The attempt that an idle worker should double, and that worker; None if there is none.

        Args:
            running: Attempts at shards that no other worker is at.
            idle: Workers without a shard, when none is left to hand out.
            now: Of the clock of the attempts.
        """
        if not idle:
            return None
        late = [
            (left, attempt)
            for attempt in running
            if (left := self._expected_left_s(attempt, now)) is not None
        ]
        for left, attempt in sorted(late, key=lambda found: -found[0]):
            expected = self.expected_s(attempt.shard) or 0.0
            times = [(self._own_s(worker, attempt.shard) or expected, worker) for worker in idle]
            fastest, worker = min(times, key=lambda found: found[0])
            if fastest < left:
                return attempt, worker
        return None

    def _expected_left_s(self, attempt: Attempt, now: float) -> float | None:
        """Seconds that an attempt still takes, if it is a straggler: late, or on a slow worker."""
        expected = self.expected_s(attempt.shard)
        if expected is None:
            return None
        own, passed = self._own_s(attempt.worker, attempt.shard) or expected, now - attempt.began
        if passed < own:
            left = own - passed
            return left if left > expected + LEAST_S else None
        # It may take any time now; what has taken long takes as long again.
        return passed if passed > _well_over(expected) else None

    def _is_late(self, attempt: Attempt, now: float) -> bool:
        expected = self.expected_s(attempt.shard)
        return expected is not None and now - attempt.began > _well_over(expected)

    def _own_s(self, worker: Hashable, shard: Shard) -> float | None:
        pace = self._of_worker.get(worker)
        return None if pace is None else pace * _size(shard)


def _well_over(expected: float) -> float:
    return max(WELL_OVER * expected, expected + LEAST_S)


def _size(shard: Shard) -> int:
    return max(1, (shard.stop - shard.start) * shard.parts)
