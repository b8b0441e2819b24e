"""Which failed shards are tried again: a pure rule on receipts."""

from dataclasses import dataclass
from enum import Enum

from influence_jobs.jobs.base import Receipt


class Decision(Enum):
    """What to do after a failed shard."""

    RETRY = "retry"
    GIVE_UP = "give up"
    ABORT = "abort"


@dataclass(frozen=True)
class RetryPolicy:
    """Try a shard at most `max_attempts` times, and only where trying again can help."""

    max_attempts: int = 3

    def decide(self, receipt: Receipt) -> Decision:
        """Decide about a failed shard.

        Args:
            receipt: A failed receipt. `transient` (a hiccup of storage, a worker's death) is tried
                again; `user` (bad data in that shard) is not; `fatal` (disk full, run folder gone)
                would fail every other shard too.

        Raises:
            ValueError: The receipt is not of a failed shard.
        """
        match receipt.kind:
            case "transient" if receipt.attempt < self.max_attempts:
                return Decision.RETRY
            case "transient" | "user":
                return Decision.GIVE_UP
            case "fatal":
                return Decision.ABORT
            case _:
                raise ValueError(f"receipt of {receipt.shard} is not of a failure")
