"""The variables with which an object store is reached, for jobs of the local Ray.

A job inherits the environment that Ray was started with, which may be days old. What is given with
a job instead - command line, metadata, environment - Ray shows on its dashboard. So the variables
go into a file that only the user can read, and the job's environment names the file.
"""

import json
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from influence_jobs.home import private_dir

STORE_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_")  # what obstore reads
FILE_VARIABLE = "INFL_STORE_ACCESS"
SUBMITTING_S = 120.0  # a job has its file for some seconds before Ray knows of it


def keep(folder: Path, submission_id: str) -> Mapping[str, str]:
    """Write this process's variables to a file for a job.

    Returns:
        What to add to the environment of the job and its workers.
    """
    path = private_dir(folder) / f"{submission_id}.json"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({k: v for k, v in os.environ.items() if k.startswith(STORE_PREFIXES)}, file)
    return {FILE_VARIABLE: str(path)}


def take() -> None:
    """Take the variables over from the file that this process's environment names, if any."""
    if path := os.environ.get(FILE_VARIABLE):
        os.environ.update(json.loads(Path(path).read_text()))


def for_workers() -> Mapping[str, str]:
    """What a driver adds to the environment of its workers."""
    return {n: os.environ[n] for n in (FILE_VARIABLE,) if n in os.environ}


def forget() -> None:
    """Delete the file, once the job has ended."""
    if path := os.environ.get(FILE_VARIABLE):
        Path(path).unlink(missing_ok=True)


def kept(folder: Path) -> list[str]:
    """The jobs for which there is a file."""
    return [path.stem for path in folder.glob("*.json")]


def forget_ended(folder: Path, unfinished: Collection[str]) -> None:
    """Delete the files of jobs that could not do so: they were killed, or never began."""
    for path in folder.glob("*.json"):
        if path.stem not in unfinished and time.time() - path.stat().st_mtime > SUBMITTING_S:
            path.unlink(missing_ok=True)
