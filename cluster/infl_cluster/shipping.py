"""The user's code, sent with a job to a cluster that does not have it.

What travels is Python source alone: the files that a task is imported from, and whole packages that
they lie in. Data, checkpoints and secrets stay where they are. Ray unpacks the archive on every
node, and starts the driver and the workers in it.
"""

import hashlib
import io
import os
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from influence_jobs.errors import SpecError
from influence_jobs.specs.base import TaskSpec, listed
from influence_jobs.tasks.fingerprints import own_modules
from influence_jobs.tasks.own_code import is_own
from influence_jobs.tasks.registry import task_class
from influence_jobs.terms import size

VARIABLE = "INFL_CODE"  # the folders in the archive to import from
MOST_BYTES = 100 * 2**20  # that Ray's dashboard takes in a request
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the same code gives the same archive, which is sent only once


@dataclass(frozen=True)
class Parcel:
    """An archive of source files.

    Attributes:
        data: The zip file. Its files lie to each other as they do here.
        folders: Those in it from which modules are imported.
        files: The names of its files.
        left: What lies beside them and stays here; folders end with a slash.
    """

    data: bytes
    folders: tuple[str, ...]
    files: tuple[str, ...]
    left: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name under which Ray keeps it: the hash of its content."""
        return f"_ray_pkg_{hashlib.sha256(self.data).hexdigest()[:32]}.zip"

    def env(self) -> dict[str, str]:
        """What tells a job about it."""
        return {VARIABLE: os.pathsep.join(self.folders)}

    def words(self) -> str:
        """What it has and what it leaves behind, in a line."""
        stays = f"; stays here: {listed(self.left)}" if self.left else ""
        return f"{listed(self.files)} ({size(len(self.data))} packed){stays}"


def pack(task: TaskSpec) -> Parcel | None:
    """Pack the user's own code behind a task; None if all of it is installed.

    Raises:
        SpecError: It cannot be imported here, or it is too large for Ray.
    """
    modules = own_modules(task_class(task))
    found = {name: file for file, name in modules.items() if is_own(file, name)}
    if not found:
        return None
    roots = {_root(file, name) for name, file in found.items()}
    around = Path(os.path.commonpath(roots))
    files = {*found.values()}
    for name, file in found.items():
        if (package := _package(file, name)) is not None:
            files.update(_sources(package))
    names = {str(file.relative_to(around)): file for file in files}
    data = _zipped(names)
    if len(data) > MOST_BYTES:
        raise SpecError(
            f"the code of task {task.name} is {size(len(data))} packed, and Ray takes "
            f"{size(MOST_BYTES)}: install its packages on the nodes of the cluster instead"
        )
    return Parcel(
        data,
        tuple(sorted(str(root.relative_to(around)) for root in roots)),
        tuple(sorted(names)),
        tuple(sorted({left for root in roots for left in _left(root, files)})),
    )


def unpack() -> None:
    """Import from the archive that this job came with, if any; Ray has unpacked it around us."""
    if VARIABLE not in os.environ:
        return
    here = Path.cwd()
    sys.path[:0] = [str(here / place) for place in os.environ[VARIABLE].split(os.pathsep)]
    # A second node of Ray on this machine unpacks it anew, and a deleted folder is none to work in.
    os.chdir("/")


def _parts(file: Path, name: str) -> tuple[str, ...]:
    parts = name.split(".")
    return (
        (*parts, "__init__.py") if file.name == "__init__.py" else (*parts[:-1], f"{parts[-1]}.py")
    )


def _root(file: Path, name: str) -> Path:
    """The folder from which a module is imported."""
    parts = _parts(file, name)
    origin = getattr(sys.modules.get(name), "__file__", None)
    moved = "." in name and origin and Path(origin).parent.resolve() != file.parent
    if moved or file.parts[-len(parts) :] != parts:
        raise SpecError(
            f"module {name} is a link to {file}, which has another "
            f"{'package' if moved else 'name'} and cannot be sent to the cluster: put a copy in "
            "its place"
        )
    return file.parents[len(parts) - 1]


def _package(file: Path, name: str) -> Path | None:
    """The outermost regular package that a module lies in."""
    folder, found = file.parent, None
    for _ in _parts(file, name)[:-1]:
        if not (folder / "__init__.py").is_file():
            break
        folder, found = folder.parent, folder
    return found


def _sources(package: Path) -> Iterator[Path]:
    """All Python source of a package: modules may be imported by names made at run time."""
    for folder, folders, names in os.walk(package):
        if "pyvenv.cfg" in names:  # an environment with packages of others
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        for name in names:
            path = Path(folder, name)
            if name.endswith(".py") and not name.startswith(".") and path.is_file():
                yield path


def _left(root: Path, files: set[Path]) -> Iterator[str]:
    """What lies beside the files of an archive, and in the folders of their packages."""
    held = {parent for file in files for parent in file.parents if parent.is_relative_to(root)}
    for folder in held:
        for path in folder.iterdir():
            if path not in files and path not in held and path.name != "__pycache__":
                yield f"{path.relative_to(root)}{'/' * path.is_dir()}"


def _zipped(names: dict[str, Path]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(names):
            entry = zipfile.ZipInfo(name, _LONG_AGO)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, names[name].read_bytes())
    return packed.getvalue()
