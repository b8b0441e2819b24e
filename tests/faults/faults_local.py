"""Faults of a run that is computed in one process: of the process, its disk, data and clock."""

import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from faults_base import HELD, RIGHT, SHARDS, Fault, World, shard_id, wait_for

RESUMED = "`infl resume` ends it; nothing finished is computed again"
REPAIRED = "`infl verify` names it, `--repair` and `infl resume` mend it; the rest is not touched"
REFUSED = "refused by name until it is mended; then `infl resume` ends it"
THE_REST = "all other shards are done, and what is missing is said, with the cause"
LIVE_TWICE = "one driver computes, the others say who it is; nothing is computed twice"


# -- processes ------------------------------------------------------------------------------------


def ended(world: World, how: signal.Signals, state: str) -> str:
    world.begin().kill(how)
    assert world.begun is not None
    world.begun.told()
    world.let_go()
    assert world.status()["state"] == state
    world.resume()
    return world.check()


def killed_often(world: World) -> str:
    world.begin().kill()
    for _ in range(4):
        assert world.begun is not None
        world.begun.told()
        world.begun = world.start("resume", world.id, *world.how)
        world.wait_until_held()
        world.begun.kill()
    world.begun.told()
    world.let_go()
    world.starts = 6
    world.resume()
    return world.check()


def hung(world: World) -> str:
    """A dead network disk looks the same."""
    driver = world.begin()
    driver.kill(signal.SIGSTOP)
    told = wait_for(lambda: world.status(stale_s=2.0)["message"], "word of the hung process")
    world.says(told, f"process {driver.pid}, which computes it, does not respond", "infl stop")
    assert world.infl("resume", world.id, *world.how).code == 2
    world.says(world.infl("stop", world.id), "is stopped; go on with: infl resume")
    driver.told()
    world.let_go()
    world.resume()
    return world.check()


def out_of_memory(world: World) -> str:
    """A real one, in a control group with little memory."""
    world.poison(**{f"s{HELD * 256 + 5}": "eats"})
    driver = world.begin()
    with little_memory(driver.pid):
        world.let_go()
        assert driver.told().code == -signal.SIGKILL
        found = world.status()
        assert found["state"] == "interrupted"
        world.says(found["message"], "this machine has killed a process for lack of memory")
    world.cure()
    world.says(world.resume(), "was interrupted", "lack of memory")
    return world.check()


@contextlib.contextmanager
def little_memory(pid: int, headroom: int = 60_000_000) -> Iterator[None]:
    """Let a process have little more memory than it has.

    Raises:
        OSError: This machine does not let us make control groups.
    """
    old = Path("/sys/fs/cgroup/memory")
    root, limit = (old, "memory.limit_in_bytes") if old.exists() else (
        Path("/sys/fs/cgroup"), "memory.max")  # fmt: skip
    group = root / f"infl-faults-{pid}"
    group.mkdir()
    try:
        # Pages that it shares with the fork server are not counted.
        (group / limit).write_text(str(headroom))
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        wait_for(partial(_removed, group), "end of the control group", 20)


def _removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


def drivers_at_once(world: World, count: int) -> str:
    world.begin()
    for _ in range(count - 1):
        told = world.infl("resume", world.id, *world.how)
        assert told.code == 2
        world.says(told, "another process is writing", "wait for it, or stop it with `infl stop`")
    world.let_go()
    assert world.begun is not None
    assert world.begun.told().code == 0
    world.starts = 1
    return world.check()


def drivers_race(world: World) -> str:
    """Three start at the same moment after a killed one: who takes over?"""
    world.begin().kill()
    world.let_go()
    drivers = [world.start("resume", world.id, *world.how) for _ in range(3)]
    codes = sorted(driver.told().code for driver in drivers)
    assert codes[0] == 0, [driver.told() for driver in drivers]
    assert all("Traceback" not in driver.told().err for driver in drivers)
    return world.check()


