"""What a user gets who says nothing of lambda and of the curvature's samples."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from influence_jobs.errors import SpecError
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.s_test.request import STestRequest
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.kinds.train.spec import TrainedCheckpoint
from influence_jobs.requests import solving
from influence_jobs.specs.solvers import (
    ConjugateGradientSettings,
    EkFacSettings,
    SourceSettings,
)
from influence_jobs.store.run import Run

Infl = Callable[..., Any]
STEPS = 2 * math.ceil(1500 / 32)  # of the digits' training
MEASURED = ConjugateGradientSettings(damping_share=0.001)
LAMBDA = float(f"{0.1 / (0.05 * STEPS):.3g}")


def asked(runs: Path, **options: Any) -> STestSpec:
    given = {"checkpoint": "train-digits", "test": 5, **options}
    (spec,) = STestRequest.of(given).specs(str(runs), print)
    assert isinstance(spec, STestSpec)
    return spec


def test_lambda_is_that_of_the_schedule(infl: Infl, runs: Path) -> None:
    assert asked(runs).solver == ConjugateGradientSettings(damping=LAMBDA)
    # What is shown, typed again, is the same run.
    assert asked(runs, damping=LAMBDA).run_id == asked(runs).run_id
    assert asked(runs, solver="ek-fac").solver == EkFacSettings(damping=LAMBDA, targets="auto")
    early = asked(runs, checkpoint="train-digits@1").solver
    assert getattr(early, "damping", None) == pytest.approx(2 * LAMBDA, rel=0.01)
    # A user's own stays, and the Hessian's must also make it positive.
    assert asked(runs, damping=0.3).solver == ConjugateGradientSettings(damping=0.3)
    assert asked(runs, operator="hessian").solver == MEASURED
    share = asked(runs, damping_share=0.02).solver
    assert share == ConjugateGradientSettings(damping_share=0.02)
    with pytest.raises(SpecError, match="--damping and --damping-share both say lambda"):
        asked(runs, damping=0.1, damping_share=0.02)


def test_a_training_by_adam_or_elsewhere_has_a_part_of_the_largest_eigenvalue(
    infl: Infl, runs: Path, tmp_path: Path
) -> None:
    words = ("submit", "train", "--task", "digits:DigitsTask", "--width", 8, "--epochs", 1)
    adam = infl(*words, "--optimizer", "adam", "--local", "--json").json["run"]
    assert asked(runs, checkpoint=adam).solver == MEASURED
    (weights,) = (runs / adam).rglob("*.pt*")
    elsewhere = asked(runs, checkpoint=str(weights), task="digits:DigitsTask", width=8)
    assert elsewhere.solver == MEASURED


def test_the_curvature_is_of_all_samples_up_to_a_stated_work(
    infl: Infl, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All 1,500, in the words of earlier requests, whose runs are found.
    assert asked(runs).curvature.samples == 10_000
    assert asked(runs).run_id == asked(runs, curvature_samples=10_000).run_id
    assert asked(runs, curvature_samples="all").curvature.samples is None
    monkeypatch.setattr(solving, "LEAST_SAMPLES", 100)
    assert asked(runs).curvature.samples is None
    parameters = 8 * 9 + 2 * 8 + (8 * 9 + 1) * 16 + (16 * 4 * 4 + 1) * 10
    monkeypatch.setattr(solving, "MOST_WORK", 1000 * parameters)
    assert asked(runs).curvature.samples == 1000
    monkeypatch.setattr(solving, "MOST_WORK", 1)
    assert asked(runs).curvature.samples == 100


@pytest.mark.slow
def test_a_subset_says_how_stable_it_is(infl: Infl, runs: Path) -> None:
    words = ("submit", "s-test", "--checkpoint", "train-digits", "--local", "--test", 5)
    whole = infl(*words, "--damping", ".1").out
    assert "samples have cosines" not in whole
    few = infl(*words, "--damping", ".001", "--curvature-samples", 20).out
    assert "curvature of 20 of 1,500 samples; --curvature-samples all takes all" in few
    assert "below 0.9: more --curvature-samples make them more stable" in " ".join(few.split())
    many = infl(*words, "--damping", "10", "--curvature-samples", 1400).out
    assert "two halves of these samples have cosines from 1.00" in " ".join(many.split())
    assert "below 0.9" not in many
    planned = infl(*words, "--curvature-samples", 200, "--dry-run").out
    assert "curvature of 200 of 1,500 samples" in " ".join(planned.split())
    assert "learning rate 0.05 x 94 steps" in " ".join(planned.split())


@pytest.mark.slow
def test_halves_that_lambda_does_not_make_positive_end_no_run(infl: Infl, runs: Path) -> None:
    words = ("submit", "s-test", "--checkpoint", "train-digits", "--local", "--test", 5)
    answer = infl(*words, "--operator", "hessian", "--curvature-samples", 200)
    assert answer.code == 0, answer.err
    said = " ".join(answer.out.split())
    assert "lambda is 0.001 of the largest eigenvalue, and what makes the smallest positive" in said
    assert "of two halves of these samples cannot be compared" in said


def test_source_keeps_the_checkpoints_that_it_needs(infl: Infl, runs: Path) -> None:
    words = ("--task", "digits:DigitsTask", "--width", 8, "--epochs", 2, "--layer", "head")
    source = ("--solver", "source", "--segments", 2, "--curvature-samples", 300)
    answer = infl("submit", "influence", *words, *source, "--test", 5, "--local")
    assert answer.code == 0, answer.err
    said = " ".join(answer.out.split())
    assert "segments: epochs 0 to 1: 1 checkpoints, time 5.64; epochs 1 to 2: 1 checkpoints" in said
    assert "two halves of these samples have cosines" in said
    (influence,) = runs.glob("influence-*")
    run = Run.open(str(runs), influence.name)
    assert run.read_rows("scores", 0, 1500).shape == (1, 1500)
    assert isinstance(run.spec, InfluenceSpec)
    checkpoint = run.spec.s_tests[0].checkpoint
    assert isinstance(checkpoint, TrainedCheckpoint)
    assert len([*(runs / checkpoint.train.run_id).rglob("epoch-*.pt")]) == 2


def test_what_source_cannot_do_is_refused_by_name(infl: Infl, runs: Path) -> None:
    for options, said in (
        ({}, "3 segments need as many epochs, and train-digitstask.* is earlier: use --segments 2"),
        ({"segments": 2, "checkpoint": "train-digits@all"}, "name one of each training"),
        ({"segments": 2, "damping": 0.1}, "--damping has no meaning for --solver source"),
        ({"segments": 2, "operator": "hessian"}, "leave --operator out"),
        ({"solver": "cg", "segments": 2}, "--segments has no meaning for --solver cg"),
    ):
        with pytest.raises(SpecError, match=said):
            asked(runs, **{"solver": "source", **options})
    found = asked(runs, solver="source", segments=2).solver
    assert found == SourceSettings(segments=2)
