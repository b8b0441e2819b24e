"""Whose code runs: a run's task may name any file, so only those that the user named are imported.

Naming a task, in a command or from Python, makes the files that it is imported from known on this
machine. What is installed is trusted as a whole. Workers trust what their driver was told to run.
"""

import site
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from pkgutil import get_importer

from influence_jobs.errors import UntrustedCode
from influence_jobs.home import is_known, make_known
from influence_jobs.tasks.own_code import OURS, library_folders

_everything = False
# Not any folder of such a name: a stranger's may have one. These were there before any run was.
_installed = frozenset(
    Path(path).resolve()
    for path in (site.getusersitepackages(), *sys.path)
    if Path(path).name in ("site-packages", "dist-packages")
)


def trust_all() -> None:
    """Let this process import the code of any run: the user has said so, or it is a worker."""
    global _everything
    _everything = True


def make_trusted(module: str) -> None:
    """Trust the files that a module, which the user named, is imported from."""
    for file in _files_of(module)[0]:
        make_known("code", str(file))


def let_import(module: str, task: str, folder: str) -> None:
    """Let a module be imported that only a run names, from where one works or from a folder.

    A folder that is not needed, or whose code is not trusted, is not left on `sys.path`: from there
    it would give whatever else is looked for.

    Args:
        folder: Where the run says that the module lies; may be empty.

    Raises:
        UntrustedCode: The user has not named a file, or there is none; with the cure.
    """
    here = str(Path.cwd())
    if not _everything:
        if module in sys.modules:
            return
        before = [*sys.path]
        for path in ("", here, folder):
            _append(path)
            files, complete = _files_of(module)
            if complete:
                break
        sys.path[:] = before
        for file in files:
            if not is_known("code", str(file)):
                raise UntrustedCode(
                    f"task {task!r} of this run would run {file}, which you have not named on this "
                    "machine: read it, then add --trust"
                )
        if not complete and not _is_there(module.partition(".")[0]):
            raise UntrustedCode(
                f"task {task!r} of this run is not here: put the file of its module {module} to "
                "where you work, and name it with --task"
            )
        folder = folder if complete and path == folder else ""
    _append(here)
    _append(folder)


def _is_there(top: str) -> bool:
    try:
        return find_spec(top) is not None
    except (ImportError, ValueError):
        return False


def _append(folder: str) -> None:
    if folder and folder not in sys.path:
        sys.path.append(folder)


def _files_of(module: str) -> tuple[list[Path], bool]:
    """The user's own files that run when a module is imported, and whether all are found.

    Those of the packages that it is in are among them. Nothing is imported.
    """
    files: list[Path] = []
    names = module.split(".")
    if names[0] in OURS:
        return files, True
    places: list[str] = []
    for i in range(len(names)):
        name = ".".join(names[: i + 1])
        try:
            found = _below(places, name) if i else find_spec(name)
        except (ImportError, ValueError):  # the import will say it better
            return files, False
        if found is None:
            return files, False
        if found.has_location and found.origin:
            path = Path(found.origin).resolve()
            if not any(path.is_relative_to(it) for it in _installed | library_folders()):
                files.append(path)
        places = [*(found.submodule_search_locations or ())]
    return files, True


def _below(places: list[str], name: str) -> ModuleSpec | None:
    """What a package's folders have for a full name; unlike Python, without importing it."""
    portions = ModuleSpec(name, None, is_package=True)  # of a package without `__init__.py`
    assert portions.submodule_search_locations is not None
    for importer in map(get_importer, places):
        found = importer.find_spec(name) if importer is not None else None
        if found is not None and found.loader is not None:
            return found
        portions.submodule_search_locations += (found and found.submodule_search_locations) or []
    return portions if portions.submodule_search_locations else None
