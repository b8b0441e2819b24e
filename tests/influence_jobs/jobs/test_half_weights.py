"""Jobs with weights of bfloat16."""

from typing import Any

import numpy as np
import torch

from influence_jobs.kinds import open_job
from influence_jobs.kinds.gradient_scores.spec import GradientScoresSpec
from influence_jobs.kinds.gradients.spec import GradientsSpec
from influence_jobs.kinds.query_gradients.spec import QueryGradientsSpec
from influence_jobs.specs.base import AnySpec, make_spec
from influence_jobs.store.layout import SCORES
from influence_jobs.store.run import Run


def error(found: Any, wanted: Any) -> float:
    found, wanted = (np.asarray(one, dtype=np.float64) for one in (found, wanted))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_norms_and_projected_gradients_are_near_those_of_float32(
    carry_out, grad_norms_spec, checkpoint, queries
) -> None:
    norms = grad_norms_spec.model_copy(update={"precision": "bfloat16-weights"})
    job: Any = open_job(Run("runs", norms))
    assert {parameter.dtype for parameter in job.model.parameters()} == {torch.bfloat16}
    assert norms.run_id != grad_norms_spec.run_id
    half, whole = carry_out(norms), carry_out(grad_norms_spec)
    for name in whole.array_names():
        assert 1e-4 < error(half.array(name)[...], whole.array(name)[...]) < 0.05, name

    def stored(precision: str) -> GradientsSpec:
        return make_spec(
            GradientsSpec,
            task=norms.task,
            checkpoint=checkpoint,
            modules=("conv2", "head"),
            precision=precision,
            stored="float32",
        )

    def scores(precision: str) -> AnySpec:
        return make_spec(
            GradientScoresSpec,
            task=norms.task,
            gradients=(stored(precision),),
            queries=queries,
            method="dot",
        )

    half, whole = carry_out(stored("bfloat16-weights")), carry_out(stored("float32"))
    for name in whole.array_names():
        assert 1e-4 < error(half.array(name)[...], whole.array(name)[...]) < 0.1, name
    half, whole = carry_out(scores("bfloat16-weights")), carry_out(scores("float32"))
    found, wanted = half.array(SCORES)[...], whole.array(SCORES)[...]
    assert 1e-4 < error(found, wanted) < 0.05


def test_a_querys_gradient_is_of_the_rounded_weights(
    scores_root, grad_norms_spec, checkpoint, queries
) -> None:
    store = make_spec(
        GradientsSpec,
        task=grad_norms_spec.task,
        checkpoint=checkpoint,
        modules=("conv2", "head"),
        precision="bfloat16-weights",
    )
    spec = make_spec(
        QueryGradientsSpec, task=grad_norms_spec.task, gradients=store, queries=queries
    )
    job: Any = open_job(Run(str(scores_root), spec))
    job.load(checkpoint)
    for parameter in job.model.parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, parameter.bfloat16().float())
    assert job.model.head.weight.abs().max() > 0
