"""Which failed shards are tried again: a pure function of their receipts."""

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
    """Try a shard at most `max_attempts` times, and only if that can help."""

    max_attempts: int = 3

    def decide(self, receipt: Receipt) -> Decision:
        """Decide about a failed shard.

        Args:
            receipt: Receipt of a failed shard. A `transient` failure (storage out of reach, a dead
                worker) is tried again, and one of the `worker` (a GPU that failed), which ends the
                run if it stays. A `user` failure (bad data in that shard) is not tried again. A
                `fatal` one (disk full, run folder gone) ends the run: all other shards would fail.

        Raises:
            ValueError: The shard did not fail.
        """
        match receipt.kind:
            case "transient" | "worker" if receipt.attempt < self.max_attempts:
                return Decision.RETRY
            case "transient" | "user":
                return Decision.GIVE_UP
            case "fatal" | "worker":  # a GPU that fails at one shard three times fails at all
                return Decision.ABORT
            case _:
                raise ValueError(f"receipt of {receipt.shard} is not of a failure")
