"""`infl runs`, `status`, `logs`, `stop`, `resume`, `verify`: look after runs."""

import inspect
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from infl_cli import options as o
from infl_cli import render
from infl_cli.render import say
from infl_cluster.how import How
from infl_cluster.watch import watch
from influence_jobs.errors import RuntimeFault, StoreError
from influence_jobs.store import layout
from influence_jobs.store.documents import JobFile
from influence_jobs.store.find import find_run, run_ids
from influence_jobs.store.folder import for_runs, runs_folder
from influence_jobs.store.lease import live_holder
from influence_jobs.store.run import Run
from influence_jobs.store.status import named, progress_in_words, read_status
from influence_jobs.store.verify import find_damage, mark_undone
from influence_jobs.terms import shown

STOP_DEADLINE_S = 30.0
DRIVER = "infl_cluster.driver_main"  # on the command line of the drivers of Ray jobs
MOST_LOG_BYTES = 2**28  # of a file of the log
STOP_GRACE_S = 10.0  # a driver that hangs is killed after so long


def _find(runs: str, run: str) -> Run:
    return find_run(runs_folder(runs), run)


def _command(verb: str, run: Run) -> str:
    """A command that the user may want next, with `--runs` if it needs it."""
    return f"infl {verb} {run.id}{for_runs(run.root)}"


def list_runs(runs: o.Runs = o.DEFAULT_RUNS, json: o.Json = False) -> None:
    """List all runs."""
    root = runs_folder(runs)
    table: list[dict[str, Any]] = []
    for run_id in run_ids(root):
        try:
            found = read_status(Run.open(root, run_id))
        except StoreError:  # one damaged run must not hide the others
            found = {"state": "damaged", "units_done": 0, "units_total": None}
        table.append(
            {
                "run": run_id,
                "status": found["state"],
                "samples_done": found["units_done"],
                "samples_total": found["units_total"],
                "started_at": found.get("started_at"),
            }
        )
    if json:
        render.print_json({"runs": table})
    elif table:
        rows = [(row["run"], row["status"], _percent(row), _when(row)) for row in table]
        render.print_table(("run", "status", "done", "started"), rows)
    else:
        say(f"no runs in {runs} yet: infl submit grad-norms --layer 11 starts one")


def _percent(row: dict[str, Any]) -> str:
    total = row["samples_total"]
    return f"{100 * row['samples_done'] // total:3} %" if total else "-"


def _when(row: dict[str, Any]) -> str:
    started = row["started_at"]
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(started)) if started else "-"


def status(
    run: o.RunId,
    runs: o.Runs = o.DEFAULT_RUNS,
    follow: Annotated[
        bool, typer.Option("--follow", "--watch", help="Show progress until the run ends.")
    ] = False,
    address: o.Address = None,
    json: o.Json = False,
) -> None:
    """Show the progress of a run."""
    found = _find(runs, run)
    now = read_status(found)
    if follow and now["state"] in ("new", "running"):
        from infl_cluster.ray_job import watcher

        now = watch(found, ended=watcher(found), say=say)
    if now["state"] == "new" and found.read_json(layout.JOB, JobFile) and (why := _job_end(found)):
        now |= {"state": "interrupted", "message": why}
    if json:
        render.print_json({**render.run_summary(found, now["state"]), "progress": now})
        return
    lines: list[tuple[str, Any]] = [
        ("run", found.id),
        ("path", found.files.url),
        ("status", now["state"]),
    ]
    lines += progress_in_words(now).items()
    if now.get("phase"):
        lines.append(("waits for", named(now["phase"], now)))
    if now.get("message"):
        lines.append(("message", now["message"]))
    for shard, error in now["failures"].items():
        lines.append((f"shard {shard}", error))
    if now["state"] == "new" and found.read_json(layout.JOB, JobFile):
        lines.append(("next", _command("status", found) + " --follow"))
    elif now["state"] not in ("running", "done"):
        lines.append(("next", found.resume_command))
    render.print_fields(lines)


def _job_end(run: Run) -> str | None:
    """Why the Ray job of a run ended before the run began; None if it did not, or is unknown."""
    from infl_cluster.ray_job import watcher

    return watcher(run)()


def logs(run: o.RunId, runs: o.Runs = o.DEFAULT_RUNS) -> None:
    """Print the logs of a run, oldest first."""
    found = _find(runs, run)
    names = found.files.names(layout.LOGS)
    for name in names:
        text = found.files.read(f"{layout.LOGS}/{name}", most=MOST_LOG_BYTES)
        typer.echo(shown(text.decode(errors="replace")), nl=False)
    if not names:
        say(f"{found.id} has no logs yet: it has not begun")


