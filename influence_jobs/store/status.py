"""The progress of a run, from the status that its driver writes into the run's folder."""

import socket
from typing import Any

from influence_jobs.store import layout
from influence_jobs.store.documents import Status
from influence_jobs.store.folder import for_runs
from influence_jobs.store.lease import holder_of, is_alive
from influence_jobs.store.process import oom_kills
from influence_jobs.store.run import Run, now
from influence_jobs.terms import duration, speed

MOST_NODES = 8  # that are named
STALE_S = 20.0  # a driver that has not written for this long is taken for dead


def read_status(run: Run) -> dict[str, Any]:
    """A run's status.

    Its `state` is `new` before a driver begins, and `interrupted` if the driver has died without a
    last word. If a silent driver holds the lease, the message says so.
    """
    found = run.read_json(layout.STATUS, Status)
    if found is None:
        return {"state": "new", "units_done": 0, "units_total": None, "failures": {}}
    status: dict[str, Any] = {**found}
    if status["state"] != "running":
        return status
    quiet = now() - status["updated_at"]
    # Clocks of two machines may differ, so the status alone cannot tell.
    holder = holder_of(run.files)
    here = holder is not None and holder["host"] == socket.gethostname()
    if holder is None or not is_alive(holder):
        # Without a lease, the driver may just have ended, after the status was read.
        if here or quiet > STALE_S:
            killed = found.get("oom_kills")
            status |= {"state": "interrupted", "message": None}
            if here and killed is not None and (oom_kills() or 0) > killed:
                status["message"] = (
                    "the process that computed it is gone, and this machine has killed a process "
                    "for lack of memory since"
                )
    elif quiet > STALE_S and here:
        # A driver that waits for an object store looks the same.
        waits = "if the storage did not answer, it goes on within a minute; else "
        status["message"] = (
            f"process {holder['pid']}, which computes it, does not respond for {quiet:.0f} s: "
            f"{waits if '://' in run.root else ''}infl stop {run.id}{for_runs(run.root)}"
        )
    return status


def under_way(run: Run, status: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """The run that is being computed, and its status: this run, or one that it depends on."""
    seen = {run.id}
    while (phase := status.get("phase")) and phase not in seen:
        seen.add(phase)
        run = Run.open(run.root, phase)
        status = read_status(run)
    return run, status


def named(run_id: str, status: dict[str, Any]) -> str:
    """A run with its place among those of a command, such as `s-test-mnist-1a2b (2 of 3)`.

    Args:
        run_id: The run, or one that it needs.
        status: Of the run that was asked for.
    """
    runs = [*status.get("needs", ())]
    if not runs:
        return run_id
    place = runs.index(run_id) + 1 if run_id in runs else len(runs) + 1
    return f"{run_id} ({place} of {len(runs) + 1})"


def done_before(last: Status) -> dict[str, Any]:
    """What a status says of the work that is done, without how its driver is or how it ended."""
    counts = ("shards_done", "shards_total", "units_done", "units_total")
    nodes = {host: {**share, "at_work": 0} for host, share in last.get("nodes", {}).items()}
    kept = {name: value for name, value in last.items() if name in counts}
    return {**kept, "units_before": last["units_done"], "nodes": nodes}


def submitted_again(last: Status) -> dict[str, Any]:
    """The status of a run until its next driver begins."""
    times = {name: last[name] for name in ("started_at", "updated_at")}
    rest: dict[str, Any] = {"phase": None, "message": None, "retries": 0, "failures": {}}
    return {"state": "new", **times, **done_before(last), **rest}


def rate_and_eta(status: dict[str, Any]) -> tuple[float, float] | None:
    """Samples per second, and the seconds left at that rate; None as long as it is not known.

    The driver measures it: see `infl_cluster.speed`. In a status of an earlier version it is the
    mean since that driver's work began.
    """
    if not status.get("units_total"):
        return None
    rate = status.get("rate") or _mean_rate(status)
    if rate is None:
        return None
    return rate, (status["units_total"] - status["units_done"]) / rate


def _mean_rate(status: dict[str, Any]) -> float | None:
    done = status["units_done"] - status.get("units_before", 0)
    if done <= 0 or "work_started_at" not in status:
        return None
    until = now() if status["state"] == "running" else status["updated_at"]
    return float(done / max(until - status["work_started_at"], 1e-3))


def repeats(status: dict[str, Any]) -> str:
    """Retries, backups, replaced workers and the like of a driver in words; empty without any."""
    won, backups = status.get("backups_won", 0), status.get("backups", 0)
    counts = {
        "retries: {}": status.get("retries", 0),
        f"backups of slow shards: {{}} ({won} first)": backups,
        "hanging workers replaced: {}": status.get("stalled", 0),
        "shards computed again after two workers differed: {}": status.get("computed_again", 0),
    }
    return ", ".join(words.format(count) for words, count in counts.items() if count)


def progress_in_words(status: dict[str, Any]) -> dict[str, str]:
    """The numbers that are shown of a run's progress, by their names.

    Empty before the run has a plan; without `speed` and `workers by node` if it does not run.
    """
    if not status["units_total"]:
        return {}
    shards = f"{status['shards_done']} of {status['shards_total']}"
    found = {
        "samples": f"{status['units_done']:,} of {status['units_total']:,}",
        "shards": ", ".join(filter(None, [shards, repeats(status)])),
    }
    if status["state"] == "running" and (found_at := rate_and_eta(status)):
        found["speed"] = f"{speed(found_at[0])}, ETA {duration(found_at[1])}"
    nodes = status.get("nodes", {})
    if done_on := _largest({host: share["shards"] for host, share in nodes.items()}):
        found["shards by node"] = done_on
    at_work = {host: share["at_work"] for host, share in nodes.items()}
    if status["state"] == "running" and (workers_on := _largest(at_work)):
        found["workers by node"] = workers_on
    return found


def _largest(counts: dict[str, int]) -> str:
    """The hosts with the largest counts in words, without those that have none."""
    counted = sorted(((count, host) for host, count in counts.items() if count), reverse=True)
    said = ", ".join(f"{host} {count:,}" for count, host in counted[:MOST_NODES])
    others = len(counted) - MOST_NODES
    return f"{said} and {others:,} more nodes" if others > 0 else said


def progress_line(status: dict[str, Any]) -> str:
    """The same in a line, for a run that has a plan."""
    said = progress_in_words(status)
    numbers = (f"{said['samples']} samples", f"shards {said['shards']}", said.get("speed"))
    return ", ".join(filter(None, numbers))


def is_done(run: Run) -> bool:
    """Whether every shard of a run is finished, and its tables too."""
    status, plan = run.read_json(layout.STATUS, Status), run.plan()
    if status is None or plan is None or status["state"] != "done":
        return False
    done = set(run.manifest.done_shards())
    return all(name in done for name in (*(s["id"] for s in plan["shards"]), layout.FINISH))