# -- disks ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(world: World) -> Iterator[Path]:
    """A disk of its own for the runs: a tmpfs of a few megabytes.

    Raises:
        OSError: This user may mount none.
    """
    disk = world.folder / "runs"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        raise OSError("this user may not mount a disk")
    try:
        yield disk
    finally:
        world.close()
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def disk_full(world: World) -> str:
    with small_disk(world) as disk:
        driver = world.begin()
        ballast = disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        world.let_go()
        told = driver.told()
        assert told.code == 2
        world.says(told, "the disk is full: make room and resume")
        ballast.unlink()
        world.resume()
        return world.check()


def disk_read_only(world: World) -> str:
    with small_disk(world) as disk:
        driver = world.begin()
        remount = ["mount", "-o", "remount,{}", str(disk)]
        # A disk with a file open for writing is not made read-only: try until it is between two.
        wait_for(lambda: subprocess.run([w.format("ro") for w in remount],
                                        capture_output=True, check=False).returncode == 0,
                 "read-only disk")  # fmt: skip
        world.let_go()
        told = driver.told()
        assert told.code == 2
        world.says(told, "Read-only file system")
        subprocess.run([word.format("rw") for word in remount], check=True)
        world.resume()
        return world.check()


# -- arrays, weights, tables ----------------------------------------------------------------------


def chunk(world: World, shard: int) -> Path:
    return world.path / "data.zarr/norms/head/c" / str(shard) / "0"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def chunk_damaged(world: World, damage: Callable[[Path], object]) -> str:
    world.complete()
    damage(chunk(world, 2))
    return repaired(world, 2)


def chunks_swapped(world: World) -> str:
    """Each chunk is whole and its checksum right: only the manifest knows."""
    world.complete()
    one, other = chunk(world, 1), chunk(world, 4)
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)
    return repaired(world, 1, 4)


def repaired(world: World, *shards: int) -> str:
    world.touched = {shard_id(shard) for shard in shards}
    told = world.infl("verify", world.id)
    assert told.code == 2
    world.says(told, *sorted(world.touched), "--repair")
    assert world.infl("verify", world.id, "--repair").code == 0
    world.resume()
    return world.check()


def table_damaged(world: World, damage: Callable[[Path], object]) -> str:
    world.complete()
    damage(world.path / "tables/samples.parquet")
    told = world.infl("verify", world.id)
    assert told.code == 2
    world.says(told, "tables/samples.parquet")
    assert world.infl("verify", world.id, "--repair").code == 0
    world.resume()
    return world.check()


def stale_partial_files(world: World) -> str:
    """What a writer leaves that dies in the middle of a file."""
    world.begin().kill()
    (world.path / "manifest" / f"{shard_id(5)}.json.0123.partial").write_bytes(b'{"sta')
    part = world.path / "data.zarr/norms/head/c/6/0.0123.partial"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(b"half")
    world.let_go()
    world.resume()
    assert not [*world.path.rglob("*.partial")]
    return world.check()


# -- inputs ---------------------------------------------------------------------------------------


def input_damaged(world: World, name: str, damage: Callable[[Path], object], words: str) -> str:
    world.begin().kill()
    world.let_go()
    kept = world.folder / "kept"
    shutil.copy2(world.folder / name, kept)
    damage(world.folder / name)
    told = world.resume(code=2)
    world.says(told, words)
    assert len(world.done()) == HELD
    kept.replace(world.folder / name)
    world.starts = 3  # weights are read by the shard
    world.resume()
    return world.check()


def other_rows(path: Path) -> None:
    import numpy as np

    np.save(path, np.load(path) + 1)


def other_code(path: Path) -> None:
    path.write_text(path.read_text().replace("losses[at] *= float", "losses[at] += float"))


def other_weights(path: Path) -> None:
    state = torch.load(path)
    torch.save({name: weight + 1 for name, weight in state.items()}, path)


