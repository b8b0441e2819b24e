"""Carry out a run, in this process or on Ray, and show its progress until it ends."""

import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from infl_cluster.driver import drive
from infl_cluster.how import How
from infl_cluster.inline import InlineBackend
from infl_cluster.watch import watch
from influence_jobs.devices import threads
from influence_jobs.errors import RuntimeFault, SpecError, StoreError
from influence_jobs.home import is_known, make_known
from influence_jobs.kinds import kind_of, open_job
from influence_jobs.kinds.same_data import require_same_data
from influence_jobs.requests.base import Say
from influence_jobs.specs.base import AnySpec
from influence_jobs.store import layout
from influence_jobs.store.documents import Asked, JobFile, Status
from influence_jobs.store.folder import for_runs
from influence_jobs.store.lease import WATCH_S, holder_of, is_alive, live_holder
from influence_jobs.store.run import Run
from influence_jobs.store.software import other_versions, software
from influence_jobs.store.status import is_done, read_status, submitted_again
from influence_jobs.terms import size

IDLE_TIMEOUT_S = 600.0  # a head started by a run ends itself after so long without a job
LONGEST_NAME = 60  # characters of a job's name: a column of a table


def carry_out(run: Run, how: How, say: Say, *, quiet: bool = False) -> bool:
    """Carry out a run and show its progress; False if it goes on in the background.

    Args:
        run: The run; its folder need not exist yet.
        how: Where and in what pieces.
        say: Takes lines for the user.
        quiet: Show no progress.

    Raises:
        InflError: It cannot be carried out, or it failed; what was finished is kept.
    """
    how = keep_plan(run, how, say)
    if how.address:
        from infl_cluster.client import OPEN, remote_client

        client = remote_client(how.address)
        client.version()  # before anything is written
        if client.is_open():
            say(f"{how.address} {OPEN}")
        make_known("cluster", how.address)
        if "://" not in run.root and not is_known("shared", _shared(run, how)):
            say(
                f"{run.root} must be a folder that all nodes of {how.address} share, at the same "
                "path; else choose one of s3:// or gs:// with --runs"
            )
    _check_space(run)
    run = Run.create(run.root, run.spec)
    if is_done(run):
        require_same_data([run], run.spec.task)
        say(f"{run.id} is already done")
        return True
    if (before := read_status(run))["state"] == "interrupted" and before["message"]:
        say(f"{run.id} was interrupted: {before['message']}")
    _say_versions(run, say)
    for needed in _made_here(run.spec):
        drive(run.root, Run.create(run.root, needed).id, InlineBackend(threads=threads()))
    here = how.local or kind_of(run.spec).here
    _forget_last_end(run, local=here)
    _say_watch(run, say)
    if here:
        _carry_out_here(run, how, say, quiet=quiet)
        return True
    return _carry_out_on_ray(run, how, say, quiet=quiet)


def _made_here(spec: AnySpec) -> Iterator[AnySpec]:
    """The needed runs that are carried out where they are submitted."""
    for needed in kind_of(spec).job_type.inputs(spec):
        yield from _made_here(needed)
        if kind_of(needed).here:
            yield needed


def _say_versions(run: Run, say: Say) -> None:
    """Say that a run goes on with other versions than it began with; its page lists them."""
    ours = software()
    for name, theirs in other_versions(run.manifest.done().values()).items():
        now = ours.get(name, "none")
        say(f"{run.id} goes on with {name} {now}; some of its shards have {', '.join(theirs)}")


def keep_plan(run: Run, how: How, say: Say) -> How:
    """`how` with the batch and shard sizes of the run's plan, if it has one.

    A plan never changes; the user is told if other sizes were asked for, and of whole chunks.
    """
    plan, wanted = run.plan(), None
    if how.shard_size:
        shards = open_job(run).plan(how.shard_size).shards
        wanted = shards[0].stop if shards else None
    if plan is None or not plan["shards"]:
        if wanted and how.shard_size and wanted > how.shard_size:
            say(
                f"{run.id} has shards of {wanted:,} in place of --shard-size {how.shard_size:,}: "
                "a shard has whole chunks or blocks"
            )
        return how
    rows = plan["shards"][0]["stop"] - plan["shards"][0]["start"]
    if how.batch_size not in (None, plan["batch_size"]) or wanted not in (None, rows):
        say(
            f"{run.id} keeps the plan that it began with: shards of {rows:,} rows, batches of "
            f"{plan['batch_size']:,}"
        )
    return how.model_copy(update={"batch_size": plan["batch_size"], "shard_size": rows})


def _forget_last_end(run: Run, *, local: bool) -> None:
    """Keep of an earlier driver's status what is done, and before a local start no Ray job."""
    if live_holder(run.files) is None:
        if last := run.read_json(layout.STATUS, Status):
            run.write_json(layout.STATUS, submitted_again(last))
        if local:
            run.files.delete(layout.JOB)


def _say_watch(run: Run, say: Say) -> None:
    """Say what the driver will wait for first, if the last one was on another host."""
    holder = holder_of(run.files)
    if holder is not None and not is_alive(holder) and holder["host"] != socket.gethostname():
        say(
            f"{run.id} was last computed by process {holder['pid']} on {holder['host']}: it goes "
            f"on here if that process writes nothing for {WATCH_S:.0f} s"
        )


def _check_space(run: Run) -> None:
    free = run.files.free_bytes()
    if free is None or run.plan() is not None:
        return
    need = open_job(run).plan().disk_bytes
    if need > free:
        raise StoreError(
            f"the disk of {run.root} is too full: the run takes up to {size(need)} and "
            f"{size(free)} are free; make room, or choose another folder with --runs"
        )


