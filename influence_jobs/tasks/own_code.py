"""The user's own code among all that is loaded: where it lies, and which line of it failed."""

import re
import site
import sysconfig
import traceback
from functools import cache
from pathlib import Path

_LONGEST = 200  # characters of an error's own text that are shown
# What torch says of a double tensor beside a float one.
_TWO_TYPES = re.compile(r"should be the same|have the same dtype|expected scalar type")
_CURE = ": cast samples to the type of the weights, x.to(next(model.parameters()).dtype)"
OURS = ("influence_jobs", "infl_cluster", "infl_cli", "infl_configs")


def is_own(file: Path, module: str) -> bool:
    """Whether a file is the user's: neither of this package nor installed.

    Args:
        module: Its name as a module.
    """
    if module.partition(".")[0] in OURS:
        return False
    if {"site-packages", "dist-packages"} & set(file.parts):  # of this or another environment
        return False
    return not any(file.is_relative_to(folder) for folder in library_folders())


def described(error: BaseException) -> str:
    """An error of the user's code in one line, with their last line that it came through."""
    if isinstance(error, SyntaxError):
        said, where = error.msg, f" ({error.filename}, line {error.lineno})"
    else:
        said, where = " ".join(str(error).split()), place_and_cure(error)
    said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."
    return f"{type(error).__name__}{': ' if said else ''}{said}{where}"


def place_and_cure(error: BaseException) -> str:
    """The user's last line that an error came through, and its cure; empty if neither is known."""
    where = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        module = str(frame.f_globals.get("__name__", ""))
        if not file.startswith("<frozen") and is_own(Path(file).resolve(), module):
            where = f" ({file}, line {line})"
    two_types = isinstance(error, RuntimeError) and _TWO_TYPES.search(str(error))
    return where + (_CURE if where and two_types else "")


@cache
def library_folders() -> frozenset[Path]:
    """Where Python and what is installed for it lie."""
    paths = sysconfig.get_paths()
    names = [paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    return frozenset(Path(name).resolve() for name in (*names, *site.getsitepackages()))
