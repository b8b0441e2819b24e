"""The folder of all runs: `--runs`, else $INFL_RUNS, else `runs` in the working directory."""

import os
import shlex
from pathlib import Path

DEFAULT_RUNS = "runs"


def runs_folder(word: str | os.PathLike[str]) -> str:
    """The folder that `--runs` names, as a URL or an absolute path.

    Links stay, because another machine may have them elsewhere; but not where `..` follows one.
    """
    word = os.fspath(word)
    if "://" in word:
        return word
    path = Path(word).expanduser().absolute()
    return str(path.resolve() if ".." in path.parts else path)


def for_runs(root: str) -> str:
    """The `--runs` option that a suggested command needs; empty if the default is this folder."""
    root, default = runs_folder(root), runs_folder(os.environ.get("INFL_RUNS", DEFAULT_RUNS))
    return "" if root == default else f" --runs {shlex.quote(root)}"
