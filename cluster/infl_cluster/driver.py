"""Carry out a run: its inputs first, then every shard that is not done yet, then its tables.

Only the driver writes a run's plan and status, and only the driver hands out shards. All its state
is in the run folder: if it is killed, the next driver goes on where it was.
"""

import logging
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from functools import partial
from types import FrameType
from typing import Any, Protocol

from infl_cluster.dispatch import Rescue
from infl_cluster.plans import settled_plan
from infl_cluster.run_log import run_log
from infl_cluster.status import StatusWriter
from influence_jobs.errors import RuntimeFault, StoreError
from influence_jobs.jobs.base import Job, Plan, Receipt, Shard
from influence_jobs.kinds import missing_inputs, open_job
from influence_jobs.kinds.same_data import require_same_data
from influence_jobs.store import layout
from influence_jobs.store.documents import Entry
from influence_jobs.store.lease import SHOWN_S, Lease, LeaseHeld
from influence_jobs.store.object_files import be_patient
from influence_jobs.store.run import Run, now
from influence_jobs.store.software import software
from influence_jobs.store.status import is_done
from influence_jobs.store.verify import damage, mark_entry_undone
from influence_jobs.tasks.fingerprints import require_unchanged
from influence_jobs.terms import size

log = logging.getLogger(__name__)


class Backend(Protocol):
    """Computes shards: in this process, or on Ray."""

    @property
    def most_workers(self) -> int:
        """Workers that there will be at most."""

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
        """Compute the shards, retrying as the retry policy says.

        Args:
            on_start: Called with a shard's id and the process that has begun it, as HOST:PID.
            on_leave: Called with the same when the process does not have the shard any more.
            on_receipt: Called with each receipt and whether the shard will be tried again.
            on_rescue: Called with what is done about slow or hung workers, a line, their number.
            on_idle: Called about once a second, also if no receipt arrives. Its argument is what
                the backend waits for, if the user should know. It may raise to give up.
            quiet_s: Seconds since a shard made progress.

        Raises:
            RuntimeFault: No worker can be started, or a shard failed with an error that all others
                would have too.
        """

    def show(self, run: Run, status: Mapping[str, Any]) -> None:
        """Show a status that was just written to who watches from outside; called by a thread."""


def drive(
    root: str,
    run_id: str,
    backend: Backend,
    *,
    shard_rows: int | None = None,
    batch_size: int | None = None,
) -> None:
    """Carry out a run and the runs that it needs. Returns at once if it is done.

    Args:
        root: Folder of all runs.
        shard_rows: Rows of a shard; used only if the run has no plan yet.
        batch_size: Samples a pass; used only if the run has no plan yet. By default the first
            worker chooses.

    Raises:
        InflError: The run failed; its status says the same, and finished shards are kept.
    """
    be_patient()
    run = Run.open(root, run_id)
    if is_done(run):
        return
    with ExitStack() as stack:
        lease = stack.enter_context(Lease(run.files))
        if is_done(run):  # another driver has just ended it
            return
        stack.enter_context(run_log(run))
        status = stack.enter_context(StatusWriter(run, partial(backend.show, run)))
        run.manifest.drop_summary()
        run.files.sweep()
        for name in run.files.names(layout.PROGRESS):
            run.files.delete(f"{layout.PROGRESS}/{name}")
        job = open_job(run, batch_size=batch_size)
        job.sweep()
        status.needs([needed.id for needed in missing_inputs(run)])
        reused = []
        for spec in job.inputs(run.spec):
            needed = Run.create(root, spec)
            if is_done(needed):
                reused.append(needed)
            status.waits_for(needed.id)
            log.info("needs %s", needed.id)
            drive_when_free(root, needed.id, backend)
            _require_current(needed)
        status.waits_for(None)
        require_unchanged(run.id, run.spec.task, job.task)
        require_same_data(reused, run.spec.task, job.task)
        workers = backend.most_workers
        plan = settled_plan(job, shard_rows, workers, automatic=batch_size is None)
        if plan.arrays:
            run.create_arrays(plan.arrays)
        _work(run, job, plan, backend, status, lease)
        _finish(run, job)
        log.info("done")


def _require_current(run: Run) -> None:
    """Refuse a finished run whose inputs have been computed again since.

    Raises:
        StoreError: The message names the run and its input.
    """
    plan = run.plan()
    stored = plan["inputs"] if plan else {}
    for name, digest in open_job(run).input_digests().items():
        if stored.get(name) != digest:
            raise StoreError(
                f"run {run.id} was computed from an earlier {name}, which has been computed again "
                f"since: delete the folder of {run.id} and submit again"
            )


def drive_when_free(
    root: str,
    run_id: str,
    backend: Backend,
    *,
    shard_rows: int | None = None,
    batch_size: int | None = None,
) -> None:
    """Like `drive`. If another driver works on the run, wait for its end; it may finish the run."""
    while True:
        try:
            drive(root, run_id, backend, shard_rows=shard_rows, batch_size=batch_size)
            return
        except LeaseHeld:
            time.sleep(1)


