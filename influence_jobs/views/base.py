"""What people see of a run. Each kind has a view of its own; this is what all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from influence_jobs.errors import DataError, SpecError
from influence_jobs.specs.base import Spec
from influence_jobs.store.folder import for_runs
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.registry import make_task
from influence_jobs.views.table import Table

if TYPE_CHECKING:  # matplotlib takes a second: only figures need it
    from influence_jobs.views.contact_sheet import Row
    from influence_jobs.views.figure import Shown
    from influence_jobs.views.norms import StoredNorms

S = TypeVar("S", bound=Spec)
RankedRow = Mapping[str, Any]
Say = Callable[[str], None]


class View(ABC, Generic[S]):
    """What people see of a finished run, read from its folder and from the task's pictures.

    Args:
        run: The run.

    Attributes:
        ranks: What it ranks samples by: "scores" of queries, "norms" of layers, another name for
            one number a sample, or nothing.
        writes_report: `infl submit` ends with its report.
    """

    ranks: ClassVar[str] = ""
    writes_report: ClassVar[bool] = False

    def __init__(self, run: Run):
        self.run = run
        self.spec: S = run.spec  # type: ignore[assignment]

    @cached_property
    def task(self) -> Task:
        """The task, with its data."""
        return make_task(self.run.spec.task)

    @property
    @abstractmethod
    def title(self) -> str:
        """What the run is, in a few words."""

    @abstractmethod
    def certainty(self) -> list[str]:
        """How sure its result is, a sentence each."""

    @abstractmethod
    def next_step(self) -> str:
        """The command to go on with."""

    def tables(self) -> list[Table]:
        """Its tables for people."""
        return []

    def figures(self, say: Say) -> "Iterator[Shown]":
        """Its figures; `say` is told in a line what cannot be shown, and why."""
        return iter(())

    def parts(self) -> list[Run]:
        """The runs that are shown in its place: itself, unless it is a set of runs."""
        return [self.run]

    def part_figures(self, part: "View[Any]", say: Say) -> "list[Shown]":
        """The figures of one of its parts, as they are numbered there."""
        return list(part.figures(say))

    @property
    def sides(self) -> dict[str, bool]:
        """The ends of its ranking: what they are called, and whether that end is the largest."""
        return {}

    def top(
        self,
        k: int,
        *,
        layer: str | None = None,
        tests: Sequence[int] | None = None,
        side: str = "both",
        channel: int | None = None,
    ) -> dict[str, list[dict[str, Any]]]:
        """The k samples that come first, by array.

        Args:
            layer: Of this layer only.
            tests: Of scores, only queries of these test samples.
            side: Of influence, the largest scores, the smallest, or both.
            channel: Of norms, by this channel's norm.

        Raises:
            SpecError: It ranks no samples, or one of the arguments does not fit.
        """
        raise SpecError(f"{self.run.id} ranks no samples: infl report {self.run.id}{self.more}")

    @property
    def stored_norms(self) -> "StoredNorms | None":
        """The norms, one a channel, that it has or was made of."""
        return None

    @property
    def more(self) -> str:
        """What a suggested command needs to find the run's folder."""
        return for_runs(self.run.root)

    @property
    def has_classes(self) -> bool:
        """Labels are classes, so that one is the same as another or not."""
        return self.task.output_loss == "cross-entropy"

    def pictures(
        self,
        make: "Callable[[Task, Sequence[RankedRow]], Sequence[Row]]",
        ranked: Sequence[RankedRow],
        say: Say,
    ) -> "Sequence[Row]":
        """Rows of pictures of ranked samples, or none where the task's data are not here."""
        try:
            return make(self.task, ranked)
        except DataError as error:
            say(f"{self.run.id}: no pictures: {error}")
            return ()