def _carry_out_here(run: Run, how: How, say: Say, *, quiet: bool) -> None:
    more = for_runs(run.root)
    over = threading.Event()
    shown = threading.Thread(
        target=watch,
        args=(run,),
        kwargs={
            "ended": lambda: "over" if over.is_set() else None,
            "say": say,
            "quiet": quiet,
            "pause": over.wait,
        },
        daemon=True,
    )
    shown.start()
    backend = InlineBackend(device=how.resolved_device, threads=threads())
    try:
        drive(run.root, run.id, backend, shard_rows=how.shard_size, batch_size=how.batch_size)
    except RuntimeFault as fault:
        hint = f"infl logs {run.id}{more}; infl resume {run.id}{more} --local"
        raise RuntimeFault(f"{fault} ({hint})") from fault
    except KeyboardInterrupt:
        say(f"stopped; what is finished is kept: infl resume {run.id}{more} --local")
        raise
    finally:
        over.set()
        shown.join()


def _carry_out_on_ray(run: Run, how: How, say: Say, *, quiet: bool) -> bool:
    """Carry out a run on Ray; False if it goes on in the background."""
    from infl_cluster.ray_job import watcher

    more = for_runs(run.root)
    if live_holder(run.files) is not None:
        say(f"{run.id} is already running")
        ended = watcher(run)
    else:
        try:
            ended = _submit(run, how, say)
        except KeyboardInterrupt:
            say(f"{run.id} may have begun: infl status {run.id}{more}, infl stop {run.id}{more}")
            raise
    if how.detach:
        say(
            f"{run.id} goes on in the background: infl status {run.id}{more}, "
            f"infl stop {run.id}{more}"
        )
        return False
    try:
        status = watch(run, ended=ended, say=say, quiet=quiet)
    except KeyboardInterrupt:
        say(
            f"{run.id} goes on in the background; watch it: infl status {run.id}{more} --follow; "
            f"stop it: infl stop {run.id}{more}"
        )
        raise
    if status["state"] != "done":
        message = status.get("message") or f"the run was {status['state']}"
        raise RuntimeFault(f"{message} (infl logs {run.id}{more}; {run.resume_command})")
    if how.address:  # what its nodes wrote has been read here
        make_known("shared", _shared(run, how))
    return True


def _shared(run: Run, how: How) -> str:
    return f"{run.root} and {how.address}"


def job_name(run: Run) -> str:
    """The name of a run's job in the Ray dashboard, such as `grad-norms ffdnet main.29`.

    Jobs may have the same name: Ray tells them apart by their submission ids.
    """
    title = open_job(run).title
    return title if len(title) <= LONGEST_NAME else f"{title[: LONGEST_NAME - 3]}..."


def _submit(run: Run, how: How, say: Say) -> Callable[[], str | None]:
    """Start the Ray job of a run; returns a function that tells why the job ended, once it has."""
    from infl_cluster import shipping, store_access, versions
    from infl_cluster.client import remote_client
    from infl_cluster.head import ACCESS, ensure_head
    from infl_cluster.ray_job import job_watcher

    if run.spec.task.name.startswith("__main__:"):
        raise SpecError(
            f"task {run.spec.task.name} is defined in this process, where Ray's workers cannot "
            "find it: put it into a file, or compute with --local"
        )
    # On this machine the code is the same, and a commit during a run is no other software.
    env = versions.env() if how.address else {}
    package: str | None = None
    submission_id = f"{run.id}-{secrets.token_hex(3)}"
    if how.address:
        client, python = remote_client(how.address), "python"
        if parcel := shipping.pack(run.spec.task):
            client.upload(parcel.name, parcel.data)
            say(f"the code of {run.spec.task.name} is sent to {how.address}: {parcel.words()}")
            package, env = parcel.name, env | parcel.env()
    else:
        head = ensure_head(idle_timeout_s=IDLE_TIMEOUT_S)
        say(f"Ray dashboard: {head.dashboard_url} (token in {head.token_path})")
        client, python = head.client(), sys.executable
        env |= store_access.keep(head.token_path.parent / ACCESS, submission_id)
        if ":" in run.spec.task.name:  # one's own task lies in its folder, or where one works
            places = [run.spec.task.folder, str(Path.cwd()), os.environ.get("PYTHONPATH")]
            env["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    argv = [python, "-m", "infl_cluster.driver_main", run.root, run.id]
    options = {
        "--workers": how.workers,
        # Here it is known already whether torch can use the GPU that Ray sees.
        "--device": "cpu" if not how.address and how.resolved_device == "cpu" else how.device,
        "--num-gpus": how.num_gpus,
        "--batch-size": how.batch_size,
        "--shard-rows": how.shard_size,
        "--stalled-after": how.stalled_after,
    }
    for option, value in options.items():
        argv += [] if value is None else [option, str(value)]
    argv += [f"--node-label={label}" for label in how.node_label]
    asked = cast(Asked, how.model_dump(include={*Asked.__annotations__}, exclude_defaults=True))
    job: JobFile = {"address": how.address, "submission_id": submission_id}
    if asked:
        job["asked"] = asked
    run.write_json(layout.JOB, job)  # before submitting: this process may be killed right after
    client.submit(
        argv,
        submission_id=submission_id,
        metadata={
            "job_name": job_name(run),  # the key that Ray's dashboard shows
            "run": run.id,
            "kind": run.spec.kind,
            "task": run.spec.task.name,
            "layers": ",".join(getattr(run.spec, "layers", ())),
        },
        env=env,
        package=package,
    )
    return job_watcher(job)
