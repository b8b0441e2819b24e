"""A request: the options that a user sets, the same ones on the command line and in Python.

This module and the `request` modules of the kinds load without torch: help must not wait for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from influence_jobs.errors import SpecError
from influence_jobs.specs.base import Spec, first_error

Say = Callable[[str], None]
T = TypeVar("T")


def _plain(value: Any) -> Any:
    """A run by its id, a path as text, a NumPy number as one of Python."""
    if hasattr(value, "run"):  # Results
        return value.run.id
    if hasattr(value, "__fspath__"):
        return value.__fspath__()
    return value.tolist() if hasattr(value, "tolist") else value


def _several(value: Any) -> Any:
    value = _plain(value)
    if value is None:
        return ()
    if isinstance(value, (list, tuple, set, range)):
        return tuple(_plain(item) for item in value)
    return (value,)


#: No value, one, or several.
Many = Annotated[tuple[T, ...], BeforeValidator(_several)]
One = Annotated[T, BeforeValidator(_plain)]


def option(
    default: Any,
    help: str,
    *,
    panel: str = "What to compute",
    metavar: str | None = None,
    **limits: Any,
) -> Any:
    """A field that is an option of the command line: `--like-this` for `like_this`.

    Args:
        default: Its value if it is not given; `...` if it must be.
        help: What it is, a sentence or two.
        panel: Heading under which the command line lists it.
        metavar: What its value is called there.
        limits: As pydantic's `Field` takes them: ge, gt, le, lt.
    """
    return Field(
        default, description=help, json_schema_extra={"panel": panel, "metavar": metavar}, **limits
    )


class Options(BaseModel):
    """Options that belong together; a request is made of several such classes."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> Self:
        """The options with these values.

        Raises:
            SpecError: A value is of another type or out of range; the message names the option.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            name = str(error.errors()[0]["loc"][0]).replace("_", "-")
            said = first_error(error).partition(": ")[2]
            raise SpecError(f"--{name}: {said[:1].lower()}{said[1:]}") from None

    def given(self, name: str) -> bool:
        """Whether an option has another value than its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)


class Request(Options, ABC):
    """What a user asks of one kind of run.

    Attributes:
        default_task: The task if neither a task nor a training is named.
        task: Its name, `file.py:Class`, `module:Class`, its class, or an object of it.
        task_options: Its options; on the command line and in Python they stand among the others.
    """

    default_task: ClassVar[str] = "mnist"

    task: Any = option(
        None,
        "mnist, mnist-dropout, ffdnet, ffdnet-grey, or your own as file.py:Class or module:Class; "
        "by default that of the run that is named, if any. Its own options are shown with --task "
        "NAME --help.",
    )
    task_options: Mapping[str, Any] = {}

    @abstractmethod
    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        """The runs that are asked for.

        Args:
            root: Folder of all runs, where runs that are named lie.
            say: Takes lines for the user.

        Raises:
            InflError: It cannot be carried out as it was made.
        """

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """A request from options by name; those that it has not are the task's.

        Raises:
            SpecError: A value is of another type or out of range.
        """
        own = {name: value for name, value in given.items() if name in cls.model_fields}
        others = {name: value for name, value in given.items() if name not in own}
        options = {**own.pop("task_options", {}), **others}
        return cls.checked({**own, "task_options": options})
