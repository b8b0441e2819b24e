"""Check that the data of a run match its manifest."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from influence_jobs.errors import StoreError, first_line
from influence_jobs.store import layout
from influence_jobs.store.documents import Entry, PlanFile, Status
from influence_jobs.store.lease import Lease
from influence_jobs.store.manifest import checksum
from influence_jobs.store.run import Run
from influence_jobs.terms import in_a_line


@dataclass(frozen=True)
class Verification:
    """The result of a check.

    Attributes:
        planned: Number of shards in the plan.
        good: Number of finished shards whose data match the manifest.
        damaged: What is wrong, by shard.
        missing: Shards without a record that they are done, and `finish`.
    """

    planned: int
    good: int
    damaged: dict[str, str]
    missing: tuple[str, ...] = ()


def find_damage(run: Run) -> Verification:
    """Read every finished shard and compare it with its checksums.

    Raises:
        StoreError: The run has no plan yet.
    """
    plan = run.plan()
    if plan is None:
        raise StoreError(f"run {run.id} has not begun: {run.resume_command}")
    damaged, good, missing = _damaged_shapes(run, plan), 0, []
    if damaged:  # no chunk can be read as it should be; once this is mended, they can
        return Verification(len(plan["shards"]), good, damaged)
    done = run.manifest.done()
    if why := _damaged_plan(plan, done):
        damaged[layout.PLAN] = why
    for shard in (*(shard["id"] for shard in plan["shards"]), layout.FINISH):
        entry = done.get(shard)
        if entry is None:
            missing.append(shard)
            continue
        why = damage(run, entry)
        if why is not None:
            damaged[shard] = why
        elif shard != layout.FINISH:
            good += 1
    return Verification(len(plan["shards"]), good, damaged, tuple(missing))


def _damaged_plan(plan: PlanFile, done: Mapping[str, Entry]) -> str | None:
    """How the plan differs from the records of what was done by it."""
    planned = {shard["id"]: (shard["start"], shard["stop"]) for shard in plan["shards"]}
    if len(planned) < len(plan["shards"]):
        return "it has a shard twice"
    for shard, entry in done.items():
        if shard != layout.FINISH and planned.get(shard) != (entry.start, entry.stop):
            return f"it lacks shard {shard} of rows {entry.start}..{entry.stop}, which is done"
    return None


def _damaged_shapes(run: Run, plan: PlanFile) -> dict[str, str]:
    """Arrays whose metadata are not as planned, under the name of all arrays."""
    try:
        found = {name: list(run.array(name).shape) for name in run.array_names()}
    except StoreError as error:
        return {layout.ARRAYS: str(error)}
    for name, shape in plan.get("shapes", {}).items():
        if name in found and found[name] != shape:
            return {layout.ARRAYS: f"{name} has shape {found[name]}, planned were {shape}"}
        if name not in found:
            return {layout.ARRAYS: f"{name} is missing"}
    return {}


def damage(run: Run, entry: Entry) -> str | None:
    """How the data of a finished shard differ from its entry; None if they do not."""
    if entry.spec != run.spec.hash:
        return "computed for another spec"
    if entry.shard != layout.FINISH and not entry.arrays and not entry.files:
        return "its record names no data"
    for name, expected in entry.arrays.items():
        try:
            found = checksum(run.read_rows(name, entry.start, entry.stop))
        except Exception as error:  # noqa: BLE001  codecs raise any error on damaged bytes
            return f"{name} cannot be read ({in_a_line(first_line(error))})"
        if found != expected:
            return f"{name} is not what was written"
    for name, expected in entry.files.items():
        try:
            if run.files.checksum(name) != expected:
                return f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except StoreError as error:
            return str(error)
    return None


def mark_undone(run: Run, shards: dict[str, str]) -> None:
    """Mark shards as not done, so that the next driver computes them again.

    Args:
        run: The run.
        shards: Their ids, as keys.

    Raises:
        LeaseHeld: A driver is running.
    """
    with Lease(run.files):
        # First: if this is killed halfway, no status of `done` may be left.
        _say_stopped(run, shards)
        run.manifest.drop_summary()
        if layout.PLAN in shards:
            run.files.delete(layout.PLAN)
        for shard in shards:
            mark_entry_undone(run, shard)


def _say_stopped(run: Run, undone: Collection[str]) -> None:
    """Let the status say that the run is to be resumed."""
    try:
        found = run.read_json(layout.STATUS, Status)
    except StoreError:  # it is damaged too
        found = None
    if found is None:
        run.files.delete(layout.STATUS)
        return
    shards = len(run.manifest.done().keys() - {*undone, layout.FINISH})
    units = (found["units_total"] or 0) * shards // (found["shards_total"] or 1)
    found |= {"state": "stopped", "phase": None, "shards_done": shards, "units_done": units}
    message = "infl verify --repair has found shards that are to be computed again"
    run.write_json(layout.STATUS, {**found, "message": message})


def mark_entry_undone(run: Run, shard: str) -> None:
    """Mark a shard as not done, for the driver that holds the lease."""
    entry = run.manifest.read(shard)
    if entry is not None:
        undone = replace(entry, state="running", arrays={}, files={})
        # Durable, or a power cut brings the record of the damaged data back.
        run.manifest.write(undone, durable=True)