def stop(run: o.RunId, runs: o.Runs = o.DEFAULT_RUNS, address: o.Address = None) -> None:
    """Stop a run. Finished shards are kept, and `infl resume` goes on from there.

    A driver that does not end within 10 seconds is killed.
    """
    from infl_cluster.client import NoAnswer
    from infl_cluster.ray_job import client_of, is_unfinished

    def may_begin(job: JobFile) -> bool:
        try:
            return is_unfinished(job)
        except NoAnswer:
            if read_status(found)["state"] in ("done", "failed", "stopped"):  # as its driver said
                return False
            raise

    found = _find(runs, run)
    job = found.read_json(layout.JOB, JobFile)
    if job is not None and job["address"]:
        with suppress(NoAnswer):  # its driver may be left here
            is_unfinished(job)  # before anything is ended: the token may be refused
    asked: set[str] = set()  # drivers and jobs: a second driver may be waiting for the first
    began = time.monotonic()
    while time.monotonic() - began < STOP_DEADLINE_S:
        holder = live_holder(found.files)
        if holder is not None and holder["host"] == socket.gethostname():
            if holder["owner"] not in asked:
                asked.add(holder["owner"])
                _end_driver(found, holder["pid"], signal.SIGTERM)
            elif time.monotonic() - began > STOP_GRACE_S:
                _end_driver(found, holder["pid"], signal.SIGKILL)
        elif job is not None and may_begin(job):
            if job["submission_id"] not in asked:
                asked.add(job["submission_id"])
                client_of(job).stop(job["submission_id"])
        elif holder is None:
            end = f"stopped; go on with: {found.resume_command}" if asked else "not running"
            say(f"{found.id} is {end}")
            return
        elif not asked:
            raise RuntimeFault(f"{found.id} runs on {holder['host']}: stop it there")
        time.sleep(0.2)
    raise RuntimeFault(f"{found.id} did not stop within {STOP_DEADLINE_S:.0f} s; try again")


def _end_driver(run: Run, pid: int, how: signal.Signals) -> None:
    """End a process that a lease names, if it looks like a driver of this run or of one around it.

    Raises:
        RuntimeFault: It does not, or it is another user's.
    """
    try:
        words = psutil.Process(pid).cmdline()
        ours = {run.id, DRIVER} & {*words} or any(Path(word).name == "infl" for word in words)
        if not ours:
            raise RuntimeFault(
                f"the driver of {run.id} is process {pid} ({' '.join(words)[:60]}), which infl has "
                "not started: end it yourself"
            )
        os.kill(pid, how)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return  # it has just ended
    except (psutil.AccessDenied, PermissionError):
        raise RuntimeFault(
            f"the driver of {run.id} is process {pid}, which is another user's: let them stop it"
        ) from None


def resume(**values: Any) -> None:
    """Go on with a run that was stopped, was killed or failed. Finished shards are kept."""
    from infl_cli.launch import bring_to_end

    run, json = _find(values.pop("runs"), values.pop("run")), values.pop("json")
    values.pop("trust")  # its option has done all
    how = How.checked({name: value for name, value in values.items() if value is not None})
    bring_to_end(run, how, json=json)


_PLANNED = ("batch_size", "shard_size")  # fixed by the run's plan
o.take(
    resume,
    [
        inspect.Parameter("run", o.KEYWORD_ONLY, annotation=o.RunId),
        inspect.Parameter("runs", o.KEYWORD_ONLY, annotation=o.Runs, default=o.DEFAULT_RUNS),
        *o.parameters({n: f for n, f in How.model_fields.items() if n not in _PLANNED}),
        inspect.Parameter("trust", o.KEYWORD_ONLY, annotation=o.Trust, default=False),
        inspect.Parameter("json", o.KEYWORD_ONLY, annotation=o.Json, default=False),
    ],
)


def verify(
    run: o.RunId,
    runs: o.Runs = o.DEFAULT_RUNS,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Mark damaged shards as not done; infl resume computes them again."
        ),
    ] = False,
    json: o.Json = False,
) -> None:
    """Compare the files of every finished shard with their checksums in the manifest."""
    found = _find(runs, run)
    check = find_damage(found)
    lies = bool(check.missing) and read_status(found)["state"] == "done"
    if repair and (check.damaged or lies):
        mark_undone(found, check.damaged)
    if json:
        render.print_json(
            {
                "run": found.id,
                "shards": check.planned,
                "good": check.good,
                "not_done": len({*check.missing} - {layout.FINISH}),
                "damaged": check.damaged,
            }
        )
    else:
        for shard, why in check.damaged.items():
            say(f"shard {shard}: {why}")
        render.out.print(f"{found.id}: {check.good} of {check.planned} shards are done and good")
    again = len(check.damaged) + len(check.missing) * lies
    repaired = f"{_command('verify', found)} --repair, then {found.resume_command}"
    if repair and again:
        say(f"{_shards_are(again)} to be computed again: {found.resume_command}")
    elif check.damaged:
        raise StoreError(f"{_shards_are(len(check.damaged))} damaged: {repaired}")
    elif lies:
        raise StoreError(
            f"{found.id} is said to be done, but {len(check.missing)} of its shards have no "
            f"record: {repaired}"
        )


def _shards_are(count: int) -> str:
    return "1 shard is" if count == 1 else f"{count} shards are"
