"""The request for influence scores."""

from typing import Literal

from influence_jobs.errors import SpecError
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.s_test.request import LAYERS_THAT_COUNT
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.requests.base import Many, Say, option
from influence_jobs.requests.options import (
    SCORES,
    CurvatureOptions,
    QueriesOptions,
    WeightsRequest,
)
from influence_jobs.specs.base import Spec, make_spec

# Options that may stand beside `--s-test`, which decides all others.
_BESIDE_S_TESTS = {"s_test", "checkpoint", "combine", "relative", "keep_layers", "seed"}


class InfluenceRequest(WeightsRequest, QueriesOptions, CurvatureOptions):
    """Influence of training samples on chosen outputs: positive = helpful, negative = harmful."""

    s_test: Many[str] = option(
        (),
        "s-test run to take s_test vectors from; queries, solver and checkpoint are the run's. "
        "May be repeated.",
        panel=SCORES,
        metavar="RUN",
    )
    combine: Literal["sum", "mean"] = option(
        "sum",
        "How to combine scores: sum over checkpoints (TracIn), or mean over trainings from several "
        "seeds (ensemble).",
        panel=SCORES,
    )
    relative: Literal["theta", "loss"] | None = option(
        None,
        "Divide the scores by the size of each sample's effect on the parameters (theta) or on the "
        "training losses (loss), as RelatIF does.",
        panel=SCORES,
    )
    keep_layers: bool = option(False, "Also keep the scores of each layer.", panel=SCORES)
    layer: Many[str | int] = option((), LAYERS_THAT_COUNT)

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        s_tests = self._found(root) if self.s_test else self._new(root, say)
        if self.relative is not None:
            _say_what_is_measured(s_tests[0], say)
        spec = make_spec(
            InfluenceSpec,
            task=s_tests[0].task,
            s_tests=s_tests,
            combine=self.combine,
            relative=self.relative,
            keep_modules=self.keep_layers,
            noise_draws=s_tests[0].queries.noise_draws,
            seed=self.seed,
        )
        return (spec,)

    def _new(self, root: str, say: Say) -> tuple[STestSpec, ...]:
        from influence_jobs.requests.queries import queries_of
        from influence_jobs.requests.solving import s_tests_of
        from influence_jobs.requests.subject import subject_of

        subject = subject_of(self, root, say)
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
            "--relative divides by a sample's effect through "
            f"{len(s_test.modules) - len(others)} of {len(s_test.modules)} layers; without "
            f"factors, so not through: {by_type(model, others)}"
        )