def _work(
    run: Run, job: Job[Any], plan: Plan, backend: Backend, status: StatusWriter, lease: Lease
) -> None:
    planned = {shard.id for shard in plan.shards}
    done = {name: entry for name, entry in run.manifest.done().items() if name in planned}
    if stale := [entry.shard for entry in done.values() if entry.spec != run.spec.hash]:
        raise StoreError(
            f"run {run.id}: shard {stale[0]} was computed for another spec; delete the run's "
            "folder and submit it again"
        )
    contested = set(run.files.names(layout.CONTESTED))  # by a driver that was ended
    for shard in _torn(run, [s for s in plan.shards if s.id in contested and s.id in done]):
        del done[shard.id]
    todo = [shard for shard in plan.shards if shard.id not in done]
    for name in contested & done.keys():
        run.files.delete(f"{layout.CONTESTED}/{name}")
    status.planned(plan, done)
    log.info(
        "%s: %d of %d shards to do, each with about %s of memory besides model, data and a batch",
        job.title,
        len(todo),
        len(plan.shards),
        size(job.held_bytes(plan)),
    )
    failed: dict[str, str] = {}
    starts: Counter[str] = Counter()

    def on_start(shard: str, worker: str) -> None:
        starts[shard] += 1
        if starts[shard] == 2:  # on disk: this driver may be ended before it compares
            run.files.create(f"{layout.CONTESTED}/{shard}", b"")
        status.started(shard, worker)

    def on_receipt(receipt: Receipt, retried: bool) -> None:
        status.count(receipt, retried=retried)
        if receipt.status == "done":
            failed.pop(receipt.shard, None)
            log.info(
                "shard %s done in %.2f s by %s, attempt %d",
                receipt.shard,
                receipt.seconds,
                receipt.worker,
                receipt.attempt,
            )
        else:
            run.files.delete(f"{layout.PROGRESS}/{receipt.shard}.json")
            failed[receipt.shard] = receipt.error or "unknown error"
            again = ", tried again" if retried else ""
            log.warning("shard %s failed%s: %s", receipt.shard, again, receipt.error)

    def on_rescue(rescue: Rescue, line: str, workers: int) -> None:
        status.rescued(rescue, line, workers)
        log.warning("%s", line)

    def on_idle(waiting: str | None) -> None:
        status.says(waiting)
        if lease.lost.is_set():
            raise RuntimeFault(f"another process has taken over run {run.id}")

    while todo and not failed:
        backend.run(
            run,
            todo,
            on_start=on_start,
            on_leave=status.left,
            on_receipt=on_receipt,
            on_rescue=on_rescue,
            on_idle=on_idle,
            quiet_s=status.quiet_s if job.tells_progress else lambda shard: 0.0,
        )
        several = [
            s for s in todo if (starts[s.id] > 1 or s.id in contested) and s.id not in failed
        ]
        for shard in several:  # a worker that was ended may have left it
            run.files.delete(f"{layout.PROGRESS}/{shard.id}.json")
        todo = _torn(run, several)
        for shard in several:
            run.files.delete(f"{layout.CONTESTED}/{shard.id}")
        if todo:
            status.again(todo)
        starts.clear()
    if failed:
        first = next(iter(failed.values()))
        count = f"{len(failed)} of {len(plan.shards)} shards failed, the first: "
        raise RuntimeFault(f"{count if len(plan.shards) > 1 else ''}{first}")
    _require_records(run, planned)


def _require_records(run: Run, shards: AbstractSet[str]) -> None:
    """Refuse to end a run before its folder has the record of every shard.

    Raises:
        StoreError: Workers have written some of them elsewhere.
    """
    last = time.monotonic() + SHOWN_S
    absent = shards - run.manifest.done().keys()
    # By name: the listing of a folder may be old.
    while absent := {shard for shard in absent if not _is_recorded(run, shard)}:
        if time.monotonic() > last:
            raise StoreError(
                f"{len(absent)} of {len(shards)} shards are not in {run.files.url}, although "
                "workers have done them: put the runs on storage that all nodes share, name that "
                "with --runs, and submit again"
            )
        time.sleep(1)


def _is_recorded(run: Run, shard: str) -> bool:
    entry = run.manifest.read(shard)
    return entry is not None and entry.state == "done"


def _torn(run: Run, shards: Sequence[Shard]) -> list[Shard]:
    """Those of finished shards whose data are not what their entry says; marked as not done.

    Two workers at a shard write the same bytes, unless their processors round in other ways: then
    the data may be of one and the entry of the other, or half of each.
    """
    torn = []
    for shard in shards:
        entry = run.manifest.read(shard.id)
        why = "its entry is of an unfinished attempt"
        if entry is not None and entry.state == "done":
            found = damage(run, entry)
            if found is None:
                continue
            why = found
        log.warning(
            "shard %s was computed by several workers at once and is computed again: %s",
            shard.id,
            why,
        )
        mark_entry_undone(run, shard.id)
        torn.append(shard)
    return torn


def _finish(run: Run, job: Job[Any]) -> None:
    result = job.finish()
    sums = {name: run.write_rows(name, 0, values) for name, values in result.arrays.items()}
    rows = max((run.array(name).shape[run.row_axis(name)] for name in sums), default=0)
    run.manifest.write(
        Entry(
            layout.FINISH,
            0,
            rows,
            attempt=1,
            spec=run.spec.hash,
            state="done",
            arrays=sums,
            files=dict(result.files),
            software=software(),
            finished_at=now(),
        )
    )
    run.manifest.write_summary()


def stop_on_sigterm(why_ended: Callable[[], str | None] = lambda: None) -> None:
    """Turn SIGTERM into SystemExit, so that a stopped driver can write its last status.

    Args:
        why_ended: Returns what else than the user's wish ends this process, or None. Then the run
            has failed of that, and was not stopped.
    """

    def leave(_signal: int, _frame: FrameType | None) -> None:
        why = why_ended()
        if why is not None:
            raise RuntimeFault(why)
        sys.exit(143)

    signal.signal(signal.SIGTERM, leave)
