"""Hand shards out to workers until each is done or given up.

Nothing here knows Ray. benchmarks/simulation.py runs this code with simulated workers.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Literal, Protocol

from infl_cluster.retry import Decision, RetryPolicy
from infl_cluster.stragglers import Attempt, Pace
from influence_jobs.errors import RuntimeFault
from influence_jobs.jobs.base import Receipt, Shard
from influence_jobs.terms import duration

log = logging.getLogger(__name__)

WAIT_S = 0.5
IDLE_S = 1.0
# Without progress for this long, a worker hangs. Some steps are long: the factors of a large layer.
STALLED_AFTER_S = 1800.0

Rescue = Literal["backup", "backup won", "stalled"]


class Workers(Protocol):
    """Workers that have one shard at a time."""

    idle: list[Hashable]

    def now(self) -> float:
        """Seconds of a clock that does not jump."""

    def grow(self, size: int) -> None:
        """Start workers until there are `size`, those that still start included."""

    def give(self, worker: Hashable, shard: Shard) -> str:
        """Give a shard to an idle worker, which then is not idle; returns its process."""

    def wait(self, timeout_s: float) -> tuple[Hashable, Receipt] | None:
        """Wait until something happens; returns the worker that has finished a shard, if any.

        A worker that has died is not idle afterwards, and its receipt is of a transient failure.
        """

    def end(self, worker: Hashable) -> None:
        """End a worker, whatever it does."""


class Dispatch:
    """One run's shards on their way through workers.

    Args:
        workers: The workers.
        shards: The shards to do.
        most: Largest number of workers.
        policy: Which failed shards are tried again.
        pace: Tells stragglers and slow workers.
        stalled_after_s: After so long without progress a worker is replaced. A shard that is tried
            again gets twice as long each time, as its steps may be that long.
        on_start: Called with a shard's id and the process that has begun it, as HOST:PID.
        on_leave: Called with the same when the process does not have the shard any more.
        on_receipt: Called with each receipt that counts, and whether its shard is tried again.
        on_rescue: Called with what is done about slow or hung workers, a line, their number.
        on_idle: Called about once a second. It may raise to give up.
        quiet_s: Seconds since a shard made progress, as far as is known.
    """

    def __init__(
        self,
        workers: Workers,
        shards: Sequence[Shard],
        *,
        most: int,
        policy: RetryPolicy,
        pace: Pace,
        stalled_after_s: float,
        on_start: Callable[[str, str], None],
        on_leave: Callable[[str, str], None],
        on_receipt: Callable[[Receipt, bool], None],
        on_rescue: Callable[[Rescue, str, int], None],
        on_idle: Callable[[], None],
        quiet_s: Callable[[str], float],
    ) -> None:
        self._workers, self._most, self._policy = workers, most, policy
        self._stalled_after_s = stalled_after_s
        self._on_start, self._on_leave, self._on_receipt = on_start, on_leave, on_receipt
        self._on_rescue, self._on_idle, self._quiet_s = on_rescue, on_idle, quiet_s
        self._todo = deque(shards)
        self._tries: Counter[str] = Counter()
        self._at: dict[Hashable, Attempt] = {}
        self._of: dict[str, list[Attempt]] = {}  # most have one, some a backup
        self._pace = pace

    def run(self) -> None:
        """Return when each shard is done or given up.

        Raises:
            RuntimeFault: A shard failed with an error that all others would have too.
        """
        idle_at = self._workers.now()
        while self._todo or self._at:
            self._workers.grow(min(self._most, len(self._todo) + len(self._at)))
            self._hand_out()
            if not self._todo:
                self._back_up()
            found = self._workers.wait(WAIT_S)
            if found is not None:
                self._finished(*found)
            if self._workers.now() - idle_at >= IDLE_S:
                idle_at = self._workers.now()
                self._replace_stalled()
                self._on_idle()

    def _hand_out(self) -> None:
        for worker in self._workers.idle[::-1]:
            if not self._todo:
                return
            now, running = self._workers.now(), self._at.values()
            if self._pace.may_take(worker, self._todo[0], len(self._todo), running, now):
                self._give(worker, self._todo.popleft())

    def _give(self, worker: Hashable, shard: Shard) -> Attempt:
        others = self._of.setdefault(shard.id, [])
        process = self._workers.give(worker, shard)
        attempt = Attempt(shard, worker, process, self._workers.now(), backup=bool(others))
        others.append(attempt)
        self._at[worker] = attempt
        self._on_start(shard.id, process)
        return attempt

    def _back_up(self) -> None:
        while self._workers.idle:
            alone = (attempts[0] for attempts in self._of.values() if len(attempts) == 1)
            found = self._pace.backup(alone, self._workers.idle, self._workers.now())
            if found is None:
                return
            slow, worker = found
            seconds = duration(self._workers.now() - slow.began)
            backup = self._give(worker, slow.shard)
            self._on_rescue(
                "backup",
                f"shard {slow.shard.id} has taken {seconds} in process {slow.process}: process "
                f"{backup.process} computes it too, and the first to finish wins",
                1,
            )

    def _finished(self, worker: Hashable, receipt: Receipt) -> None:
        attempt = self._leave(worker)
        others = self._of.get(receipt.shard, [])
        if receipt.status == "done":
            self._pace.finished(worker, attempt.shard, self._workers.now() - attempt.began)
            for other in [*others]:
                self._end(other)
            if attempt.backup:
                why = f"the second process was first to finish shard {receipt.shard}"
                self._on_rescue("backup won", why, 1)
            self._on_receipt(receipt, False)
            return
        if receipt.kind == "worker":
            self._workers.end(worker)
        if worker not in self._workers.idle:
            self._pace.forget(worker)
        if others and receipt.kind != "fatal":
            log.info("shard %s: one of two attempts failed: %s", receipt.shard, receipt.error)
            return
        self._failed(attempt.shard, receipt)

    def _failed(self, shard: Shard, receipt: Receipt) -> None:
        """Try a shard again, or give it up.

        Raises:
            RuntimeFault: The failure is fatal.
        """
        self._tries[shard.id] += 1
        tries = self._tries[shard.id]
        # The manifest also counts attempts of earlier drivers; the limit does not.
        decision = self._policy.decide(replace(receipt, attempt=tries))
        again = decision is Decision.RETRY
        self._on_receipt(replace(receipt, attempt=max(tries, receipt.attempt)), again)
        if decision is Decision.ABORT:
            raise RuntimeFault(receipt.error or "the run cannot go on")
        if again:
            self._todo.append(shard)

    def _replace_stalled(self) -> None:
        now = self._workers.now()
        for shard_id, attempts in [*self._of.items()]:
            last = attempts[-1]
            quiet = min(self._quiet_s(shard_id), now - last.began)
            if quiet < self._stalled_after_s * 2 ** self._tries[shard_id]:
                continue
            processes = " and ".join(attempt.process for attempt in attempts)
            ended = "which was ended" if len(attempts) == 1 else "which were ended"
            why = f"no progress for {duration(quiet)} in process {processes}, {ended}"
            self._on_rescue("stalled", f"shard {shard_id}: {why}", len(attempts))
            for attempt in [*attempts]:
                self._end(attempt)
            stalled = Receipt(shard_id, "failed", why, "transient", seconds=now - last.began)
            self._failed(last.shard, stalled)

    def _end(self, attempt: Attempt) -> None:
        self._leave(attempt.worker)
        self._pace.forget(attempt.worker)
        self._workers.end(attempt.worker)

    def _leave(self, worker: Hashable) -> Attempt:
        attempt = self._at.pop(worker)
        of_shard = self._of[attempt.shard.id]
        of_shard.remove(attempt)
        if not of_shard:
            del self._of[attempt.shard.id]
        self._on_leave(attempt.shard.id, attempt.process)
        return attempt
