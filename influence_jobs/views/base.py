"""The base of views. A view shows a run to people; each kind of run has its own."""

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

if TYPE_CHECKING:  # matplotlib takes a second to load, and only figures need it
    from influence_jobs.views.contact_sheet import Row
    from influence_jobs.views.figure import Shown
    from influence_jobs.views.norms import StoredNorms

S = TypeVar("S", bound=Spec)
RankedRow = Mapping[str, Any]
Say = Callable[[str], None]


class View(ABC, Generic[S]):
    """Shows a finished run. It reads the run's folder and the task's pictures.

    Args:
        run: The run.

    Attributes:
        ranks: What samples are ranked by: "scores" of queries, "norms" of layers, another name for
            one number a sample, or "" for no ranking.
        writes_report: Whether `infl submit` writes the report of the run at the end.
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
        """A few words that describe the run."""

    @abstractmethod
    def certainty(self) -> list[str]:
        """How certain the result is, as a list of sentences."""

    @abstractmethod
    def next_step(self) -> str:
        """The command that the user may want next."""

    def tables(self) -> list[Table]:
        """The tables to show."""
        return []

    def figures(self, say: Say) -> "Iterator[Shown]":
        """The figures. `say` takes a line for each figure that cannot be shown, with the reason."""
        return iter(())

    def members(self) -> list[Run]:
        """The runs to show: the members of a set of runs, or the run itself."""
        return [self.run]

    def member_figures(self, member: "View[Any]", say: Say) -> "list[Shown]":
        """The figures of a member, with the numbers that they have in this set."""
        return list(member.figures(say))

    @property
    def sides(self) -> dict[str, bool]:
        """The sides of the ranking by name, each with whether its largest values come first."""
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
        """The top k samples, by array.

        Args:
            layer: Only this layer.
            tests: Only queries of these test samples (scores only).
            side: "helpful" for the largest scores, "harmful" for the smallest, or "both".
            channel: Rank by the norm of this channel (norms only).

        Raises:
            SpecError: The run ranks no samples, or an argument does not fit it.
        """
        raise SpecError(
            f"{self.run.id} ranks no samples: infl report {self.run.id}{self.more} shows its "
            "results"
        )

    def numbers_of(self, sample: int) -> list[tuple[str, float]]:
        """What the run says of a training sample alone: names and numbers."""
        return []

    @property
    def stored_norms(self) -> "StoredNorms | None":
        """The norms of channels that the run has or was computed from; None if it has none."""
        return None

    @property
    def more(self) -> str:
        """The option that a suggested command needs to find the run's folder."""
        return for_runs(self.run.root)

    @property
    def has_classes(self) -> bool:
        """Whether labels are classes, which can be compared."""
        return bool(self.task.output_loss == "cross-entropy")

    def pictures(
        self,
        make: "Callable[[Task, Sequence[RankedRow]], Sequence[Row]]",
        ranked: Sequence[RankedRow],
        say: Say,
    ) -> "Sequence[Row]":
        """Rows of pictures of ranked samples; none if the task's data are missing here."""
        try:
            return make(self.task, ranked)
        except DataError as error:
            say(f"{self.run.id}: no pictures: {error}")
            return ()
