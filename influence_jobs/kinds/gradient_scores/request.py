"""The request for scores from stored projected gradients."""

import math
from typing import Annotated, Literal

from pydantic import Field

from influence_jobs.errors import SpecError
from influence_jobs.kinds.gradient_index.spec import DAMPING
from influence_jobs.kinds.gradient_scores.spec import GradientScoresSpec
from influence_jobs.kinds.gradients.request import GradientsRequest, gradients_of
from influence_jobs.kinds.query_gradients.request import refuse_another_checkpoint, store_named
from influence_jobs.requests.base import Many, One, Say, option
from influence_jobs.requests.options import SCORES, QueriesOptions, WeightsRequest
from influence_jobs.specs.base import Spec, make_spec
from influence_jobs.terms import GradientMethod


class GradientScoresRequest(WeightsRequest, QueriesOptions):
    """Scores from stored projected gradients: new queries do not pass the training samples again.

    Positive = helpful, negative = harmful.
    """

    gradients: Many[str] = option(
        (),
        "Run of `infl submit gradients`. May be repeated. By default gradients are stored at the "
        "checkpoint first, 16x16 numbers a layer.",
        panel=SCORES,
        metavar="RUN",
    )
    method: GradientMethod = option(
        "influence",
        "influence: q^T (G + lambda I)^-1 g in each layer, with G the mean of g g^T; trak: the "
        "same for gradients of the margin (cross-entropy only); dot: dot product q^T g; cosine.",
        panel=SCORES,
    )
    damping: One[Annotated[float, Field(ge=0)] | None] = option(
        None,
        "Lambda, as a part of the mean eigenvalue of a layer's G; 0.1 by default.",
        panel=SCORES,
    )
    combine: Literal["sum", "mean"] = option(
        "sum",
        "How scores are combined. sum: over checkpoints of a training (TracIn); mean: over "
        "trainings from several seeds (ensemble).",
        panel=SCORES,
    )
    keep_layers: bool = option(False, "Also keep the scores of each layer.", panel=SCORES)
    approximate: One[int | None] = option(
        None,
        "Score only so many of the most helpful and of the most harmful samples, which an index "
        "finds at once. It misses some, and its page says how many. Needs faiss.",
        panel=SCORES,
        ge=1,
    )

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        from influence_jobs.kinds.train.spec import FileCheckpoint, TrainedCheckpoint
        from influence_jobs.requests.queries import queries_of
        from influence_jobs.requests.solving import require_declared_loss
        from influence_jobs.requests.subject import subject_of

        named = tuple(store_named(root, word) for word in self.gradients)
        if named:
            refuse_another_checkpoint(self)
        at: tuple[TrainedCheckpoint | FileCheckpoint, ...] = tuple(s.checkpoint for s in named)
        task = named[0].task if named else None
        subject = subject_of(self, root, say, default_checkpoints=at, default_task=task)
        built = subject.built
        queries = queries_of(self, built)
        if self.method == "trak":
            if built.output_loss != "cross-entropy":
                raise SpecError(
                    "--method trak needs a task whose output_loss is cross-entropy, and "
                    f"{type(built).__name__} has {built.output_loss or 'none'}: use --method "
                    "influence"
                )
            # Its p = exp(-loss) is no probability of another loss, and no later step would notice.
            require_declared_loss(built, most=math.inf)
            if queries.quantity != "loss":
                raise SpecError("--method trak explains the loss: leave --quantity out")
        if self.given("damping") and self.method not in DAMPING:
            raise SpecError(f"--damping has no meaning for --method {self.method}: leave it out")
        stores = named or gradients_of(GradientsRequest(seed=self.seed), subject, say)
        damping = DAMPING.get(self.method, 0.0) if self.damping is None else self.damping
        spec = make_spec(
            GradientScoresSpec,
            task=subject.task,
            gradients=stores,
            queries=queries,
            method=self.method,
            damping=damping,
            combine=self.combine,
            keep_modules=self.keep_layers,
            approximate=self.approximate,
        )
        return (spec,)
