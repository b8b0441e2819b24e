"""How fast a run goes; its time left follows from that."""

import time
from collections.abc import Callable

WINDOW_S = 120.0  # of work
PAUSES = 5  # that are in it at least: workers may all tell progress at once, after many minutes
SOON_S = 5.0  # if there is no second progress so long after the first, steps are long


class Speed:
    """Samples per second of a run, in a moving window: the last two minutes of its work.

    The window is longer where progress comes seldom: five times its longest pause. So a change of
    speed is followed, also if workers are lost or join. Time in which no worker has a shard does
    not count: workers are starting, or the run waits for room. What comes before the first progress
    of all workers that have a shard counts only until there is more: a worker's first step may load
    its model and data.

    Args:
        clock: Seconds of a clock that does not jump.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._worked = 0.0  # seconds, without those since work began or went on
        self._since: float | None = None
        self._seen = 0
        self._computed = 0  # also what is computed again
        self._marks = [(0.0, 0)]  # seconds of work, and what was computed by then
        self._first_at: float | None = None  # seconds of work at the first progress
        self._all_began, self._settled = False, False

    def works(self, at_work: bool) -> None:
        """Note whether any worker has a shard."""
        if at_work and self._since is None:
            self._since = self._clock()
        elif not at_work and self._since is not None:
            self._worked, self._since = self._now(), None

    def sees(self, units: int, *, all_began: bool) -> None:
        """Note how many samples this driver's workers have done.

        Args:
            units: Fewer than before if shards are done again.
            all_began: Whether all workers with a shard have made progress, or a shard is done.
        """
        gained, self._seen = units - self._seen, units
        if gained <= 0:
            return
        self._computed += gained
        now = self._now()
        if self._first_at is None:
            self._first_at = now
        if self._all_began and not self._settled:
            self._settled = True
            self._marks = [self._marks[-1]]
        self._all_began = self._all_began or all_began
        self._marks.append((now, self._computed))
        self._forget()

    @property
    def rate(self) -> float | None:
        """Samples per second; None as long as it is not known."""
        now = self._now()
        if self._first_at is None or (not self._settled and now - self._first_at < SOON_S):
            return None
        began, before = self._marks[0]
        return (self._computed - before) / max(now - began, 1e-3)

    def _forget(self) -> None:
        """Forget what came before the window."""
        (last, _), longest = self._marks[-1], 0.0
        for i in range(len(self._marks) - 2, -1, -1):
            longest = max(longest, self._marks[i + 1][0] - self._marks[i][0])
            if last - self._marks[i][0] >= max(WINDOW_S, PAUSES * longest):
                del self._marks[:i]
                return

    def _now(self) -> float:
        return self._worked + (0.0 if self._since is None else self._clock() - self._since)
