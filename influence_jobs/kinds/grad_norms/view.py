"""The view of replayed gradient norms."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.views.base import Say
from influence_jobs.views.norms import NormsView, StoredNorms

if TYPE_CHECKING:
    from influence_jobs.views.figure import Shown


class GradNormsView(NormsView[GradNormsSpec]):
    """Histograms of the norms, and the samples with the largest norms."""

    @property
    def title(self) -> str:
        seed = f": seed {self.spec.seed}" if self.spec.seed else ""
        return f"Gradient norms ({self.spec.task.slug}){seed}"

    def certainty(self) -> list[str]:
        said = (
            f"Computed in {self.spec.precision} and compared with plain autograd on samples "
            "from all over before the first batch."
        )
        return [said]

    def next_step(self) -> str:
        return f"infl top {self.run.id}{self.more}"

    def figures(self, say: Say) -> "Iterator[Shown]":
        yield from self.histograms()
        yield from self.largest(say)
        yield from self.nodes(say)

    @property
    def stored_norms(self) -> StoredNorms | None:
        spec = self.spec
        if spec.reduction == "layer":
            return None
        return StoredNorms(self.run, spec.checkpoints[-1], spec.layers, spec.layers[-1:], spec.task)
