"""Whose code runs: a run's task may name any file, so only those that the user named are imported.

Naming a task, in a command or from Python, makes the file that it is imported from known on this
machine. What is installed is trusted as a whole. Workers trust what their driver was told to run.
"""

import importlib.util
import sys
from pathlib import Path

from influence_jobs.errors import UntrustedCode
from influence_jobs.home import is_known, make_known
from influence_jobs.tasks.own_code import is_own

_everything = False


def trust_all() -> None:
    """Let this process import the code of any run: the user has said so, or it is a worker."""
    global _everything
    _everything = True


def make_trusted(module: str) -> None:
    """Trust the file that a module, which the user named, is imported from."""
    if (file := _file_of(module)) is not None:
        make_known("code", str(file))


def require_trusted(module: str, task: str) -> None:
    """Refuse to import a module that only a run names.

    Raises:
        UntrustedCode: Naming the file and the cure.
    """
    if _everything or module in sys.modules:
        return
    file = _file_of(module)
    if file is not None and not is_known("code", str(file)):
        raise UntrustedCode(
            f"task {task!r} of this run would run {file}, which you have not named on this "
            "machine: read it, then add --trust"
        )


def _file_of(module: str) -> Path | None:
    """The user's own file behind a module or the package that it is in; nothing is imported."""
    top = module.partition(".")[0]
    try:
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # the import will say it better
        return None
    if found is None:
        return None
    places = [found.origin] if found.origin else [*(found.submodule_search_locations or ())]
    for place in places:
        path = Path(place).resolve()
        if is_own(path, top):
            return path
    return None
