"""Options that belong together as one parameter of a command."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import Field, fields, is_dataclass
from typing import Annotated, Any, get_origin, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take dataclasses of options: Typer sees each field annotated with an option by itself."""
    signature = inspect.signature(command)
    groups: dict[str, Any] = {
        name: p.annotation for name, p in signature.parameters.items() if is_dataclass(p.annotation)
    }
    flat: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name not in groups:
            flat.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(groups[name], include_extras=True)
        flat += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in _options(groups[name])
        ]

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{f.name: values.pop(f.name) for f in _options(group)})
        command(**values)

    with_options.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in flat}
    return with_options


def _options(group: Any) -> list[Field[Any]]:
    hints = get_type_hints(group, include_extras=True)
    return [field for field in fields(group) if get_origin(hints[field.name]) is Annotated]
