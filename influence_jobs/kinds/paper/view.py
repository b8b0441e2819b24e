"""The view of a paper run: the figures of its members, numbered as in the research report."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from influence_jobs.kinds import view_of
from influence_jobs.kinds.attribution.spec import AttributionSpec
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.paper.spec import PaperSpec
from influence_jobs.specs.base import Spec
from influence_jobs.store.run import Run
from influence_jobs.tasks.registry import published_of
from influence_jobs.views.base import Say, View
from influence_jobs.views.table import Table

if TYPE_CHECKING:
    from influence_jobs.views.figure import Shown

# Section 4.1: number in the research report of each of our figures.
SECTION_4_1 = {
    "nodes": "4.1",
    "top-attribution": "4.2",
    "top-helpful": "4.3",
    "top-harmful": "4.4",
    "seeds-attribution": "4.5",
    "seeds-helpful": "4.6",
    "seeds-harmful": "4.7",
    "ablation-attribution": "4.8",
    "ablation-helpful": "4.9",
    "ablation-harmful": "4.10",
}


class PaperView(View[PaperSpec]):
    """Shows the members of the set instead of the run itself."""

    writes_report: ClassVar[bool] = True

    @property
    def title(self) -> str:
        return f"The research report's experiments ({self.spec.task.slug})"

    def certainty(self) -> list[str]:
        return []

    def next_step(self) -> str:
        return f"infl view {self.run.id}{self.more}"

    def members(self) -> list[Run]:
        return [Run(self.run.root, member) for member in self.spec.parts]

    def tables(self) -> list[Table]:
        return [table for member in self.members() for table in view_of(member).tables()]

    def member_figures(self, member: View[Any], say: Say) -> "list[Shown]":
        return [
            replace(shown, number=_number(member.spec, shown.name)) for shown in member.figures(say)
        ]


def _number(spec: Spec, name: str) -> str | None:
    """The number in the research report of a figure; None if it is not in there."""
    from influence_jobs.views.figure import file_name

    published = published_of(spec.task)
    if published is None or published.section != "4.2":
        return SECTION_4_1.get(name)
    layer = published.settled_layer
    if isinstance(spec, AttributionSpec):
        if spec.exclude_norm_above is not None:
            return "4.14"
        if not spec.normalize:
            return "4.11"
        return "4.15" if spec.layers == (layer,) else "4.16"
    if isinstance(spec, InfluenceSpec):
        return "4.12"
    return "4.13" if name == f"norms-{file_name(str(layer))}" else None
