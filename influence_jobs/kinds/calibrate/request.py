"""The request for a calibration."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from influence_jobs.errors import SpecError
from influence_jobs.kinds.calibrate.spec import LEAST_SUBSETS, CalibrateSpec, setting_of
from influence_jobs.requests.base import Many, One, Say, option
from influence_jobs.requests.options import (
    CURVATURE,
    EXPERIMENT,
    PRECISION,
    CurvatureOptions,
    QueriesOptions,
    WeightsRequest,
)
from influence_jobs.specs.base import Count, Positive, Spec, make_spec
from influence_jobs.terms import JobPrecision

if TYPE_CHECKING:
    from influence_jobs.kinds.influence.spec import InfluenceSpec
    from influence_jobs.requests.rankings import Trained
    from influence_jobs.requests.subject import Subject
    from influence_jobs.specs.queries import Queries
    from influence_jobs.specs.rankings import Ranking

EPOCH_SHARES = (1 / 16, 1 / 4, 1)  # of the training; early epochs often predict better
DAMPING_FACTORS = (0.1, 1, 3)  # of the lambda that influence takes by default


class CalibrateRequest(WeightsRequest, QueriesOptions):
    """Choose epoch, lambda, solver and number of models of influence by retraining on subsets.

    The setting with the best linear datamodeling score on some random subsets is measured on
    others, beside the ceiling that the agreement of seeds allows.
    """

    epoch: Many[Count] = option(
        (),
        "An epoch whose weights are tried. May be repeated; by default the last, and those after a "
        "fourth and a sixteenth of the training.",
        panel=EXPERIMENT,
    )
    damping: Many[Positive] = option(
        (),
        "A lambda that is tried. May be repeated; by default that of infl submit influence, a "
        "tenth of it and three times it.",
        panel=CURVATURE,
    )
    solver: Many[Literal["cg", "ek-fac", "lissa"]] = option(
        ("cg", "ek-fac"), "A solver that is tried. May be repeated.", panel=CURVATURE
    )
    models: Many[Count] = option(
        (1, 3), "A number of models to average over. May be repeated.", panel=EXPERIMENT
    )
    subsets: One[int] = option(
        24, "Number of random subsets by which the setting is chosen.", panel=EXPERIMENT
    )
    held_out: One[int] = option(
        24, "Number of other subsets on which the chosen setting is measured.", panel=EXPERIMENT
    )
    seeds: One[int] = option(
        2,
        "Number of trainings of each subset; it takes two or more to know the ceiling.",
        panel=EXPERIMENT,
    )
    fraction: One[float] = option(
        0.5, "Share of the training set in each subset.", panel=EXPERIMENT
    )
    curvature_samples: One[int | str | None] = option(
        None,
        "Number of random training samples that the curvature is of, or all; by default as in "
        "infl submit influence.",
        panel=CURVATURE,
    )
    precision: JobPrecision | None = option(
        None, f"{PRECISION} The trainings are as that of --checkpoint.", panel=CURVATURE
    )

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        from influence_jobs.requests.queries import queries_of
        from influence_jobs.requests.rankings import recipe_for_file, trained_of
        from influence_jobs.requests.subject import subject_of

        for name, count in (("subsets", self.subsets), ("held-out", self.held_out)):
            if count < LEAST_SUBSETS:
                raise SpecError(
                    f"--{name} {count} gives too few subsets for a rank correlation: take "
                    f"{LEAST_SUBSETS} or more (24 is usual)"
                )
        if self.seeds < 2:
            raise SpecError(
                f"--seeds {self.seeds}: the ceiling is measured by how well two seeds agree, so "
                "take 2 or more"
            )
        subject = subject_of(self, root, say, retrains=True)
        trained = trained_of(
            subject,
            given=bool(self.checkpoint),
            methods=(),
            recipe=recipe_for_file(subject, self, say),
        )
        if not all(checkpoint.repeatable for checkpoint in subject.checkpoints):
            raise SpecError(
                "a calibration trains from several seeds: name a train run with --checkpoint, or "
                "leave it out"
            )
        queries = queries_of(self, subject.built, default_set=True)
        spec = make_spec(
            CalibrateSpec,
            task=subject.task,
            recipe=trained.train,
            rankings=self._grid(trained, queries, say),
            seeds=tuple(range(self.seeds)),
            fraction=self.fraction,
            own_starts=True,
            choosing=self.subsets,
            held_out=self.held_out,
        )
        return (spec,)

    def _grid(self, trained: "Trained", queries: "Queries", say: Say) -> "tuple[Ranking, ...]":
        """A ranking for each setting; settings of fewer models come first."""
        from influence_jobs.kinds.train.spec import TrainedCheckpoint
        from influence_jobs.requests.rankings import changed, influence_of
        from influence_jobs.specs.rankings import Ranking

        train = trained.train
        epochs = sorted({*self.epoch} or _epochs(train.epochs))
        if epochs[-1] > train.epochs:
            raise SpecError(
                f"--epoch {epochs[-1]}: the training has only {train.epochs} epochs, so choose an "
                "earlier one"
            )
        if not {*epochs} <= {*train.save_epochs}:
            train = changed(train, save_epochs=tuple(epochs))
        counts = sorted({*self.models})
        trains = [changed(train, seed=train.seed + i) for i in range(counts[-1])]
        given = self.curvature_samples
        samples = {} if given is None else {"curvature_samples": given}
        said: set[str] = set()

        def say_once(line: str) -> None:
            if line not in said:
                said.add(line)
                say(line)

        found: dict[int, list[Ranking]] = {count: [] for count in counts}
        for solver in dict.fromkeys(self.solver):
            for epoch in epochs:
                points = [TrainedCheckpoint(train=one, epoch=epoch) for one in trains]
                subjects = [trained.subject._replace(checkpoints=(point,)) for point in points]

                def influences(
                    damping: float | None,
                    solver: str = solver,
                    subjects: "Sequence[Subject]" = subjects,
                ) -> "tuple[InfluenceSpec, ...]":
                    options = CurvatureOptions(
                        solver=solver, damping=damping, precision=self.precision, **samples
                    )
                    return tuple(
                        influence_of(subject, queries, options, say_once, seed=self.seed)
                        for subject in subjects
                    )

                for damping in self.damping or _dampings(influences(None)[0]):
                    scores = influences(damping)
                    for count in counts:
                        ranking = make_spec(Ranking, name="", scores=scores[:count])
                        named = ranking.model_copy(update={"name": setting_of(ranking).words})
                        found[count].append(named)
        return tuple(ranking for count in counts for ranking in found[count])


def _dampings(default: "InfluenceSpec") -> tuple[float | None, ...]:
    """The lambdas that are tried beside that of an influence run; None is chosen by the solver."""
    damping = getattr(default.s_tests[0].solver, "damping", None)
    if damping is None:
        return (None,)
    return tuple(float(f"{factor * damping:.3g}") for factor in DAMPING_FACTORS)


def _epochs(last: int) -> set[int]:
    """The epochs that are tried by default."""
    return {max(1, round(share * last)) for share in EPOCH_SHARES}
