"""The request for self-influence."""

from influence_jobs.kinds.self_influence.spec import SelfInfluenceSpec, SelfSolver
from influence_jobs.requests.base import Many, Say, option
from influence_jobs.requests.options import (
    CURVATURE,
    DampingOptions,
    SeedOptions,
    WeightsRequest,
)
from influence_jobs.specs.base import Spec, make_spec


class SelfInfluenceRequest(WeightsRequest, SeedOptions, DampingOptions):
    """Self-influence of every training sample: N x the predicted rise of its own loss without it.

    Large values are of samples that the model fits only because it has seen them: rare and
    mislabelled ones. `infl suspects` lists likely label errors. Each checkpoint has a run of its
    own.
    """

    layer: Many[str | int] = option(
        (),
        "Layer whose parameters are used: number (from 1, in forward order), module name, pattern "
        "such as '*lora*', or all: all that have a number. May be repeated; by default every layer "
        "that has Kronecker factors.",
    )
    solver: SelfSolver = option(
        "ek-fac",
        "ek-fac: eigenvalue-corrected Kronecker factors of the curvature; identity: no curvature, "
        "the squared norm of the sample's gradient.",
        panel=CURVATURE,
    )

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        from influence_jobs.requests.solving import (
            factored_modules,
            full_precision,
            self_solvers_of,
        )
        from influence_jobs.requests.subject import subject_of

        subject = subject_of(self, root, say)
        modules = factored_modules(subject.built, self.layer, say)
        curvature, solvers = self_solvers_of(self, subject, say)
        precision = full_precision(self.precision, subject.built)
        return tuple(
            make_spec(
                SelfInfluenceSpec,
                task=subject.task,
                checkpoint=checkpoint,
                modules=modules,
                curvature=curvature,
                solver=solver,
                precision=precision,
                seed=self.seed,
            )
            for checkpoint, solver in zip(subject.checkpoints, solvers, strict=True)
        )
