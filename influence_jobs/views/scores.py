"""The view of scores of every (query, training sample)."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pyarrow as pa

from influence_jobs.errors import SpecError
from influence_jobs.specs.scores import ScoresSpec
from influence_jobs.store.layout import SCORES, part_name
from influence_jobs.tasks.layers import layers_of_run
from influence_jobs.views.base import RankedRow, Say, View
from influence_jobs.views.norms import MAX_ROWS, PER_ROW
from influence_jobs.views.ranking import NothingLeft, by_query, ranked_scores

if TYPE_CHECKING:
    from influence_jobs.views.figure import Shown

S = TypeVar("S", bound=ScoresSpec)


class ScoresView(View[S]):
    """Shows the top samples of each query."""

    ranks: ClassVar[str] = "scores"

    @property
    @abstractmethod
    def method(self) -> str:
        """The scoring method in words."""

    @property
    def title(self) -> str:
        return f"{self.method[0].upper()}{self.method[1:]} ({self.spec.task.slug})"

    @property
    def sides(self) -> dict[str, bool]:
        return {self.spec.kind: True}

    def ranking(self, side: str) -> str:
        """One side of the ranking, in words."""
        return f"{self.method}{f': {side}' if len(self.sides) > 1 else ''}"

    def next_step(self) -> str:
        return f"infl top {self.run.id}{self.more}"

    def top(
        self,
        k: int,
        *,
        layer: str | None = None,
        tests: Sequence[int] | None = None,
        side: str = "both",
        channel: int | None = None,
    ) -> dict[str, list[dict[str, Any]]]:
        if channel is not None:
            raise SpecError(
                f"{self.run.id} has scores, which have no channels: leave --channel out"
            )
        if side != "both" and len(self.sides) == 1:
            raise SpecError(f"--side has no meaning for {self.run.id}: leave it out")
        if layer is not None:
            kept = [
                name.removeprefix("parts/")
                for name in self.run.array_names()
                if name.startswith("parts/")
            ]
            meant = layers_of_run(layer, kept, self.task) if kept else []
            if len(meant) > 1:
                raise SpecError(
                    f"--layer {layer} is of {len(meant)} layers: name one of {', '.join(meant)}"
                )
            layer = meant[0] if meant else layer
        rows = ranked_scores(self.run, k, layer=layer, tests=tests, side=side, sides=self.sides)
        return {SCORES if layer is None else part_name(layer): rows}

    def figures(self, say: Say) -> "Iterator[Shown]":
        from influence_jobs.views.figure import Shown, file_name
        from influence_jobs.views.sheets import score_rows, token_scores_of

        tokens = token_scores_of(self.run)
        try:
            ranked = ranked_scores(self.run, PER_ROW, sides=self.sides)
        except NothingLeft as error:
            say(f"{self.run.id}: nothing to show: {error}")
            return
        queries = self.run.read_table("queries").to_pylist()
        for side in self.sides:
            of_side = [row for row in ranked if row["side"] == side]
            make = partial(score_rows, tokens=tokens)
            if pictures := self.pictures(make, of_first(of_side, MAX_ROWS), say):
                drawn = any(row.query and row.query.picture is not None for row in pictures)
                seen = scores_seen(of_side, queries, classes=self.has_classes, drawn=drawn)
                if not any(row.query and row.query.kind for row in pictures):
                    seen += f" {type(self.task).__name__} defines no show_test()."
                yield Shown(
                    f"top-{file_name(side)}",
                    f"Top {PER_ROW} by {self.ranking(side)}",
                    seen,
                    pa.Table.from_pylist(of_side),
                    rows=pictures,
                )


def influence_sides(quantity: str) -> dict[str, bool]:
    """The sides of a ranking by influence, each with whether its largest scores come first."""
    if quantity == "loss":
        return {"helpful": True, "harmful": False}
    return {"lowers it": True, "raises it": False}


def of_first(ranked: Sequence[RankedRow], count: int) -> list[RankedRow]:
    """The rows of the first `count` queries."""
    return [row for rows in list(by_query(ranked).values())[:count] for row in rows]


def scores_seen(
    ranked: Sequence[RankedRow],
    queries: Sequence[Mapping[str, Any]],
    *,
    classes: bool,
    drawn: bool = True,
) -> str:
    """The caption of a figure of top samples.

    Args:
        ranked: Rows of `ranked_scores`, of one side.
        queries: Rows of the run's table of queries.
        classes: Whether labels are classes, which can be compared.
        drawn: Whether queries have pictures, in which a point or region is marked.
    """
    different = len({row["sample"] for row in ranked})
    said = f"Places: {len(ranked)}, different samples in them: {different}."
    if classes and "label" in ranked[0] and "label" in queries[0]:
        labels = {(query["test"], query["region"]): query["label"] for query in queries}
        matching = sum(row["label"] == labels[row["test"], row.get("region")] for row in ranked)
        said += f" Places with the label of their query (green frame): {matching}."
    if drawn and any(row.get("region") for row in ranked):
        said += " The mark shows the explained point or region."
    if (count := len(by_query(ranked))) > MAX_ROWS:
        said += f" Only the first {MAX_ROWS} of {count} queries are drawn; the data have all."
    return said
