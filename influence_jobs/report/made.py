"""The request of a run in words, and how the run was made."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from influence_jobs.specs.base import Model, Spec, in_words
from influence_jobs.store.run import Run
from influence_jobs.store.status import read_status, repeats


@dataclass(frozen=True)
class Made:
    """How one run was made.

    Attributes:
        seeds: Seeds by name.
        shards: Number of shards that were computed.
        retries: Number of repeated attempts at shards.
        rescues: What was done about slow and hanging workers by the last driver; empty if nothing.
        seconds: Time in shards, summed over workers.
        started, ended: Times in UTC; None if they were not recorded.
        workers: Number of processes that computed shards.
        batches: Samples of a batch, and which were asked for, if others; empty if not recorded.
        software: Versions and revisions; if there are several, each with its number of shards.
        spec: The request as JSON, without paths, which are private.
    """

    run: str
    state: str
    seeds: dict[str, str]
    shards: int
    retries: int
    rescues: str
    seconds: float
    started: str | None
    ended: str | None
    workers: int
    batches: str
    software: list[str]
    spec: str


def made(run: Run) -> Made:
    """How a run was made, from its manifest."""
    status, all_entries = read_status(run), run.manifest.summary()
    software = []
    for used in all_entries["used"]:
        words = ", ".join(f"{name} {value}" for name, value in used["software"].items())
        part = f": {used['entries']} of {all_entries['entries']} shards"
        software.append(
            (words or "not recorded (the run is older than this record)")
            + (part if len(all_entries["used"]) > 1 else "")
        )
    return Made(
        run=run.id,
        state=status["state"],
        seeds=dict(_seeds(run.spec)),
        shards=all_entries["shards"],
        retries=all_entries["retries"],
        rescues=repeats({**status, "retries": 0}),
        seconds=all_entries["seconds"],
        started=_time(status.get("started_at")),
        ended=_time(all_entries["ended"]),
        workers=all_entries["workers"],
        batches=_batches(run, all_entries.get("batch_sizes", [])),
        software=software,
        spec=json.dumps(run.spec.identity(), indent=2),
    )


def _batches(run: Run, used: Sequence[int]) -> str:
    """The batch sizes of a run's shards in words."""
    plan = run.plan()
    if not used or plan is None:
        return ""
    words, asked = " and ".join(f"{size:,}" for size in used), plan["batch_size"]
    if plan.get("automatic_batch"):
        own = "" if [*used] == [asked] else f", where the task's own number is {asked:,}"
        return f"{words} samples{own}"
    if [*used] == [asked]:
        return f"{words} samples"
    return f"{words} samples, as {asked:,} did not fit into memory"


def _seeds(spec: Spec) -> Iterator[tuple[str, str]]:
    for name in ("seed", "seeds"):
        if (value := getattr(spec, name, None)) is not None:
            yield name, in_words(value)
    if (curvature := getattr(spec, "curvature", None)) is not None:
        yield "curvature", str(curvature.seed)


def _time(seconds: float | None) -> str | None:
    return (
        None
        if seconds is None
        else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    )


def needed(spec: Spec) -> list[Spec]:
    """The spec of a run and of all runs that it depends on, each once, the nearest first."""
    found: dict[str, Spec] = {}

    def add(value: Any) -> None:
        if isinstance(value, Spec):
            if value.run_id in found:
                return
            found[value.run_id] = value
        if isinstance(value, Model):
            for name in type(value).model_fields:
                add(getattr(value, name))
        elif isinstance(value, tuple):
            for item in value:
                add(item)

    add(spec)
    return list(found.values())
