"""The view of attribution scores."""

from dataclasses import replace

from influence_jobs.kinds import view_of
from influence_jobs.kinds.attribution.spec import AttributionSpec
from influence_jobs.store.run import Run
from influence_jobs.views.norms import StoredNorms
from influence_jobs.views.scores import ScoresView


class AttributionView(ScoresView[AttributionSpec]):
    """The samples with the largest products of norms and each query's activations."""

    @property
    def method(self) -> str:
        spec = self.spec
        words = f"attribution at {', '.join(spec.layers)}"
        if spec.normalize:
            words += ", norms divided by their sum"
        if spec.exclude_norm_above is not None:
            words += f", without samples of a norm above {spec.exclude_norm_above:g}"
        return words

    def certainty(self) -> list[str]:
        return []

    @property
    def stored_norms(self) -> StoredNorms | None:
        source = view_of(Run(self.run.root, self.spec.norms)).stored_norms
        if source is None:
            return None
        queries = self.spec.queries
        return replace(
            source,
            checkpoint=self.spec.checkpoint,
            chosen=self.spec.layers,
            task=self.spec.task,
            seed=queries.seed,
            noise_draws=queries.noise_draws,
            normalize=self.spec.normalize,
            exclude_norm_above=self.spec.exclude_norm_above,
        )
