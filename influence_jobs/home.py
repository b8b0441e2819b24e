"""The user's own folder, INFL_HOME or ~/.infl: what is kept between commands, on this machine only.

A run folder may come from a stranger. What it asks for that could do harm - code to import, a
cluster to send the token to - is done only if the user has named the same thing here before. These
names are `known`, and so are folders of runs that a cluster has been seen to share.

`batches/` has the batch size that suits a model on a device, a file for each.
"""

import hashlib
import json
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypedDict

from influence_jobs.errors import RuntimeFault

Kind = Literal["code", "cluster", "shared"]


class Fitting(TypedDict):
    """A batch size that was chosen before, and whether because a larger one did not fit."""

    batch_size: int
    out_of_memory: bool


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
    """Remember a name; without a folder to write to, in this process only."""
    try:
        path = _path(kind, name)
        private_dir(path.parent)
        path.write_text(name)
    except (OSError, RuntimeFault):
        _named.add((kind, name))


def is_known(kind: Kind, name: str) -> bool:
    """Whether this name was remembered."""
    if (kind, name) in _named:
        return True
    try:
        return _path(kind, name).is_file()
    except RuntimeFault:
        return False


def fitting(of: str) -> Fitting | None:
    """The batch size that was kept for a model and device; None if there is none to be read."""
    try:
        found = json.loads(_path_of_batch(of).read_text())
        size = found["batch_size"]
        if not isinstance(size, int) or size < 1:
            return None
        return {"batch_size": size, "out_of_memory": bool(found["out_of_memory"])}
    except (OSError, ValueError, TypeError, KeyError, RuntimeFault):
        return None


def keep_fitting(of: str, found: Fitting) -> None:
    """Keep a batch size for a model and device, if there is a folder to write to."""
    with suppress(OSError, RuntimeFault):
        path = _path_of_batch(of)
        private_dir(path.parent)
        aside = path.with_suffix(f".{secrets.token_hex(4)}")  # other workers do the same
        aside.write_text(json.dumps({**found, "of": of}, indent=1))
        aside.replace(path)


def _path(kind: Kind, name: str) -> Path:
    return infl_home() / "known" / f"{kind}-{_hashed(name)}"


def _path_of_batch(of: str) -> Path:
    return infl_home() / "batches" / f"{_hashed(of)}.json"


def _hashed(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32]
