"""The request for influence scores."""

from typing import TYPE_CHECKING, Literal

from influence_jobs.errors import SpecError
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.s_test.request import LAYERS_THAT_COUNT
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.requests.base import Many, One, Say, option
from influence_jobs.requests.options import (
    SCORES,
    CurvatureOptions,
    QueriesOptions,
    WeightsRequest,
)
from influence_jobs.specs.base import Count, Spec, make_spec

if TYPE_CHECKING:
    from influence_jobs.requests.subject import Subject

# Options that may stand beside `--s-test`, which decides all others.
_BESIDE_S_TESTS = {
    "s_test",
    "checkpoint",
    "combine",
    "relative",
    "keep_layers",
    "per_token",
    "seed",
}


class InfluenceRequest(WeightsRequest, QueriesOptions, CurvatureOptions):
    """Influence of training samples on chosen outputs: positive = helpful, negative = harmful."""

    s_test: Many[str] = option(
        (),
        "An s-test run whose vectors are used. It decides queries, solver and checkpoint. May be "
        "repeated.",
        panel=SCORES,
        metavar="RUN",
    )
    models: One[Count | None] = option(
        None,
        "Average the scores of so many models, which predict retrainings better than one. They "
        "are trained from --seed and the seeds after it; with --checkpoint from its seed and "
        "those after it, and taken at its epoch.",
        panel=SCORES,
    )
    combine: Literal["sum", "mean"] | None = option(
        None,
        "How scores are combined. sum: over checkpoints of a training (TracIn); mean: over "
        "trainings from several seeds (ensemble). By default sum, with --models mean.",
        panel=SCORES,
    )
    relative: Literal["theta", "loss"] | None = option(
        None,
        "Divide each score by the size of the sample's own effect, on the parameters (theta) or "
        "on the training losses (loss), as RelatIF does.",
        panel=SCORES,
    )
    keep_layers: bool = option(False, "Also keep the scores of each layer.", panel=SCORES)
    per_token: bool = option(
        False,
        "Also keep what each token of a training sequence brings to its score: the parts add up to "
        "it.",
        panel=SCORES,
    )
    layer: Many[str | int] = option((), LAYERS_THAT_COUNT)

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        from influence_jobs.requests.queries import tokens_kept
        from influence_jobs.requests.solving import without_bfloat16

        asked, sample_precision = without_bfloat16(self)
        s_tests = asked._found(root) if self.s_test else asked._new(root, say)
        if self.per_token and s_tests[0].queries.noise_draws > 1:
            raise SpecError(
                "--per-token takes one draw of the noise only, because the noise may decide which "
                "tokens count: leave --noise-draws out"
            )
        if self.relative is not None:
            _say_what_is_measured(s_tests[0], say)
        spec = make_spec(
            InfluenceSpec,
            task=s_tests[0].task,
            s_tests=s_tests,
            combine=self.combine or ("sum" if self.models is None else "mean"),
            relative=self.relative,
            keep_modules=self.keep_layers,
            noise_draws=s_tests[0].queries.noise_draws,
            seed=self.seed,
            tokens=tokens_kept(s_tests[0].task, self.seed, say) if self.per_token else None,
            sample_precision=sample_precision,
        )
        return (spec,)

    def _new(self, root: str, say: Say) -> tuple[STestSpec, ...]:
        from influence_jobs.requests.queries import queries_of
        from influence_jobs.requests.solving import s_tests_of
        from influence_jobs.requests.subject import subject_of

        subject = subject_of(self, root, say)
        if self.models is not None:
            first = None if self.checkpoint else self.seed
            subject = _trained_from_seeds(subject, self.models, first)
        queries = queries_of(self, subject.built)
        return s_tests_of(self, subject, queries, say, layers=self.layer, seed=self.seed)

    def _found(self, root: str) -> tuple[STestSpec, ...]:
        """The specs of the runs that `--s-test` names."""
        from influence_jobs.requests.subject import checkpoints_of
        from influence_jobs.store.find import find_run

        if any(self.given(name) for name in type(self).model_fields.keys() - _BESIDE_S_TESTS):
            raise SpecError(
                "--s-test RUN decides the task, the queries and the solver: leave their options out"
            )
        found: list[STestSpec] = []
        for word in self.s_test:
            spec = find_run(root, word).spec
            if not isinstance(spec, STestSpec):
                raise SpecError(f"{spec.run_id} is not an s-test run")
            found.append(spec)
        for word in self.checkpoint:
            for checkpoint in checkpoints_of(word, root):
                if all(checkpoint.identity() != spec.checkpoint.identity() for spec in found):
                    raise SpecError(
                        f"{found[0].run_id} is of another checkpoint than {word}: scores need the "
                        "s_test vectors of their own checkpoint, leave --checkpoint out"
                    )
        return tuple(found)


def _trained_from_seeds(subject: "Subject", count: int, first: int | None) -> "Subject":
    """The subject at its checkpoints of trainings from several seeds.

    Args:
        first: The first seed; None for that of the subject's training.

    Raises:
        SpecError: Its checkpoints are not all of one training that can be repeated.
    """
    from influence_jobs.kinds.train.spec import TrainedCheckpoint
    from influence_jobs.requests.rankings import changed

    found = []
    for checkpoint in subject.checkpoints:
        if not isinstance(checkpoint, TrainedCheckpoint) or not checkpoint.repeatable:
            raise SpecError(
                f"--models trains from other seeds, and it is not known how {checkpoint.words()} "
                "was trained: name a train run with --checkpoint, or leave --models out"
            )
        found.append(checkpoint)
    trains = {checkpoint.train.run_id: checkpoint.train for checkpoint in found}
    if len(trains) > 1:
        raise SpecError(
            "--models trains from other seeds itself: name one train run with --checkpoint, not "
            f"{len(trains)}"
        )
    (train,) = trains.values()
    start = train.seed if first is None else first
    others = [changed(train, seed=start + i) for i in range(count)]
    at = [TrainedCheckpoint(train=t, epoch=c.epoch) for t in others for c in found]
    return subject._replace(checkpoints=tuple(at))


def _say_what_is_measured(s_test: STestSpec, say: Say) -> None:
    """Tell through which layers of s_test vectors no effect of a sample is measured."""
    from influence_jobs.gradients.rules import MatrixRule, nearest_rule
    from influence_jobs.tasks.layers import by_type
    from influence_jobs.tasks.registry import make_task

    model = make_task(s_test.task).model()
    modules = dict(model.named_modules(remove_duplicate=False))
    others = [
        name
        for name in s_test.modules
        if name not in modules or not isinstance(nearest_rule(modules[name]), MatrixRule)
    ]
    if others:
        say(
            f"--relative divides by a sample's effect through {len(s_test.modules) - len(others)} "
            f"of {len(s_test.modules)} layers; these have no Kronecker factors and do not count: "
            f"{by_type(model, others)}"
        )
