"""The experiments of the research report, as a set of runs."""

from influence_jobs.kinds.base import Kind
from influence_jobs.kinds.paper.spec import PaperSpec

KIND = Kind(
    __name__,
    PaperSpec,
    panel="Experiments",
    request="PaperRequest",
    job="PaperJob",
    view="PaperView",
)
