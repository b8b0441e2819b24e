"""A request: the options that a user sets, the same on the command line and in Python.

This module and the `request` modules of the kinds load without torch, so that `--help` is fast.
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
    """Results as their run id, a path as text, a NumPy value as a Python one."""
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
    """A field that is an option: `--like-this` on the command line, `like_this` in Python.

    Args:
        default: Value if the option is not given; `...` if it is required.
        help: Help text, a sentence or two.
        panel: Heading under which the command line lists the option.
        metavar: Placeholder of the value in the help.
        limits: Bounds for pydantic's `Field`: ge, gt, le, lt.
    """
    return Field(
        default, description=help, json_schema_extra={"panel": panel, "metavar": metavar}, **limits
    )


class Options(BaseModel):
    """A group of options; a request inherits several groups."""

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
        """Whether an option differs from its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)


class Request(Options, ABC):
    """A user's options for one kind of run.

    Attributes:
        default_task: The task if neither a task nor a training is named.
        task: Its name, `file.py:Class`, `module:Class`, its class, or an object of it.
        task_options: Its options; on the command line and in Python they stand among the others.
    """

    default_task: ClassVar[str] = "mnist"

    task: Any = option(
        None,
        "mnist, mnist-dropout, mnist-lds, ffdnet, ffdnet-grey, ffdnet-small, or your own as "
        "file.py:Class or module:Class; by default the task of the run that another option names. "
        "--task NAME --help shows the task's own options.",
    )
    task_options: Mapping[str, Any] = {}

    @abstractmethod
    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        """The specs of the requested runs.

        Args:
            root: Folder of all runs; named runs are looked up there.
            say: Takes lines for the user.

        Raises:
            InflError: The request cannot be carried out as it stands.
        """

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """A request from options by name; unknown names are taken for options of the task.

        Raises:
            SpecError: A value is of another type or out of range.
        """
        own = {name: value for name, value in given.items() if name in cls.model_fields}
        others = {name: value for name, value in given.items() if name not in own}
        options = {**own.pop("task_options", {}), **others}
        return cls.checked({**own, "task_options": options})
