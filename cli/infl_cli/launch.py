"""Carry out a run, here or on Ray, and stay with it until it ends."""

import os
import secrets
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import typer

from infl_cli import render
from infl_cli.dry_run import disk_bytes, print_plan
from infl_cli.how import How
from infl_cli.options import cores
from infl_cli.ray_job import job_watcher, live_holder, watcher
from infl_cli.render import say, size
from infl_cli.watch import watch
from infl_cluster.client import remote_client
from infl_cluster.driver import drive, is_done, stop_on_sigterm
from infl_cluster.head import ensure_head
from infl_cluster.inline import InlineBackend
from influence_jobs.errors import RuntimeFault, StoreError
from influence_jobs.jobs.registry import open_job
from influence_jobs.report.made import certainty
from influence_jobs.report.tables import tables_of
from influence_jobs.specs import (
    AblationSpec,
    InfluenceSpec,
    LdsSpec,
    PaperSpec,
    StabilitySpec,
    STestSpec,
)
from influence_jobs.store import layout
from influence_jobs.store.folder import for_runs
from influence_jobs.store.run import Run
from influence_jobs.store.status import read_status

IDLE_TIMEOUT_S = 600.0  # a head nobody asked for ends itself after so long without a job


def carry_out(run: Run, how: How) -> None:
    """Bring a run to its end, show progress, and print where its results are.

    Args:
        run: Need not exist yet.

    Raises:
        InflError: It cannot be carried out, or it failed; what was finished is kept.
    """
    how = _keep_plan(run, how)
    if how.dry_run:
        print_plan(run, how)
        return
    if how.address:
        remote_client(how.address).version()  # before anything is written
        if "://" not in run.root:
            say(f"{run.root} must be on storage that all nodes of {how.address} share")
    _check_space(run)
    run = Run.create(run.root, run.spec)
    if is_done(run):
        say(f"{run.id} is already done")
    else:
        _forget_last_end(run, local=how.local)
        if how.local:
            _carry_out_here(run, how)
        elif not _carry_out_on_ray(run, how):
            return
    _print_result(run, how)


def _keep_plan(run: Run, how: How) -> How:
    """The plan of a run's first driver stays: what else is asked for has no effect, and that is said."""
    plan = run.read_json(layout.PLAN)
    if plan is None or not plan["shards"]:
        return how
    rows = plan["shards"][0]["stop"] - plan["shards"][0]["start"]
    wanted = how.shard_size and open_job(run).plan(how.shard_size).shards[0].stop
    if how.batch_size not in (None, plan["batch_size"]) or wanted not in (None, rows):
        say(f"{run.id} keeps its plan: shards of {rows:,} rows, batches of {plan['batch_size']:,}")
    return replace(how, batch_size=plan["batch_size"], shard_size=rows)


def _forget_last_end(run: Run, *, local: bool) -> None:
    """Take away what an earlier driver left: how it ended, and for a local start its Ray job."""
    if live_holder(run) is None:
        run.files.delete(layout.STATUS)
        if local:
            run.files.delete(layout.JOB)


def _check_space(run: Run) -> None:
    free = run.files.free_bytes()
    if free is None or run.read_json(layout.PLAN) is not None:
        return
    need = disk_bytes(open_job(run).plan())
    if need > free:
        raise StoreError(
            f"the disk of {run.root} is too full: the run takes up to {size(need)} and {size(free)} are free; "
            "make room, or choose another folder with --runs"
        )


def _carry_out_here(run: Run, how: How) -> None:
    more = for_runs(run.root)
    over = threading.Event()
    shown = threading.Thread(
        target=watch,
        args=(run,),
        kwargs={"ended": lambda: "over" if over.is_set() else None},
        daemon=True,
    )
    shown.start()
    stop_on_sigterm()
    backend = InlineBackend(device=how.resolved_device, threads=cores())
    try:
        drive(run.root, run.id, backend, shard_rows=how.shard_size, batch_size=how.batch_size)
    except RuntimeFault as fault:
        hint = f"infl logs {run.id}{more}; infl resume {run.id}{more} --local"
        raise RuntimeFault(f"{fault} ({hint})") from fault
    except KeyboardInterrupt:
        say(f"stopped; what is finished is kept: infl resume {run.id}{more} --local")
        raise typer.Exit(130) from None
    finally:
        over.set()
        shown.join()


