"""A set of runs: the experiments of one section of the research report."""

from typing import Annotated, Literal

from pydantic import Field

from influence_jobs.specs.base import AnySpec, Spec


class PaperSpec(Spec):
    """A set of runs.

    Attributes:
        parts: The runs of the set, in the order of the research report.
    """

    kind: Literal["paper"] = "paper"
    parts: Annotated[tuple[AnySpec, ...], Field(min_length=1)]
