"""The options of a task, as the help of `infl submit` shows them."""

import inspect
from typing import Annotated, Any, get_args, get_origin

import typer
from typing_extensions import Doc

from infl_cli.options import KEYWORD_ONLY, SCALARS, flag, plain_type, take
from influence_jobs.tasks.registry import arguments_of, task_class


def shown_options(name: str) -> list[Any]:
    """The options of a task's constructor, and what else it takes, as Typer's parameters."""
    kind = task_class(name)
    shown = {key: (p.annotation, p.default) for key, p in arguments_of(kind).items()}
    shown |= {key: (annotation, False) for key, annotation in kind.request_options.items()}
    parameters = []
    for key, (annotation, default) in shown.items():
        base = plain_type(annotation)
        if base is inspect.Parameter.empty:
            base = type(default) if isinstance(default, SCALARS) else str
        if base not in SCALARS:
            continue
        option = typer.Option(
            flag(key), help=_doc(annotation), rich_help_panel=f"Options of task {name}"
        )
        required = default is inspect.Parameter.empty
        parameters.append(
            inspect.Parameter(
                key,
                KEYWORD_ONLY,
                default=... if required else default,
                annotation=Annotated[base | None if default is None else base, option],
            )
        )

    def command(**values: Any) -> None:
        """Takes them."""

    take(command, parameters)
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return [p for p in typer.main.get_command(app).params if p.name != "help"]


def _doc(annotation: Any) -> str | None:
    if get_origin(annotation) is not Annotated:
        return None
    said = [part.documentation for part in get_args(annotation) if isinstance(part, Doc)]
    return said[0] if said else None
