"""The user's own folder, INFL_HOME or ~/.infl: what is kept between commands, on this machine only.

A run folder may come from a stranger. What it asks for that could do harm - code to import, a
cluster to send the token to - is done only if the user has named the same thing here before. Such
names are `known`.
"""

import hashlib
import os
import stat
from pathlib import Path
from typing import Literal

from influence_jobs.errors import RuntimeFault

Kind = Literal["code", "cluster"]

_named: set[tuple[Kind, str]] = set()  # by this process, where the folder cannot be written


def infl_home() -> Path:
    """The folder, readable by its owner only.

    Raises:
        RuntimeFault: It cannot be made or belongs to somebody else.
    """
    try:
        path = Path(os.environ.get("INFL_HOME") or "~/.infl").expanduser()
    except RuntimeError:
        raise RuntimeFault("you have no home folder: set INFL_HOME to a folder of yours") from None
    return private_dir(path.absolute())


def private_dir(path: Path) -> Path:
    """Make a folder that only its owner can enter, or check that it is one.

    Raises:
        RuntimeFault: It cannot be made, or it belongs to somebody else.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise RuntimeFault(f"{path} is not a folder of yours: set INFL_HOME to one that is")
        path.chmod(0o700)
    except OSError as error:
        raise RuntimeFault(
            f"cannot make the folder {path}: {error.strerror}; set INFL_HOME to another"
        ) from None
    return path


def make_known(kind: Kind, name: str) -> None:
    """Remember a name that the user gave; without a folder to write to, in this process only."""
    try:
        path = _path(kind, name)
        private_dir(path.parent)
        path.write_text(name)
    except (OSError, RuntimeFault):
        _named.add((kind, name))


def is_known(kind: Kind, name: str) -> bool:
    """Whether the user has given this name before."""
    if (kind, name) in _named:
        return True
    try:
        return _path(kind, name).is_file()
    except RuntimeFault:
        return False


def _path(kind: Kind, name: str) -> Path:
    return infl_home() / "known" / f"{kind}-{hashlib.sha256(name.encode()).hexdigest()[:32]}"