# -- samples that cannot be computed --------------------------------------------------------------


def poisoned(world: World, what: str, words: str) -> str:
    world.poison(**{f"s{5 * 256 + 7}": what})
    told = world.submit().told()
    assert told.code == 2, told
    assert "Traceback" not in told.err
    world.says(told, f"1 of {SHARDS} shards failed", words)
    world.before = world.done()
    outcome = world.check_incomplete()
    world.cure()
    world.resume()
    assert world.check().startswith(RIGHT)
    return outcome


def poisons_the_process(world: World) -> str:
    world.poison(**{f"s{5 * 256 + 7}": "kills"})
    assert world.submit().told().code == -signal.SIGKILL
    world.before = world.done()
    assert len(world.before) == 5
    assert world.status()["state"] == "interrupted"
    assert world.start("resume", world.id, *world.how).told().code == -signal.SIGKILL
    world.cure()
    world.starts = 3
    world.resume()
    return world.check()


# -- clocks ---------------------------------------------------------------------------------------


def clock_is_wrong(world: World, seconds: float, after_s: float = 0.0) -> str:
    driver = world.begin(clock_s=seconds, clock_after_s=after_s)
    time.sleep(2.0)  # until the clock has jumped
    assert world.status()["state"] == "running"
    assert world.infl("resume", world.id, *world.how).code == 2  # it is not taken over
    world.let_go()
    assert driver.told().code == 0
    world.starts = 1
    return world.check()


def readers_clock_is_wrong(world: World, seconds: float) -> str:
    driver = world.begin()
    found = world.status(clock_s=seconds)
    assert found["state"] == "running"
    told = world.infl("resume", world.id, *world.how, clock_s=seconds)
    assert told.code == 2
    world.says(told, "another process is writing")
    world.let_go()
    assert driver.told().code == 0
    world.starts = 1
    return world.check()


# -- a training, whose state is saved -------------------------------------------------------------


def saved_state(world: World, damage: Callable[[Path], object]) -> str:
    """The training goes on from its saved state, or begins anew: its bits are the same."""
    words = ("submit", "train", "--task", "disturbed.py:SlowTask", "--epochs", "20", "--local")
    sizes = ("--batch-size", "256", "--lr", "0.01")
    other = world.folder / "other"
    assert world.start_in(str(other), *words, *sizes).told().code == 0
    (run_id,) = (path.name for path in other.iterdir())
    weights = f"{run_id}/checkpoints/epoch-0020.pt"
    state = world.folder / "runs" / run_id / "checkpoints/state.pt"
    (world.folder / "nap").write_text("0.1")
    driver = world.start(*words, *sizes)
    wait_for(lambda: state.exists() or not driver.runs, "saved state of a training")
    driver.kill()
    assert driver.told().code == -signal.SIGKILL
    (world.folder / "nap").unlink()
    damage(state)
    told = world.infl("resume", run_id, "--local")
    assert told.code == 0, told
    assert (world.folder / "runs" / weights).read_bytes() == (other / weights).read_bytes()
    assert world.infl("verify", run_id).code == 0
    return "the same weights, bit by bit"


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "flipped": ("one bit in the middle", flip),
    "truncated": ("its second half is gone", truncate),
    "deleted": ("unlink", Path.unlink),
    "emptied": ("no bytes", lambda path: path.write_bytes(b"")),
}


