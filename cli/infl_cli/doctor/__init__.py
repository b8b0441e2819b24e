"""`infl doctor`: what is installed and what this machine has, what will not work, and the cure.

Its modules import nothing outside the standard library, Typer and rich before they look: a package
that does not load is told in a line.
"""

from typing import Annotated

import typer

from infl_cli import options as o
from infl_cli import render
from infl_cli.doctor.finding import Finding, Look, found_by
from influence_jobs.store.folder import runs_folder


def doctor(
    runs: o.Runs = o.DEFAULT_RUNS,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            callback=o.known_cluster,
            help="Also ask this Ray cluster. Your token is sent there.",
        ),
    ] = None,
    json: o.Json = False,
) -> None:
    """Say what is installed, what this machine has, what will not work, and the cure.

    Nothing is started or fetched. Exit code 0: a run can begin; 1: something that every run needs
    is missing or broken, and its line begins with fail.
    """
    from infl_cli.doctor import disk, packages, ray
    from infl_cli.doctor.loading import Loading

    loading = Loading()
    sections: tuple[tuple[str, Look], ...] = (
        ("installed", packages.installed),
        ("this machine", loading.machine),
        ("Ray", lambda: ray.local() if address is None else (*ray.local(), *ray.remote(address))),
        ("disk", lambda: disk.disk(runs_folder(runs))),
        ("data", loading.data),
        ("extras", packages.extras),
    )
    found: list[Finding] = []
    for title, look in sections:
        if not json:
            render.out.print(f"{title}:")
        for finding in found_by(title, look):
            found.append(finding)
            if not json:
                render.out.print(str(finding))
    failed = [finding for finding in found if finding.mark == "fail"]
    if json:
        render.print_json(
            {
                "healthy": not failed,
                "failed": [finding.check for finding in failed],
                "findings": [vars(finding) for finding in found],
            }
        )
    else:
        warned = sum(finding.mark == "warn" for finding in found)
        render.out.print(
            f"\n{len(failed)} fail, {warned} warn: "
            + ("runs will not work before they are mended" if failed else "runs can begin")
        )
    if failed:
        raise typer.Exit(1)


def alone(words: list[str]) -> None:
    """Run `infl doctor` where the other commands cannot even be loaded."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(doctor)
    app(words, prog_name="infl doctor")
