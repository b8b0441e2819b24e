"""The faults of the suite, and docs/reliability.md: `python faults_page.py` writes it."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults_local
import faults_metadata
import faults_ray
import faults_s3
from fault_schedules import Schedule
from faults_base import Fault

PROJECT = Path(__file__).parents[2]
PAGE = PROJECT / "docs" / "reliability.md"
RECORD = PROJECT / "faults.jsonl"


_HEAD = """# Reliability

This page lists what was done to runs, and what came of it. `make test-faults` does all of it and
writes the page.

Each fault strikes a finished run, or one that is under way with workers at work. In the end the
run's bytes are compared with those of an undisturbed run, all checksums with the manifest, and the
attempts of each shard with what the fault explains.
"""

_COLUMNS = ("| fault | how | times | promise | outcome |", "|---|---|---|---|---|")


def all_faults() -> Iterator[Fault]:
    """Every fault."""
    for module in (faults_local, faults_metadata, faults_ray, faults_s3):
        yield from module.faults()


def note(fault: Fault, outcome: str) -> None:
    """Keep what came of a fault."""
    _keep({"fault": fault.id, "outcome": outcome})


def note_schedule(plan: Schedule, outcome: str, seconds: float) -> None:
    """Keep what came of a random schedule."""
    struck = [step.what for step in plan.steps]
    where = {"seed": plan.seed, "where": plan.where, "struck": struck}
    _keep({**where, "outcome": outcome, "seconds": round(seconds, 1)})


def _keep(entry: dict[str, Any]) -> None:
    with RECORD.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def page() -> str:
    """The page, from the record."""
    record = [json.loads(line) for line in RECORD.read_text().splitlines()]
    outcomes: dict[str, list[str]] = {}
    for entry in record:
        if "fault" in entry:
            outcomes.setdefault(entry["fault"], []).append(entry["outcome"])
    lines = [_HEAD]
    groups: dict[str, list[Fault]] = {}
    for fault in all_faults():
        groups.setdefault(fault.group, []).append(fault)
    for group, faults in groups.items():
        lines += [f"## {group[0].upper()}{group[1:]}", "", *_COLUMNS]
        for fault in faults:
            came = outcomes.get(fault.id, [])
            cells = (
                fault.name,
                fault.how,
                str(len(came)),
                fault.promise,
                came[-1] if came else "-",
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, *_schedules([entry for entry in record if "seed" in entry])])


def _schedules(record: list[dict[str, Any]]) -> list[str]:
    by_seed = {entry["seed"]: entry for entry in record}  # a seed that was repeated counts once
    found = list(by_seed.values())
    places = Counter(entry["where"] for entry in found)
    outcomes = Counter(entry["outcome"] for entry in found)
    struck = Counter((entry["where"], what) for entry in found for what in entry["struck"])
    names = {"local": "in one process", "s3": "in one process, in an object store", "ray": "on Ray"}
    lines = [
        "## Random schedules",
        "",
        f"{len(found)} schedules of one to three faults, each striking a run that is under way: "
        + ", ".join(f"{count} {names[where]}" for where, count in places.most_common())
        + ". They ended with "
        + " and ".join(f"{outcome}: {count}" for outcome, count in outcomes.most_common())
        + ".",
        "",
        "| where | fault | times |",
        "|---|---|---|",
    ]
    lines += [f"| {names[w]} | {what} | {count} |" for (w, what), count in sorted(struck.items())]
    return [*lines, ""]


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}", file=sys.stderr)
