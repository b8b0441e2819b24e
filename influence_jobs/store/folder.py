"""The folder of all runs, as the command line names it: `--runs`, $INFL_RUNS, or `runs` in the working directory."""

import os
import shlex
from pathlib import Path

DEFAULT_RUNS = "runs"


def runs_folder(word: str) -> str:
    """What `--runs` names, whatever the working directory will be."""
    return word if "://" in word else str(Path(word).expanduser().absolute())


def for_runs(root: str) -> str:
    """The `--runs` that a suggested command needs to find the runs of a folder; empty if it needs none."""
    root, default = runs_folder(root), runs_folder(os.environ.get("INFL_RUNS", DEFAULT_RUNS))
    return "" if root == default else f" --runs {shlex.quote(root)}"
