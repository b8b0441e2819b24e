"""Options of the commands that do not submit, and how any option is shown."""

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from influence_jobs.store import folder

DEFAULT_RUNS = folder.DEFAULT_RUNS
SCALARS = (bool, int, float, str)
KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY

Runs = Annotated[
    str,
    typer.Option(
        envvar="INFL_RUNS",
        help="Folder of all runs: a path, s3:// or gs://.",
        rich_help_panel="How to run",
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object as the last line of standard output.",
        rich_help_panel="How to run",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Only print the plan and an estimate from a short probe.",
        rich_help_panel="How to run",
    ),
]
RunId = Annotated[
    str, typer.Argument(metavar="RUN", help="Run id, or the first characters of it or of its hash.")
]


def flag(name: str) -> str:
    """An option's name on the command line."""
    return f"--{name.replace('_', '-')}"


def as_option(name: str, field: FieldInfo) -> tuple[Any, Any]:
    """A field of a request as Typer takes it: annotation and default."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    kind, several = _shown_type(field.annotation)
    required = field.is_required()
    default = ... if required else None if several else field.default
    said = typer.Option(
        flag(name),
        help=field.description,
        rich_help_panel=str(extra["panel"]),
        metavar=extra["metavar"],  # type: ignore[arg-type]
    )
    shown: Any = list[kind] if several else kind  # type: ignore[valid-type]
    if default is None:
        shown = shown | None if isinstance(shown, type) else Union[shown, None]  # noqa: UP007
    return Annotated[shown, said], default


def parameters(fields: Mapping[str, FieldInfo]) -> list[inspect.Parameter]:
    """Fields of a request as parameters of a command."""
    found = []
    for name, field in fields.items():
        annotation, default = as_option(name, field)
        found.append(inspect.Parameter(name, KEYWORD_ONLY, default=default, annotation=annotation))
    return found


def take(command: Callable[..., None], found: Sequence[inspect.Parameter]) -> None:
    """Let a command that takes any keywords have these parameters, for Typer to see."""
    command.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in found}


def _shown_type(annotation: Any) -> tuple[Any, bool]:
    """What one value of a field is on the command line, and whether there may be several."""
    kind = plain_type(annotation)
    if get_origin(kind) is tuple:
        one = plain_type(get_args(kind)[0])
        return one if one in SCALARS else str, True
    if get_origin(kind) is Literal or kind in SCALARS:
        return kind, False
    return str, False


def plain_type(annotation: Any) -> Any:
    """An annotation without limits, and without None."""
    if get_origin(annotation) is Annotated:
        return plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds: Sequence[Any] = [k for k in get_args(annotation) if k is not type(None)]
        return plain_type(kinds[0]) if len(kinds) == 1 else str
    return annotation
