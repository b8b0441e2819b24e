"""Does a run hold what its manifest says?"""

from dataclasses import dataclass, replace

from influence_jobs.errors import StoreError
from influence_jobs.store import layout
from influence_jobs.store.folder import for_runs
from influence_jobs.store.lease import Lease
from influence_jobs.store.manifest import Entry
from influence_jobs.store.run import Run, checksum


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        planned: Shards of the plan.
        good: Shards whose data are what the manifest says.
        damaged: By shard, what is wrong with it.
    """

    planned: int
    good: int
    damaged: dict[str, str]


def find_damage(run: Run) -> Verification:
    """Read every finished shard back and compare it with its checksums.

    Raises:
        StoreError: The run has no plan yet.
    """
    plan = run.read_json(layout.PLAN)
    if plan is None:
        raise StoreError(f"run {run.id} has not begun: infl resume {run.id}{for_runs(run.root)}")
    damaged, good = {}, 0
    done = run.manifest.done()
    for shard in (*(shard["id"] for shard in plan["shards"]), layout.FINISH):
        entry = done.get(shard)
        if entry is None:
            continue
        why = _damage(run, entry)
        if why is not None:
            damaged[shard] = why
        elif shard != layout.FINISH:
            good += 1
    return Verification(len(plan["shards"]), good, damaged)


def _damage(run: Run, entry: Entry) -> str | None:
    if entry.spec != run.spec.hash:
        return "computed for another spec"
    for name, expected in entry.arrays.items():
        try:
            found = checksum(run.read_rows(name, entry.start, entry.stop))
        except Exception as error:  # noqa: BLE001  codecs raise all kinds of errors on damaged bytes
            return f"{name} cannot be read ({str(error).splitlines()[0]})"
        if found != expected:
            return f"{name} is not what was written"
    for name, expected in entry.files.items():
        try:
            if checksum(run.files.read(name)) != expected:
                return f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is gone"
    return None


def mark_undone(run: Run, shards: dict[str, str]) -> None:
    """Take the `done` off some shards, so that the next driver computes them again.

    Raises:
        LeaseHeld: A driver is at the run.
    """
    with Lease(run.files):
        run.files.delete(layout.STATUS)  # first: a status of `done` would outlive a kill in between
        for shard in shards:
            entry = run.manifest.read(shard)
            if entry is not None:
                run.manifest.write(replace(entry, state="running", arrays={}, files={}))
