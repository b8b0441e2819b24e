"""The command `infl`."""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from infl_cli import (
    check,
    cluster,
    data,
    doctor,
    render,
    report,
    runs,
    submit,
    suspects,
    top,
    view,
)
from influence_jobs.errors import DISK_ERRORS, InflError
from influence_jobs.store.object_files import StorageError, is_of_store, storage_message
from influence_jobs.store.software import PACKAGE, software
from influence_jobs.terms import in_a_line


class Commands(TyperGroup):
    """The commands, `submit` first: users start there."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: name != "submit")


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Which training samples did this output of a network come from?",
    epilog="Start with: infl submit grad-norms --layer 11",
)


def _print_version(asked: bool) -> None:
    if asked:
        versions = software()
        revision = versions.pop("revision", "not known")
        render.out.print(f"infl {versions.pop(PACKAGE)}, revision {revision}")
        render.out.print(", ".join(f"{name} {version}" for name, version in versions.items()))
        raise typer.Exit


@app.callback()
def infl(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_print_version,
            help="Print the versions of infl, its revision, and of torch, ray, zarr and numpy.",
        ),
    ] = False,
) -> None:
    """Takes the options of `infl` itself."""


app.add_typer(submit.app, name="submit")
app.command("runs")(runs.list_runs)
for command in (runs.status, runs.logs, runs.stop, runs.resume, runs.verify):
    app.command()(command)
app.command("init")(check.init)
app.command("check", context_settings=check.CONTEXT)(check.check)
app.command("doctor")(doctor.doctor)
app.command("top")(top.top)
app.command("suspects")(suspects.suspects)
app.command("report")(report.report)
app.command("view")(view.view)
app.add_typer(cluster.app, name="cluster")
app.add_typer(data.app, name="data")
app.command("denoise")(data.denoise_folder)


def main() -> None:
    """Run a command. Exit code 0: success; 2: an error, told in one line; 130: Ctrl-C."""
    try:
        code = typer.main.get_command(app).main(prog_name="infl", standalone_mode=False)
    except InflError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in DISK_ERRORS and not isinstance(error, StorageError):
            raise
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror}{where}; what is finished is kept")
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        where = f"; see {context.command_path} --help" if context else ""
        message = error.format_message().rstrip(".").replace("Value error, ", "")
        # A bare `infl` or `infl submit` gives no message: its help is printed already.
        _fail(message + where if message else "")
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        if not is_of_store(error):
            raise
        _fail(f"{storage_message(error, 'the runs')}; what is finished is kept")
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    if message:
        print(f"error: {in_a_line(message)}", file=sys.stderr)
    sys.exit(2)
