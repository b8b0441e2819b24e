"""Every kind of run on the pretended GPU, through the driver in this process: arrays and waits."""

import shutil
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import influence_jobs
from influence_jobs.errors import DataError, InflError
from influence_jobs.jobs.base import Shard
from influence_jobs.jobs.rows import Checks
from influence_jobs.jobs.tokens import watch_tokens
from influence_jobs.kinds import kinds
from influence_jobs.store.layout import SCORES, SCORES_OF_TOKENS
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.output_loss import FORMS
from influence_jobs.tasks.sequences import TokenLosses

from . import networks
from .runs import (
    JOBS,
    NETWORKS,
    OTHERS,
    TASK,
    arrays,
    hold_batches,
    hold_shards,
    of_digits,
    prepared,
    require_alike,
)

# Their solvers' own runs, `s-test`, are tried in any case.
LONGEST = ("influence, LiSSA", "influence, relative", "influence, SOURCE")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONGEST)) for name in JOBS]
)
def test_a_run_of_samples(name, trained, tmp_path, here):
    found = hold_batches(name, trained, tmp_path, here)
    kind, options, _ = JOBS[name]
    shutil.copytree(trained, tmp_path / "cpu")
    options = {"runs": tmp_path / "cpu", "batch_size": 24, "quiet": True, **of_digits(options)}
    require_alike(found, influence_jobs.submit(kind, **options))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ("paper", "calibrate")))
        for name in OTHERS
    ],
)
def test_a_run_of_other_runs_or_models(name, trained, tmp_path, here):
    found = hold_shards(name, trained, tmp_path / "gpu", here)
    submit = partial(influence_jobs.submit, quiet=True)
    options = prepared(OTHERS[name], trained, tmp_path / "cpu", submit)
    require_alike(found, submit(OTHERS[name].kind, **options))


def test_every_kind_of_run_is_here():
    there = {kind for kind, _, _ in JOBS.values()} | {other.kind for other in OTHERS.values()}
    assert there == {*kinds()}


def test_a_shard_is_copied_once(trained, tmp_path, here):
    shutil.copytree(trained, tmp_path / "runs")
    options = {"task": TASK, "epochs": 2, "layer": ["all"], "batch_size": 4}
    _, waits = here("grad-norms", runs=tmp_path / "runs", **options)
    copies = [
        wait for wait in waits if any("rows.py" in at and "arrays" in at for at in wait.stack)
    ]
    assert len(copies) == 1


def test_norms_that_leave_the_range_of_float32_are_computed_again(trained, tmp_path, here):
    """Squares of these gradients vanish in float32, which a shard shows at its end."""
    options = {"epochs": 2, "layer": ["1"], "batch_size": 8, "reduce": "layer"}
    shutil.copytree(trained, tmp_path / "runs")
    faint, _ = here("grad-norms", task=f"{NETWORKS}:FaintDigits", runs=tmp_path / "runs", **options)
    plain, _ = here("grad-norms", task=TASK, runs=tmp_path / "runs", **options)
    (found,), (expected,) = arrays(faint).values(), arrays(plain).values()
    assert expected.min() > 0
    np.testing.assert_allclose(found, expected * 2.0**-90, rtol=1e-5)


def test_the_baseline_of_norms_too(trained, tmp_path, here):
    shutil.copytree(trained, tmp_path / "runs")
    options = {"epochs": 2, "method": "norm", "batch_size": 8, "test": [1]}
    options = {"runs": tmp_path / "runs", **options}
    faint, _ = here("baseline", task=f"{NETWORKS}:FaintDigits", **options)
    plain, _ = here("baseline", task=TASK, **options)
    (found,), (expected,) = arrays(faint).values(), arrays(plain).values()
    assert expected.min() > 0
    np.testing.assert_allclose(found, expected * 2.0**-90, rtol=1e-5)


OF_TOKENS: dict[str, dict[str, Any]] = {
    "grad-norms": {"layer": ["head"], "per_token": True, "batch_size": 8},
    "influence": {"test": [1, 2], "solver": "identity", "per_token": True, "batch_size": 8},
}


@pytest.mark.parametrize("kind", OF_TOKENS)
def test_texts_that_show_another_form_of_the_loss_are_computed_again(kind, tmp_path, monkeypatch):
    """The few that are looked at are means over the tokens as well as over all positions."""
    turned = []
    plain = TokenLosses.turn
    monkeypatch.setattr(TokenLosses, "turn", lambda parts: (turned.append(1), plain(parts))[1])
    options = {"task": f"{NETWORKS}:RaggedTexts", "epochs": 1, "quiet": True, **OF_TOKENS[kind]}
    found = influence_jobs.submit(kind, runs=tmp_path / "one", **options)
    assert turned == [1]
    right_first = sorted(FORMS["cross-entropy"], key=lambda form: "over all" not in form.words)
    monkeypatch.setitem(FORMS, "cross-entropy", tuple(right_first))
    expected = influence_jobs.submit(kind, runs=tmp_path / "two", **options)
    assert turned == [1]
    ours, theirs = arrays(found), arrays(expected)
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values)
    if kind == "influence":
        tokens, whole = ours[SCORES_OF_TOKENS], ours[SCORES]
        np.testing.assert_allclose(np.nansum(tokens, 2), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", OF_TOKENS)
def test_a_text_that_is_at_fault_is_named(kind, tmp_path, here):
    options = {"task": f"{NETWORKS}:SpoiltTexts", "epochs": 1, **OF_TOKENS[kind]}
    with pytest.raises(InflError, match="is not finite for sample 17"):
        here(kind, runs=tmp_path, **options)


def test_a_text_of_more_tokens_than_there_is_room_for_is_refused():
    task = networks.RaggedTexts()
    model, batch = task.model().eval(), task.batch(torch.arange(8), Draw(0))
    parts, checks = TokenLosses(task), Checks(Shard("", 0, 8), lambda what, ids: None)
    parts.look(model, batch)
    assert watch_tokens(parts, model, batch, 4, checks).tolist() == [5, 3, 3, 5, 5, 5, 5, 5]
    with pytest.raises(DataError, match="has more than 4 tokens, which the longest had when the"):
        checks.look()
