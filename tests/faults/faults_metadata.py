"""Damage to each small file of a run, at a moment when the run is half done or done."""

import json
import re
from collections.abc import Iterator
from functools import partial

from faults_base import Fault, Told, World, shard_id

CURES = 4  # commands in a row that a user may need

MENDED = "no traceback; what is damaged is named with the cure, and following it ends the run"

# Name, its file, whether it is there in the middle of a run or at its end, and what is lost.
FILES = (
    ("spec.json", "spec.json", "middle"),
    ("plan.json", "plan.json", "middle"),
    ("status.json", "status.json", "middle"),
    ("lease.json", "lease.json", "middle"),
    ("job.json", "job.json", "middle"),
    ("record of a finished shard", f"manifest/{shard_id(1)}.json", "middle"),
    ("record of a shard under way", f"manifest/{shard_id(3)}.json", "middle"),
    ("record of the tables", "manifest/finish.json", "end"),
    ("metadata of the arrays", "data.zarr/zarr.json", "middle"),
    ("metadata of a group", "data.zarr/norms/zarr.json", "middle"),
    ("metadata of an array", "data.zarr/norms/head/zarr.json", "middle"),
    ("metadata of an array, at the end", "data.zarr/norms/head/zarr.json", "end"),
    ("status.json, at the end", "status.json", "end"),
)  # fmt: skip

DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "garbage": lambda _data: bytes(range(128, 256)),
    "of another type": lambda _data: b"[]",
    "null": lambda _data: b"null",
    "with wrong fields": lambda _data: json.dumps({"zarr_format": "x", "state": 3}).encode(),
    "deleted": None,
}


def damaged(world: World, file: str, damage: str, when: str) -> str:
    if when == "end":
        world.complete()
    else:
        world.begin().kill()
        assert world.begun is not None
        world.begun.told()
        world.let_go()
    path = world.path / file
    run_id = world.id
    change = DAMAGES[damage]
    if change is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(change(path.read_bytes() if path.exists() else b"{}"))
    if file.startswith("manifest/") and "finish" not in file:
        world.touched = {shard_id(1)}
    if file == "plan.json":
        world.touched = {*world.before}  # a plan that is gone is made anew; records may go with it
    for command in (("runs",), ("status", run_id), ("verify", run_id), ("logs", run_id)):
        world.infl(*command)  # no traceback
    follow_the_cures(world, run_id)
    world.starts = 3
    return world.check()


def follow_the_cures(world: World, run_id: str) -> None:
    """Do what commands say until the run is done and good."""
    for _ in range(CURES):
        told = world.infl("resume", run_id, *world.how)
        cure(world, told)
        check = world.infl("verify", run_id)
        if "--repair" in check.err:
            world.lines.append("verify --repair")
            cure(world, world.infl("verify", run_id, "--repair"))
        elif told.code == 0 and check.code == 0:
            return
    raise AssertionError((told, check))


def cure(world: World, told: Told) -> None:
    """Follow the cure that a failed command tells of a damaged file."""
    if told.code != 2:
        return
    if found := re.search(r"([\w/.-]+\.json) is damaged .*: delete it", told.err):
        name = found[1].removeprefix(f"{world.path}/")
        world.lines.append(f"delete {name}")
        (world.path / name).unlink()
    elif "spec.json" in told.err:
        world.lines.append("submit again")
        assert "Traceback" not in world.submit().told().err


def faults() -> Iterator[Fault]:
    for name, file, when in FILES:
        for damage, change in DAMAGES.items():
            inject = partial(damaged, file=file, damage=damage, when=when)
            fast = (name, damage) in {("plan.json", "garbage"), ("metadata of an array", "null")}
            yield Fault(name, damage, "written over" if change else "unlink", MENDED,
                        inject, fast=fast)  # fmt: skip
