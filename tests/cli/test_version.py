"""Which version this is: one place says it, and everything else repeats that."""

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import influence_jobs
from influence_jobs.store import software as module
from influence_jobs.store.software import software

PROJECT = Path(__file__).parents[2]


def test_the_command_tells_versions_and_revision(
    infl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    software.cache_clear()
    monkeypatch.setattr(module, "_checked_out", lambda: "0123456789ab+changes")
    said = infl("--version")
    software.cache_clear()
    assert (said.code, said.err) == (0, "")
    first, second = said.out.splitlines()
    assert first == f"infl {influence_jobs.__version__}, revision 0123456789ab+changes"
    for package in ("torch", "ray", "zarr"):
        assert f"{package} {version(package)}" in second.split(", ")


def test_it_is_told_without_loading_torch_or_ray() -> None:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print({'torch', 'ray'} & set(sys.modules)))\n"
        "sys.argv = ['infl', '--version']\n"
        "from infl_cli.entry import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_newest_release_of_the_changelog_is_this_version() -> None:
    text = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## \[?(\d+\.\d+\.\d+)\]?", text, re.MULTILINE)
    assert releases[0] == influence_jobs.__version__
