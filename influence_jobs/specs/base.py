"""Frozen, validated specs. A spec decides what is computed, and its hash names the run.

Two things stay out of the hash. Paths do, because the content of the inputs is hashed instead. So
do workers, batches, shards and devices, because they do not change the result.
"""

import hashlib
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
)
from pydantic.fields import FieldInfo

from influence_jobs.errors import SpecError, StoreError
from influence_jobs.specs.format_1 import ALWAYS_HASHED
from influence_jobs.terms import html_table, in_a_line

MANY = 12  # a list in words shows at most so many items
FORMAT = 1  # raise it when the same spec starts to give other numbers

Option = bool | int | float | str | tuple[str, ...] | None
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class Model(BaseModel):
    """A frozen value with an `identity` that is hashed.

    The identity leaves out the fields named in `locations`. It also leaves out fields at their
    default, so that a new field changes no run id. Only the fields of the first format are always
    in it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    locations: ClassVar[frozenset[str]] = frozenset()

    def identity(self) -> dict[str, Any]:
        """The fields that decide the result, as plain JSON data."""
        always = {
            name for base in type(self).__mro__ for name in ALWAYS_HASHED.get(base.__name__, ())
        }
        return {
            name: _plain(value)
            for name, field in type(self).model_fields.items()
            if name not in self.locations
            and ((value := getattr(self, name)) != _default(field) or name in always)
        }

    def words(self) -> str:
        """The value in one line for people."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        name = fields.pop("name", None)
        said = [f"{k.replace('_', ' ')} {in_words(v)}" for k, v in fields.items() if v is not None]
        return f"{name}: {', '.join(said)}" if name and said else name or ", ".join(said)


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True, validated_data={})


def in_words(value: Any) -> str:
    """A field's value in one line for people."""
    if isinstance(value, Model):
        return value.words()
    if isinstance(value, tuple):
        return listed([in_words(item) for item in value])
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def listed(items: Sequence[str]) -> str:
    """Several values in one line; a long list is cut short."""
    more = f" and {len(items) - MANY} more" if len(items) > MANY else ""
    between = "; " if any("," in item for item in items) else ", "
    return between.join(items[:MANY]) + more


def _plain(value: Any) -> Any:
    if isinstance(value, Model):
        return value.identity()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


class TaskSpec(Model):
    """A task with its options and data.

    Attributes:
        name: A registered task, or `module:Class` for the user's own.
        options: Keyword arguments of the task that change what is computed.
            paths: Keyword arguments of the task that say where its data lie on this machine.
        data: Fingerprint of the data found there (`Task.fingerprint`).
        code: Fingerprint of the user's own code (`tasks.fingerprints`); empty for tasks of ours.
        folder: Where on this machine the task's module is imported from; empty if it is installed.
    """

    locations = frozenset({"paths", "folder"})
    name: str
    options: dict[str, Option] = {}
    paths: dict[str, str] = {}
    data: str
    code: str = ""
    folder: str = ""

    @property
    def slug(self) -> str:
        """The task's name as it appears in run ids."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.rpartition(":")[2].lower()).strip("-")


class Spec(Model):
    """Base of all specs. The default of its field `kind` names a subclass."""

    kind: str
    task: TaskSpec
    _by_kind: ClassVar[dict[str, type["Spec"]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        kind = cls.model_fields["kind"].default
        if isinstance(kind, str):
            Spec._by_kind[kind] = cls

    @property
    def hash(self) -> str:
        """SHA-256 of the identity, in hex."""
        text = json.dumps({"format": FORMAT, **self.identity()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def run_id(self) -> str:
        """Kind, task and the first twelve digits of the hash, e.g. `train-mnist-3f2a91c04d5e`."""
        return f"{self.kind}-{self.task.slug}-{self.hash[:12]}"

    @property
    def unsaid(self) -> frozenset[str]:
        """Fields without a meaning beside the others, which pages leave out."""
        return frozenset()

    def words(self) -> str:
        return self.run_id

    def request_in_words(self) -> list[tuple[str, str]]:
        """The request as pairs of name and value: the task, the queries, and the rest."""
        options = ", ".join(f"{name} {value}" for name, value in self.task.options.items() if value)
        named = f"{self.task.name}{f' ({options})' if options else ''}"
        lines = [("task", named), ("data", self.task.data)]
        if (queries := getattr(self, "queries", None)) is not None:  # of this run or of its inputs
            lines.append(("queries", in_words(queries)))
        for name in type(self).model_fields:
            value = getattr(self, name)
            hidden = name in ("kind", "task", "queries") or name in self.unsaid
            if not hidden and value is not None and value != ():
                lines.append((name.replace("_", " "), in_words(value)))
        return lines

    def __str__(self) -> str:
        lines = [("run", self.run_id), *self.request_in_words()]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {in_a_line(value)}" for name, value in lines)

    def _repr_html_(self) -> str:
        return html_table([("run", self.run_id), *self.request_in_words()])


def spec_of(value: Any) -> Any:
    """Turn plain data into the spec that its `kind` names; leave any other value to pydantic.

    Raises:
        ValueError: No kind has this name.
    """
    if not isinstance(value, Mapping):
        return value
    importlib.import_module("influence_jobs.kinds").kinds()  # late: kinds import this module
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in Spec._by_kind:
        raise ValueError(f"there is no kind of run {kind!r}; there are {', '.join(Spec._by_kind)}")
    return Spec._by_kind[kind].model_validate(value)


#: A spec of any kind.
AnySpec = Annotated[SerializeAsAny[Spec], BeforeValidator(spec_of)]
_ANY_SPEC: TypeAdapter[Spec] = TypeAdapter(AnySpec)


def parse_spec(text: bytes | str, where: str) -> Spec:
    """Read a spec from JSON.

    Args:
        where: Name of the text in the error message.

    Raises:
        StoreError: The text is not a valid spec.
    """
    try:
        return _ANY_SPEC.validate_json(text)
    except ValidationError as error:
        raise StoreError(f"{where} is not a readable spec: {first_error(error)}") from error


M = TypeVar("M", bound=Model)


def make_spec(kind: type[M], **fields: Any) -> M:
    """Build a spec, or a value inside one, from a user's values.

    Raises:
        SpecError: A value is out of range; the message names the field.
    """
    try:
        return kind(**fields)
    except ValidationError as error:
        what = f"cannot {kind.model_fields['kind'].default}: " if issubclass(kind, Spec) else ""
        raise SpecError(f"{what}{first_error(error)}") from error


def first_error(error: ValidationError) -> str:
    """The first error of a validation, in one line."""
    # Without the input: it may be long, and errors of many inputs take long to make.
    first = error.errors(include_input=False, include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return in_a_line(f"{field}: {message}" if field else message)
