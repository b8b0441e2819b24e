"""The request for exact influence through a training."""

from influence_jobs.errors import SpecError
from influence_jobs.kinds.train.spec import TrainedCheckpoint
from influence_jobs.kinds.unrolled.spec import UnrolledSpec
from influence_jobs.requests.base import Say, option
from influence_jobs.requests.options import SCORES, QueriesOptions, WeightsRequest
from influence_jobs.specs.base import Spec, make_spec
from influence_jobs.terms import JobPrecision


class UnrolledRequest(WeightsRequest, QueriesOptions):
    """What this very run would have given without each sample, by going back through its steps.

    Exact derivatives for one training, its seed and order included; influence asks what other
    trainings would give. It costs about three trainings, and two more for each query. Each
    checkpoint has a run of its own.
    """

    precision: JobPrecision | None = option(
        None,
        "Precision of the derivatives and of the scores, float32 or float64; by default float64 "
        "for a model that is built in it, else float32. The steps of the training are as they "
        "were.",
        panel=SCORES,
    )

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        import torch

        from influence_jobs.jobs.recipe import recipe_of
        from influence_jobs.requests.queries import queries_of
        from influence_jobs.requests.solving import full_precision
        from influence_jobs.requests.subject import subject_of
        from influence_jobs.training.train import Trainer
        from influence_jobs.training.trajectory import reversible

        subject = subject_of(self, root, say)
        queries = queries_of(self, subject.built)
        precision = full_precision(self.precision, subject.built)
        if precision == "tf32":
            raise SpecError(
                "--precision tf32: unrolled computes exact derivatives, and each step would add "
                "TF32's rounding to them; use float32 or float64"
            )
        specs = []
        for checkpoint in subject.checkpoints:
            if not isinstance(checkpoint, TrainedCheckpoint):
                raise SpecError(
                    f"it is not known by which steps {checkpoint.words()} was trained: name a "
                    "train run with --checkpoint, or use infl submit influence"
                )
            spec = make_spec(
                UnrolledSpec,
                task=subject.task,
                checkpoint=checkpoint,
                queries=queries,
                precision=precision,
            )
            train = checkpoint.train
            if train.precision == "tf32":
                raise SpecError(
                    f"{train.run_id} was trained in TF32, and its steps cannot be repeated to the "
                    "last digit: train it with --precision float32, or use infl submit influence"
                )
            cpu = torch.device("cpu")
            reversible(Trainer(subject.built, recipe_of(train), seed=train.seed, device=cpu))
            specs.append(spec)
        return tuple(specs)
