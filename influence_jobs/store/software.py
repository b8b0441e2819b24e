"""Which code computes here: versions, and the revision of a checkout."""

import json
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

PACKAGE = "influence-jobs"
_OTHERS = ("torch", "numpy", "zarr", "ray")
GIT_DEADLINE_S = 5.0


@cache
def software() -> dict[str, str]:
    """Versions by package, those that are installed, with `python` and, where it is known, the git `revision`."""
    found = {}
    for package in (PACKAGE, *_OTHERS):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["python"] = platform.python_version()
    if revision := _checked_out() or _installed_from():
        found["revision"] = revision
    return found


def _checked_out() -> str | None:
    """The commit of the checkout this file lies in, `+changes` if files differ from it; None outside of one."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--exclude=*"]
    try:
        # A site-packages folder may lie in a repository of someone else's.
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
    """The commit that pip installed, where it installed from a repository."""
    try:
        text = distribution(PACKAGE).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    commit: str | None = json.loads(text or "{}").get("vcs_info", {}).get("commit_id")
    return commit
