"""Can runs be kept where they are to be kept?"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from infl_cli.doctor.finding import Line
from influence_jobs.errors import InflError
from influence_jobs.home import infl_home
from influence_jobs.terms import size

if TYPE_CHECKING:
    from influence_jobs.store.files import Files

LITTLE_BYTES = 1e9
FEW_INODES = 10_000
MINE = ".infl-doctor-"


def disk(runs: str) -> Iterator[Line]:
    """The folder of all runs, and the user's own folder.

    Args:
        runs: A URL or an absolute path.
    """
    yield from _remote(runs) if "://" in runs else _local(Path(runs))
    try:
        home = infl_home()
        with _scratch(home):
            yield "ok", "your folder", f"{home} (INFL_HOME)"
    except (InflError, OSError) as error:
        yield "fail", "your folder", f"{error}; set INFL_HOME to a folder that you may write"


def _local(runs: Path) -> Iterator[Line]:
    there = next(path for path in (runs, *runs.parents) if path.exists())
    if not there.is_dir():
        yield "fail", "runs folder", f"{there} is not a folder: name another by --runs or INFL_RUNS"
        return
    try:
        with _scratch(there) as scratch:
            said = f"{runs}" if runs == there else f"{runs}, which the first run makes"
            yield "ok", "runs folder", f"{said}; it can be written"
            yield from _operations(scratch)
    except OSError as error:
        said = f"{there}: {error.strerror}; name another by --runs or INFL_RUNS"
        yield "fail", "runs folder", said
    yield from _space(there)


def _operations(scratch: Path) -> Iterator[Line]:
    """What the store asks of a disk: tried, in a folder of our own."""
    from influence_jobs.store.files import LocalFiles

    files = LocalFiles(scratch)
    files.write("replaced", b"old")
    files.write("replaced", b"new")
    if files.read("replaced") == b"new" and files.names("") == ["replaced"]:
        yield "ok", "replacing a file", "at once, by renaming another"
    else:
        yield (
            "fail",
            "replacing a file",
            "renaming does not replace it: name another disk by --runs",
        )
    yield _created_once(files)
    try:
        (scratch / "second").hardlink_to(scratch / "replaced")
    except OSError as error:
        said = f"{error.strerror}: a power cut may leave a lease or record empty"
        yield "warn", "hard links", f"{said}, which infl verify --repair mends"
    else:
        yield "ok", "hard links", "leases and records are created at once"


def _created_once(files: "Files") -> Line:
    if files.create("once", b"1") and not files.create("once", b"2"):
        return "ok", "creating a file once", "the second of two is refused, as two drivers need"
    said = "the second of two is not refused, so two drivers could write one run"
    return "fail", "creating a file once", f"{said}: name another place by --runs"


def _space(folder: Path) -> Iterator[Line]:
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if free < LITTLE_BYTES:
        said = f"{size(free)} free: --dry-run tells what a run writes; delete runs, or name --runs"
        yield "warn", "space", said
    else:
        yield "ok", "space", f"{size(free)} free"
    if found.f_files and found.f_favail < FEW_INODES:  # some disks have no limit, and say 0
        said = f"{found.f_favail} more fit on the disk, and a run has thousands: delete some"
        yield "warn", "files", said


def _remote(runs: str) -> Iterator[Line]:
    """A bucket: the same operations, by its own requests."""
    from influence_jobs.store.files import open_files

    try:
        mine = open_files(runs).sub(f"{MINE}{os.urandom(6).hex()}")
        mine.write("once", b"0")
        mine.delete("once")
        yield "ok", "runs folder", f"{runs}; it can be written"
        yield _created_once(mine)
        mine.delete("once")
    except (InflError, OSError) as error:
        yield "fail", "runs folder", str(error)


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A new folder, deleted in the end.

    Raises:
        OSError: It cannot be made.
    """
    with tempfile.TemporaryDirectory(prefix=MINE, dir=parent) as folder:
        yield Path(folder)