def _carry_out_on_ray(run: Run, how: How) -> bool:
    """False if the run goes on without us."""
    if live_holder(run) is not None:
        say(f"{run.id} is already running")
        ended = watcher(run)
    else:
        ended = _submit(run, how)
    more = for_runs(run.root)
    if how.detach:
        say(
            f"{run.id} goes on in the background: infl status {run.id}{more}, infl stop {run.id}{more}"
        )
        if how.json:
            render.print_json(render.run_summary(run, "running"))
        return False
    try:
        status = watch(run, ended=ended)
    except KeyboardInterrupt:
        say(
            f"{run.id} goes on in the background; watch it: infl status {run.id}{more} --follow; "
            f"stop it: infl stop {run.id}{more}"
        )
        raise typer.Exit(130) from None
    if status["state"] != "done":
        message = status.get("message") or f"the run was {status['state']}"
        raise RuntimeFault(f"{message} (infl logs {run.id}{more}; infl resume {run.id}{more})")
    return True


def _submit(run: Run, how: How) -> Callable[[], str | None]:
    """Start the Ray job of a run; tells later why it has ended, once it has."""
    if how.address:
        client, python = remote_client(how.address), "python"
    else:
        head = ensure_head(idle_timeout_s=IDLE_TIMEOUT_S)
        say(f"Ray dashboard: {head.dashboard_url} (token in {head.token_path})")
        client, python = head.client(), sys.executable
    argv = [python, "-m", "infl_cluster.driver_main", run.root, run.id]
    options = {
        "--workers": how.workers,
        "--device": how.resolved_device,
        "--num-gpus": how.num_gpus,
        "--batch-size": how.batch_size,
        "--shard-rows": how.shard_size,
    }
    for option, value in options.items():
        argv += [] if value is None else [option, str(value)]
    env = {}
    if ":" in run.spec.task.name:  # one's own task lies where one works
        env["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")])
        )
    submission_id = f"{run.id}-{secrets.token_hex(3)}"
    job = {"address": how.address, "submission_id": submission_id}
    run.write_json(layout.JOB, job)  # first: whoever submits may not live to tell
    client.submit(
        argv,
        submission_id=submission_id,
        metadata={
            "run": run.id,
            "kind": run.spec.kind,
            "task": run.spec.task.name,
            "layers": ",".join(getattr(run.spec, "layers", ())),
        },
        env=env,
    )
    return job_watcher(job)


def _print_result(run: Run, how: How) -> None:
    summary = render.run_summary(run, read_status(run)["state"])
    if how.json:
        render.print_json(summary)
        return
    render.out.print(f"{run.id}: done")
    render.out.print(f"  {run.files.url}")
    for array in summary["arrays"].values():
        shape = " x ".join(map(str, array["shape"]))
        render.out.print(f"  {array['path']}: {shape} {array['dtype']}")
    if "metrics" in summary["tables"]:
        last = run.read_table("metrics").to_pylist()[-1]
        figures = ", ".join(f"{k} {v:.4g}" for k, v in last.items() if k != "epoch")
        render.out.print(f"  after epoch {last['epoch']}: {figures}")
    if isinstance(run.spec, (InfluenceSpec, STestSpec)):
        for line in certainty(run):
            render.out.print(f"  {line}")
    for path in summary["tables"].values():
        render.out.print(f"  {path}")
    for table in tables_of(run):
        render.out.print(f"\n{table.title}")
        render.print_table(table.columns, table.rows)
        if table.note:
            render.out.print(table.note)
    if isinstance(run.spec, PaperSpec):
        return
    if isinstance(run.spec, (AblationSpec, LdsSpec, StabilitySpec)):
        render.out.print(f"\nnext: infl report {run.id}{for_runs(run.root)}")
    elif isinstance(run.spec, STestSpec):
        render.out.print(f"next: infl submit influence --s-test {run.id}{for_runs(run.root)}")
    elif summary["arrays"]:
        render.out.print(f"next: infl top {run.id}{for_runs(run.root)}")
    else:
        render.out.print(
            f"next: infl submit grad-norms --layer all --checkpoint {run.id}{for_runs(run.root)}",
            markup=False,
        )
