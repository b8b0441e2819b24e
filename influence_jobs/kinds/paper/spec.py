"""Runs that belong together: the experiments of a section of the research report."""

from typing import Annotated, Literal

from pydantic import Field

from influence_jobs.specs.base import AnySpec, Spec


class PaperSpec(Spec):
    """Runs that belong together.

    Attributes:
        parts: In the order of the research report.
    """

    kind: Literal["paper"] = "paper"
    parts: Annotated[tuple[AnySpec, ...], Field(min_length=1)]
