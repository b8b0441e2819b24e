"""`infl report`: one HTML page that explains runs, and their figures as PNG and Parquet."""

from pathlib import Path
from typing import Annotated

import typer

from infl_cli import options as o
from infl_cli.render import say
from influence_jobs.errors import SpecError
from influence_jobs.store.files import LocalFiles
from influence_jobs.store.find import find_run
from influence_jobs.store.folder import for_runs, runs_folder
from influence_jobs.store.run import Run

REPORT = "report"


def report(
    run: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Ids of runs, or their first characters."),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder to write to; by default `report` in the folder of the first run.",
        ),
    ] = None,
    runs: o.Runs = o.DEFAULT_RUNS,
    trust: o.Trust = False,
) -> None:
    """Write an HTML page about runs: requests, results, their certainty, and how they were made.

    The page needs no network. Its figures are also written as PNG, their data as Parquet, and its
    tables as Markdown.
    """
    found = [find_run(runs_folder(runs), word) for word in run]
    if "://" in (out or found[0].root):
        command = f"infl report {found[0].id} --out DIR{for_runs(found[0].root)}"
        raise SpecError(f"name a folder on this machine: {command}")
    write_report_of(found, Path(out) if out else report_folder(found[0]))


def report_folder(run: Run) -> Path:
    """The folder that the report of a run on this machine is written to by default.

    Raises:
        StoreError: It is a link, and the run may be a stranger's.
    """
    return LocalFiles(Path(run.root)).sub(run.id).path(REPORT)


def write_report_of(runs: list[Run], folder: Path) -> None:
    """Write the report of runs, and print its path."""
    from influence_jobs.kinds import view_of
    from influence_jobs.report.html import sections_of, write_report

    sections = sections_of(runs)
    for section in sections:
        for note in section.notes:
            say(note)
    title = "; ".join(view_of(run).title for run in runs)
    first, *others = write_report(title, sections, folder)
    typer.echo(first)
    say(f"and {len(others)} files of figures and tables beside it")
