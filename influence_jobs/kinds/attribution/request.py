"""The request for attribution scores."""

from collections.abc import Sequence

from influence_jobs.errors import SpecError
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.kinds.train.spec import Checkpoint, TrainedCheckpoint, TrainSpec
from influence_jobs.requests.base import Many, One, Say, option
from influence_jobs.requests.options import LAYER, SCORES, QueriesOptions, WeightsRequest
from influence_jobs.specs.base import Positive, Spec
from influence_jobs.specs.norms import NormsSpec


class AttributionRequest(WeightsRequest, QueriesOptions):
    """Attribution: activations of chosen outputs times the training samples' gradient norms.

    By default the layers are all hidden ones, that is all with weights but the last.
    """

    norms: One[str | None] = option(
        None,
        "Run that has the gradient norms: a grad-norms run, or a train run that recorded them. "
        "By default they are computed at the checkpoint first.",
        panel=SCORES,
        metavar="RUN",
    )
    exclude_norm_above: One[Positive | None] = option(
        None, "Leave out samples whose gradient norms sum to more than this.", panel=SCORES
    )
    normalize: bool = option(
        False, "Divide each sample's gradient norms by their sum.", panel=SCORES
    )
    keep_layers: bool = option(False, "Also keep the scores of each layer.", panel=SCORES)
    layer: Many[str | int] = option((), LAYER)

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        from influence_jobs.requests.queries import queries_of
        from influence_jobs.requests.rankings import attribution_of, hidden_layers, replayed_norms
        from influence_jobs.requests.subject import subject_of
        from influence_jobs.tasks.layers import resolve_weights

        source = self._source(root)
        at = _weights_of(source) if source is not None else ()
        subject = subject_of(self, root, say, default_checkpoints=at)
        if self.given("quantity"):
            raise SpecError(
                "attribution explains activations, not a quantity: leave --quantity out"
            )
        if len(subject.checkpoints) != 1:
            raise SpecError(
                "attribution takes the activations of exactly one checkpoint: name one with "
                "--checkpoint"
            )
        queries = queries_of(self, subject.built)
        if self.layer:
            layers = resolve_weights(self.layer, subject.built, say)
            modules = dict(subject.built.model().named_modules())
            for layer in layers:
                if layer not in modules:
                    raise SpecError(
                        f"attribution needs layers with outputs, and '{layer}' is a parameter: "
                        "leave it out"
                    )
        elif source is None:
            layers = hidden_layers(subject.built)
        else:
            layers = source.layers_with_norms
        spec = attribution_of(
            subject,
            source or replayed_norms(subject, layers, seed=self.seed),
            queries,
            layers,
            exclude_norm_above=self.exclude_norm_above,
            normalize=self.normalize,
            keep_layers=self.keep_layers,
        )
        return (spec,)

    def _source(self, root: str) -> NormsSpec | None:
        """The spec of the run that `--norms` names."""
        from influence_jobs.store.find import find_run

        if self.norms is None:
            return None
        source = find_run(root, self.norms).spec
        if not isinstance(source, NormsSpec):
            raise SpecError(
                f"{source.run_id} has no gradient norms: name a grad-norms or train run"
            )
        if not source.layers_with_norms:
            raise SpecError(f"{source.run_id} recorded no gradient norms: leave --norms out")
        return source


def _weights_of(source: NormsSpec) -> Sequence[Checkpoint]:
    """The last weights that the norms were taken at; a sum keeps no order of its checkpoints."""
    if isinstance(source, TrainSpec):
        return (TrainedCheckpoint(train=source, epoch=source.epochs),)
    assert isinstance(source, GradNormsSpec)
    checkpoints = source.checkpoints
    trained = [c for c in checkpoints if isinstance(c, TrainedCheckpoint)]
    if len(checkpoints) == 1:
        return checkpoints
    if len(trained) < len(checkpoints) or len({c.train.run_id for c in trained}) > 1:
        raise SpecError("the norms are of several trainings: name one with --checkpoint")
    return (max(trained, key=lambda checkpoint: checkpoint.epoch),)
