"""`infl init` and `infl check`: begin a task of your own, and see whether it is right."""

import shlex
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from infl_cli import render
from infl_cli.options import Json
from infl_cli.submit import TaskOptions, task_options
from influence_jobs.devices import Device
from influence_jobs.errors import SpecError

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
TEMPLATE = "template.py"  # in influence_jobs/tasks: a task that works as it stands
TEMPLATE_CLASS = "MyTask"


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE.py", help="The file to write.")],
) -> None:
    """Write a task that works as it stands, with the places to fill marked."""
    path = file.expanduser()
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise SpecError(f"{file} cannot be imported: name it like my_task.py")
    text = files("influence_jobs.tasks").joinpath(TEMPLATE).read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as new:
            new.write(text.replace(TEMPLATE, file.name))
    except FileExistsError:
        raise SpecError(f"{file} is there already: choose another name") from None
    except (FileNotFoundError, NotADirectoryError):
        raise SpecError(f"there is no folder {path.parent}: make it first") from None
    render.out.print(f"{file} is written; next: infl check {file}:{TEMPLATE_CLASS}")


def check(
    context: typer.Context,
    task: Annotated[str, typer.Argument(help="Your task, as file.py:Class or module:Class.")],
    option: TaskOptions = None,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = "auto",
    json: Json = False,
) -> None:
    """Try a task with a few samples: is it right, what is fast, what does each run take?

    Options of the task are given as to infl submit. Exit code 2 if something fails.
    """
    from influence_jobs.contract import findings

    found = []
    for finding in findings(task, task_options(context.args, option or ()), device=device):
        found.append(finding)
        render.out.print(str(finding))
    failed = [finding.check for finding in found if finding.mark == "fail"]
    if json:
        render.print_json({"failed": failed, "findings": [vars(finding) for finding in found]})
    if failed:
        raise typer.Exit(2)
    if not json:
        given = [*context.args, *(word for pair in option or () for word in ("--option", pair))]
        words = shlex.join(["--task", task, *given])
        render.out.print(f"next: infl submit influence {words} --test 0 --local")
