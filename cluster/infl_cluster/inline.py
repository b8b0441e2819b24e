"""Compute in this process, without Ray: for `--local`, tests and debuggers."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from infl_cluster.dispatch import Rescue
from infl_cluster.retry import Decision, RetryPolicy
from influence_jobs.errors import RuntimeFault
from influence_jobs.jobs.base import Receipt, Shard
from influence_jobs.kinds.runner import ShardRunner, this_process
from influence_jobs.store.run import Run


class InlineBackend:
    """Computes shards one after the other, in order."""

    def __init__(self, *, device: str = "cpu", threads: int | None = None):
        self._device = device
        self._threads = threads

    most_workers = 1

    def run(
        self,
        run: Run,
        shards: Sequence[Shard],
        *,
        on_start: Callable[[str, str], None],
        on_leave: Callable[[str, str], None],
        on_receipt: Callable[[Receipt, bool], None],
        on_rescue: Callable[[Rescue, str, int], None],
        on_idle: Callable[[str | None], None],
        quiet_s: Callable[[str], float],
    ) -> None:
        runner = ShardRunner(
            run.root, run.id, device=self._device, threads=self._threads, compared=True
        )
        policy = RetryPolicy()
        for shard in shards:
            for attempt in itertools.count(1):
                on_idle(None)
                on_start(shard.id, this_process())
                receipt = runner.run(shard)
                on_leave(shard.id, this_process())
                decision = None
                if receipt.status == "failed":
                    # The manifest also counts attempts of earlier drivers; the limit does not.
                    decision = policy.decide(replace(receipt, attempt=attempt))
                on_receipt(receipt, decision is Decision.RETRY)
                # There is no other process to go on in.
                if decision is Decision.ABORT or receipt.kind == "worker":
                    raise RuntimeFault(receipt.error or "the run cannot go on")
                if decision is not Decision.RETRY:
                    break

    def show(self, run: Run, status: Mapping[str, Any]) -> None:
        """Do nothing: without Ray there is no one to collect metrics."""
