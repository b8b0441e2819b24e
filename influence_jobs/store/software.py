"""Versions of the software that computes, and the git revision of this package."""

import json
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import TYPE_CHECKING

from influence_jobs import __version__

if TYPE_CHECKING:
    from influence_jobs.store.documents import Entry

PACKAGE = "influence-jobs"
_OTHERS = ("torch", "numpy", "zarr", "ray")
GIT_DEADLINE_S = 5.0


@cache
def software() -> dict[str, str]:
    """Versions of installed packages, of `python`, and the git `revision` if it is known."""
    found = {PACKAGE: __version__}
    for package in _OTHERS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["python"] = platform.python_version()
    if revision := _checked_out() or _installed_from():
        found["revision"] = revision
    return found


def other_versions(entries: "Iterable[Entry]") -> dict[str, list[str]]:
    """Packages of which finished shards have other versions than this process, with theirs."""
    ours, found = software(), dict[str, set[str]]()
    for entry in entries:
        for name, value in entry.software.items():
            if value != ours.get(name):
                found.setdefault(name, set()).add(str(value))
    return {name: sorted(values) for name, values in found.items()}


def _checked_out() -> str | None:
    """The commit of the checkout that holds this file; None outside of a checkout.

    `+changes` is appended if files differ from that commit.
    """
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--exclude=*"]
    try:
        # A site-packages folder may lie inside another project's repository.
        tracked = _says(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name]
        )
        return _says([*command, "--dirty=+changes"]) if tracked else None
    except (OSError, subprocess.SubprocessError):
        return None


def _says(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=GIT_DEADLINE_S
    )
    return done.stdout.strip()


def _installed_from() -> str | None:
    """The commit that pip installed; None if it did not install from a repository."""
    try:
        text = distribution(PACKAGE).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    commit: str | None = json.loads(text or "{}").get("vcs_info", {}).get("commit_id")
    return commit
