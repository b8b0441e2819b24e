"""Options that several commands share, and the way from a request's fields to Typer's options."""

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

from influence_jobs.store import folder

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

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
        help="Print the plan and estimate the time by a short probe; compute nothing.",
        rich_help_panel="How to run",
    ),
]


def known_cluster(address: str | None) -> str | None:
    """Remember a cluster that the user names, so that the token may go there."""
    if address:
        from influence_jobs.home import make_known

        make_known("cluster", address)
    return address


Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        callback=known_cluster,
        help="Ray cluster of the run, if it was submitted from another machine. Your token is "
        "sent there.",
    ),
]


def _trust(given: bool) -> bool:
    if given:
        from influence_jobs.tasks.trust import trust_all

        trust_all()
    return given


Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        callback=_trust,
        help="Import the code of the run's task, although you have not named it on this machine:"
        " the run may come from somebody else.",
        rich_help_panel="How to run",
    ),
]
RunId = Annotated[
    str, typer.Argument(metavar="RUN", help="Run id, or the first characters of it or of its hash.")
]


def flag(name: str) -> str:
    """An option's name on the command line."""
    return f"--{name.replace('_', '-')}"


def panel_of(field: "FieldInfo") -> str:
    """Heading under which help lists a field of a request."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["panel"])


def as_option(name: str, field: "FieldInfo") -> tuple[Any, Any]:
    """A field of a request as Typer takes it: its annotation and default."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    kind, several = _shown_type(field.annotation)
    required = field.is_required()
    default = ... if required else None if several else field.default
    said = typer.Option(
        flag(name),
        help=field.description,
        rich_help_panel=panel_of(field),
        metavar=extra["metavar"],  # type: ignore[arg-type]
    )
    shown: Any = list[kind] if several else kind  # type: ignore[valid-type]
    if default is None:
        shown = shown | None if isinstance(shown, type) else Union[shown, None]  # noqa: UP007
    return Annotated[shown, said], default


def parameters(fields: "Mapping[str, FieldInfo]") -> list[inspect.Parameter]:
    """The fields of a request as parameters of a command."""
    found = []
    for name, field in fields.items():
        annotation, default = as_option(name, field)
        found.append(inspect.Parameter(name, KEYWORD_ONLY, default=default, annotation=annotation))
    return found


def take(command: Callable[..., None], found: Sequence[inspect.Parameter]) -> None:
    """Give a command that takes any keywords a signature with these parameters, for Typer."""
    command.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in found}


def _shown_type(annotation: Any) -> tuple[Any, bool]:
    """The type of one value on the command line, and whether the option may be repeated."""
    kind = plain_type(annotation)
    if get_origin(kind) is tuple:
        one = plain_type(get_args(kind)[0])
        return one if one in SCALARS else str, True
    if get_origin(kind) is Literal or kind in SCALARS:
        return kind, False
    return str, False


def plain_type(annotation: Any) -> Any:
    """The type of an annotation, without its limits and without None."""
    if get_origin(annotation) is Annotated:
        return plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds: Sequence[Any] = [k for k in get_args(annotation) if k is not type(None)]
        return plain_type(kinds[0]) if len(kinds) == 1 else str
    return annotation
