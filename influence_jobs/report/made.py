"""What was asked of a run, how sure its result is, and how it was made."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

from influence_jobs.specs import (
    AblationSpec,
    AnySpec,
    FileCheckpoint,
    GradNormsSpec,
    Identity,
    InfluenceSpec,
    LdsSpec,
    Model,
    PaperSpec,
    Queries,
    Ranking,
    Spec,
    StabilitySpec,
    STestSpec,
    TrainedCheckpoint,
    TrainSpec,
)
from influence_jobs.store.run import Run
from influence_jobs.store.status import read_status

MANY = 12  # items of a list that are written out


def asked(spec: Spec) -> list[tuple[str, str]]:
    """A request in words: names and values of its fields, the task's first."""
    task = spec.task
    options = ", ".join(f"{name} {value}" for name, value in task.options.items() if value)
    lines = [("task", f"{task.name}{f' ({options})' if options else ''}"), ("data", task.data)]
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        if name not in ("kind", "task") and value is not None and value != ():
            lines.append((name.replace("_", " "), _words(value)))
    return lines


def _words(value: Any) -> str:
    if isinstance(value, Spec):
        return value.run_id
    if isinstance(value, TrainedCheckpoint):
        return f"{value.train.run_id}, epoch {value.epoch}"
    if isinstance(value, FileCheckpoint):
        return f"{PurePath(value.path).name} (SHA-256 {value.sha256[:12]})"
    if isinstance(value, Ranking):
        return f"{value.name} ({_words(value.scores)}{'' if value.largest else ', smallest first'})"
    if isinstance(value, Queries):
        items = [
            f"{q.test}" + (f" at {q.region[0]},{q.region[1]}" if q.region else "")
            for q in value.items
        ]
        draws = f", mean over {value.noise_draws} noise draws" if value.noise_draws > 1 else ""
        return f"{value.quantity} of test samples {_list(items)}{draws}"
    if isinstance(value, Model):
        fields = {name: getattr(value, name) for name in type(value).model_fields}
        name = fields.pop("name", None)
        said = [f"{k.replace('_', ' ')} {_words(v)}" for k, v in fields.items() if v is not None]
        return f"{name}: {', '.join(said)}" if name and said else name or ", ".join(said)
    if isinstance(value, tuple):
        return _list([_words(item) for item in value])
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _list(items: Sequence[str]) -> str:
    more = f" and {len(items) - MANY} more" if len(items) > MANY else ""
    between = "; " if any("," in item for item in items) else ", "
    return between.join(items[:MANY]) + more


def certainty(run: Run) -> list[str]:
    """How sure a finished run's result is, a sentence each."""
    spec = run.spec
    if isinstance(spec, TrainSpec):
        return [
            f"One training, from seed {spec.seed}; infl submit stability tells what another seed changes."
        ]
    if isinstance(spec, GradNormsSpec):
        return [
            f"Computed in {spec.precision} and compared with plain autograd on the first samples before the first batch."
        ]
    if isinstance(spec, InfluenceSpec):
        said = [line for s_test in spec.s_tests for line in certainty(Run(run.root, s_test))]
        return list(dict.fromkeys(said))
    if isinstance(spec, STestSpec):
        return list(solved(run))
    if isinstance(spec, AblationSpec):
        return [f"Mean over {len(spec.queries.items)} queries and {len(spec.seeds)} seed(s)."]
    if isinstance(spec, LdsSpec):
        return [f"{spec.subsets} subsets, {len(spec.seeds)} training(s) each."]
    if isinstance(spec, StabilitySpec):
        return ["95 % intervals of the means by BCa bootstrap over queries."]
    return []


def solved(run: Run) -> Iterator[str]:
    """How the s_test vectors of a run were found: effective damping, residual, and what happened on the way."""
    assert isinstance(run.spec, STestSpec)
    if isinstance(run.spec.solver, Identity):
        yield "no curvature: s_test is the query's gradient"
        return
    rows = run.read_table("solutions").to_pylist()
    damping, record = rows[0]["damping"], json.loads(rows[0]["record"])
    residual = max(row["residual"] for row in rows)
    steps = max(row["iterations"] for row in rows)
    line = f"effective damping lambda = {damping:.4g}; residual up to {residual:.2g}, {steps} steps"
    if "recursion_damping" in record:
        line += (
            f"; the recursion's own damping {record['recursion_damping']:.4g} x scale {record['scale']:.4g}"
            f", batches of {record['batch_size']}"
        )
    yield line
    yield from dict.fromkeys(
        message for row in rows for message in json.loads(row["record"]).get("messages", ())
    )


@dataclass(frozen=True)
class Made:
    """How one run was made.

    Attributes:
        seeds: Seeds by what they are of.
        shards: How many were computed; `retries` of them again.
        seconds: Spent in shards, summed over workers.
        started, ended: UTC; None where no driver has said.
        workers: Processes that computed.
        software: Versions and revisions, each with the shards it computed if several took part.
        spec: The request as JSON, without paths: whoever reads the page need not know them.
    """

    run: str
    state: str
    seeds: dict[str, str]
    shards: int
    retries: int
    seconds: float
    started: str | None
    ended: str | None
    workers: int
    software: list[str]
    spec: str


def made(run: Run) -> Made:
    """How a run was made, from its manifest."""
    status, entries = read_status(run), run.manifest.entries()
    shards = [entry for entry in entries if entry.shard != "finish"]
    used = Counter(
        ", ".join(f"{name} {value}" for name, value in entry.software.items()) for entry in entries
    )
    software = [
        (words or "not recorded (made before runs named their software)")
        + (f": {count} of {len(entries)} shards" if len(used) > 1 else "")
        for words, count in used.most_common()
    ]
    ends = [entry.finished_at for entry in entries if entry.finished_at]
    return Made(
        run=run.id,
        state=status["state"],
        seeds=dict(_seeds(run.spec)),
        shards=len(shards),
        retries=sum(entry.attempt - 1 for entry in entries),
        seconds=sum(entry.seconds for entry in entries),
        started=_time(status.get("started_at")),
        ended=_time(max(ends, default=None)),
        workers=len({entry.worker for entry in shards if entry.worker}),
        software=software,
        spec=json.dumps(run.spec.identity(), indent=2),
    )


def _seeds(spec: Spec) -> Iterator[tuple[str, str]]:
    for name in ("seed", "seeds"):
        if (value := getattr(spec, name, None)) is not None:
            yield name, _words(value)
    if isinstance(spec, STestSpec):
        yield "curvature", str(spec.curvature.seed)


def _time(seconds: float | None) -> str | None:
    return (
        None
        if seconds is None
        else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    )


def needed(spec: AnySpec) -> list[AnySpec]:
    """A run's own spec and those of all runs it stands on, each once, the nearest first."""
    found: dict[str, Any] = {}

    def add(value: Any) -> None:
        if isinstance(value, Spec):
            if value.run_id in found:
                return
            if not isinstance(value, PaperSpec):
                found[value.run_id] = value
        if isinstance(value, Model):
            for name in type(value).model_fields:
                add(getattr(value, name))
        elif isinstance(value, tuple):
            for item in value:
                add(item)

    add(spec)
    return list(found.values())