def faults() -> Iterator[Fault]:
    for name, how, state in (
        ("killed", signal.SIGKILL, "interrupted"),
        ("terminated", signal.SIGTERM, "stopped"),
        ("interrupted", signal.SIGINT, "stopped"),
    ):
        inject = partial(ended, how=how, state=state)
        yield Fault("driver", name, how.name, RESUMED, inject, fast=True)
    yield Fault("driver", "killed five times", "SIGKILL, at each resume", RESUMED, killed_often)
    yield Fault("driver", "hung", "SIGSTOP",
                "`infl status` says that it does not respond, `infl stop` ends it; " + RESUMED,
                hung)  # fmt: skip
    yield Fault("driver", "out of memory", "a memory control group", "said as such; " + RESUMED,
                out_of_memory)  # fmt: skip
    for count, word in ((2, "two"), (3, "three")):
        yield Fault("driver", f"{word} at once", "`infl resume` of a live run", LIVE_TWICE,
                    partial(drivers_at_once, count=count))  # fmt: skip
    yield Fault("driver", "three after a killed one", "`infl resume`, at the same moment",
                "one takes over", drivers_race)  # fmt: skip

    yield Fault("disk", "full", "a tmpfs of 4 MB, filled", f"said at once; {RESUMED}", disk_full)
    yield Fault("disk", "read-only", "a tmpfs, remounted", f"said at once; {RESUMED}",
                disk_read_only)  # fmt: skip

    for name, (how_text, damage) in DAMAGES.items():
        yield Fault("chunk", name, how_text, REPAIRED, partial(chunk_damaged, damage=damage),
                    fast=name == "flipped")  # fmt: skip
        yield Fault("table", name, how_text, REPAIRED, partial(table_damaged, damage=damage))
    yield Fault("chunk", "swapped", "two whole chunks change places", REPAIRED, chunks_swapped,
                fast=True)  # fmt: skip
    yield Fault("files", "half written", "partial files of a dead writer", RESUMED,
                stale_partial_files)  # fmt: skip
    for name in ("truncated", "deleted", "emptied"):
        how_text, damage = DAMAGES[name]
        yield Fault("saved state of a training", name, how_text, "its shard begins anew",
                    partial(saved_state, damage=damage))  # fmt: skip

    for name, file, damage, words in (
        ("weights deleted", "weights.pt", Path.unlink, "weights.pt"),
        ("weights truncated", "weights.pt", truncate, "weights.pt"),
        ("weights changed", "weights.pt", other_weights, "has changed since"),
        ("data deleted", "rows.npy", Path.unlink, "rows.npy"),
        ("data truncated", "rows.npy", truncate, "disturbed.py"),
        ("data changed", "rows.npy", other_rows, "training data"),
        ("code deleted", "disturbed.py", Path.unlink, "disturbed:SlowTask"),
        ("code changed", "disturbed.py", other_code, "code"),
    ):
        inject = partial(input_damaged, name=file, damage=damage, words=words)
        yield Fault("input", name, f"of {file}", REFUSED, inject)

    for what, how_text, words in (
        ("nan", "its loss is NaN", "not finite for sample 1287"),
        ("inf", "its loss is infinite", "not finite for sample 1287"),
        ("raises", "its loss raises ValueError", "a sample that cannot be read"),
        ("memory", "its loss raises MemoryError", "out of memory"),
    ):
        inject = partial(poisoned, what=what, words=words)
        yield Fault("sample", what, how_text, THE_REST, inject)
    yield Fault("sample", "kills its process", "SIGKILL within its loss", RESUMED,
                poisons_the_process)  # fmt: skip

    for seconds, word in ((3600.0, "an hour fast"), (-3600.0, "an hour slow")):
        yield Fault("clock", f"{word}, of the driver", "time.time", LIVE_TWICE,
                    partial(clock_is_wrong, seconds=seconds))  # fmt: skip
        yield Fault("clock", f"{word} after a jump", "time.time, in mid-run", LIVE_TWICE,
                    partial(clock_is_wrong, seconds=seconds, after_s=1.5))  # fmt: skip
        yield Fault("clock", f"{word}, of the reader", "time.time", LIVE_TWICE,
                    partial(readers_clock_is_wrong, seconds=seconds))  # fmt: skip
    yield Fault("clock", "25 s fast, of the reader", "time.time", LIVE_TWICE,
                partial(readers_clock_is_wrong, seconds=25.0))  # fmt: skip
