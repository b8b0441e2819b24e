"""What a dry run tells."""

from typing import Any

import pytest

from infl_cli import dry_run
from influence_jobs import devices
from influence_jobs.jobs.automatic import Choice

from .conftest import Infl


def test_the_batch_size_that_the_run_would_choose_is_told_with_the_reason(
    infl: Infl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halved(job: Any, units: int) -> Choice:
        assert units == 500  # of each of three workers
        return Choice(32, {32: 3.0, 64: 1.0})

    monkeypatch.setattr(dry_run, "expected", halved)
    words = ("submit", "grad-norms", "--task", "digits:DigitsTask", "--layer", "1", "--dry-run",
             "--workers", "3")  # fmt: skip
    plan = infl(*words, "--json").json
    assert plan["batch_size"] == 32
    assert "batches     of 32: 3.00 times as fast as 64 (probed)\n" in infl(*words).out
    asked = infl(*words, "--batch-size", "10", "--json").json
    assert (asked["batch_size"], asked["batch_size_because"]) == (10, "")


def test_losses_are_estimated_before_there_are_weights(infl: Infl) -> None:
    words = ("submit", "baseline", "--task", "digits:DigitsTask", "--method", "loss", "--test", 3)
    answer = infl(*words, "--dry-run", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["samples"] == 1500


def test_what_decides_the_cost_of_a_solver_is_told_and_too_much_is_refused(
    infl: Infl, refused: Any
) -> None:
    words = ("submit", "s-test", "--task", "digits:DigitsTask", "--test", 3, "--dry-run")
    notes = infl(*words, "--solver", "lissa", "--damping", 1, "--json").json["notes"]
    assert notes[0] == "measured with untrained weights, as there are no others yet"
    assert "steps of 32 samples a repeat, at most" in notes[1]
    assert "iterations over 1,500 samples: lambda 1, largest" in infl(*words, "--damping", 1).out
    halved = infl(*words, "--solver", "ek-fac", "--curvature-samples", 100, "--json").json["notes"]
    assert any("two halves of these samples are compared" in note for note in halved)
    assert "LiSSA needs" in refused(*words, "--solver", "lissa", "--damping", "1e-9")


def test_the_probe_has_the_threads_of_the_run(infl: Infl, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(devices, "cores", lambda: 8)
    monkeypatch.setattr(dry_run, "cores", lambda: 8)
    monkeypatch.setattr("torch.set_num_threads", taken.append)
    digits = ("--task", "digits:DigitsTask", "--epochs", 1, "--dry-run")
    assert infl("submit", "train", *digits, "--local").code == 0
    assert taken == [3]
    assert infl("submit", "grad-norms", *digits, "--layer", 1, "--workers", 2).code == 0
    assert taken == [3, 8, 4]  # a training has one worker


def test_on_a_terminal_it_shows_how_far_it_is(infl: Infl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "PROBE_S", 0.0)
    words = ("submit", "influence", "--task", "digits:DigitsTask", "--epochs", 1, "--test", 3)
    assert infl(*words, "--dry-run").err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "probing" in infl(*words, "--dry-run").err
