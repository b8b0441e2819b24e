"""Frozen, validated requests. What a spec says decides what is computed; its hash names the run.

Two kinds of things stay out of the hash: where inputs happen to lie (paths), because their content is hashed instead,
and how the work is carried out (workers, batches, shards, devices), because it does not change the result.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from influence_jobs.errors import SpecError

FORMAT = 1  # raise it when the same spec starts to mean other numbers

Option = bool | int | float | str | tuple[str, ...] | None


class Model(BaseModel):
    """A frozen value whose `identity` leaves out the fields named in `locations`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    locations: ClassVar[frozenset[str]] = frozenset()

    def identity(self) -> dict[str, Any]:
        """The part of the value that decides the result, as plain JSON data."""
        return {
            name: _plain(getattr(self, name))
            for name in type(self).model_fields
            if name not in self.locations
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Model):
        return value.identity()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


class TaskSpec(Model):
    """Which task, with which options, on which data.

    Attributes:
        name: A registered task, or `module:Class` for one's own.
        options: Keyword arguments of the task that change what is computed.
        paths: Keyword arguments of the task that say where its data lie on this machine.
        data: Fingerprint of the data found there (`Task.fingerprint`).
    """

    locations = frozenset({"paths"})
    name: str
    options: dict[str, Option] = {}
    paths: dict[str, str] = {}
    data: str

    @property
    def slug(self) -> str:
        """The task's name as it appears in run ids."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.rpartition(":")[2].lower()).strip("-")


class Spec(Model):
    """Base of all job requests."""

    kind: str
    task: TaskSpec

    @property
    def hash(self) -> str:
        """SHA-256 of the identity, in hex."""
        text = json.dumps({"format": FORMAT, **self.identity()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def run_id(self) -> str:
        """Kind, task and the first twelve digits of the hash, e.g. `train-mnist-3f2a91c04d5e`."""
        return f"{self.kind}-{self.task.slug}-{self.hash[:12]}"


M = TypeVar("M", bound=Model)


def make_spec(kind: type[M], **fields: Any) -> M:
    """Build a spec, or a part of one, from a user's values.

    Raises:
        SpecError: A value is out of range; the message names the field.
    """
    try:
        return kind(**fields)
    except ValidationError as error:
        what = f"cannot {kind.model_fields['kind'].default}: " if issubclass(kind, Spec) else ""
        raise SpecError(f"{what}{first_error(error)}") from error


def first_error(error: ValidationError) -> str:
    """The first of pydantic's complaints, as one line."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message
