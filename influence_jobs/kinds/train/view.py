"""The view of a training."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from influence_jobs.kinds.train.spec import TrainedCheckpoint, TrainSpec
from influence_jobs.tasks.registry import published_of
from influence_jobs.views.base import Say
from influence_jobs.views.norms import NormsView, StoredNorms

if TYPE_CHECKING:
    from influence_jobs.views.figure import Shown


class TrainView(NormsView[TrainSpec]):
    """The measurements after each epoch, and the recorded norms."""

    @property
    def title(self) -> str:
        seed = f": seed {self.spec.seed}" if self.spec.seed else ""
        return f"Training ({self.spec.task.slug}){seed}"

    def certainty(self) -> list[str]:
        said = (
            f"One training, from seed {self.spec.seed}; infl submit stability measures what "
            "another seed changes."
        )
        return [said]

    def next_step(self) -> str:
        if self.spec.norm_layers:
            return f"infl top {self.run.id}{self.more}"
        return f"infl submit grad-norms --layer all --checkpoint {self.run.id}{self.more}"

    def figures(self, say: Say) -> "Iterator[Shown]":
        yield self._epochs()
        yield from self.histograms()
        yield from self.nodes(say)

    def outliers_above(self) -> float | None:
        published = published_of(self.spec.task)
        return published.norm_limit if published else None

    @property
    def stored_norms(self) -> StoredNorms | None:
        layers = self.spec.norm_layers
        if not layers or self.spec.norm_reduction == "layer":
            return None
        last = TrainedCheckpoint(train=self.spec, epoch=self.spec.epochs)
        return StoredNorms(self.run, last, layers, layers[-1:], self.spec.task)

    def _epochs(self) -> "Shown":
        from influence_jobs.views.curves import epoch_panels
        from influence_jobs.views.figure import Shown

        metrics = self.run.read_table("metrics")
        last = metrics.to_pylist()[-1]
        said = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in last.items() if k != "epoch")
        return Shown(
            "training",
            "Measurements after each epoch",
            f"After epoch {last['epoch']}: {said}.",
            metrics,
            panels=epoch_panels(metrics.to_pylist()),
        )
