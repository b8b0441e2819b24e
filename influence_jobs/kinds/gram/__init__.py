"""Second moments of stored projected gradients."""

from influence_jobs.kinds.base import Kind
from influence_jobs.kinds.gram.spec import GramSpec

KIND = Kind(
    __name__,
    GramSpec,
    panel="Norms and scores",
    request="GramRequest",
    job="GramJob",
    view="GramView",
)
