"""The batch size that a dry run suggests."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from infl_cli import dry_run
from influence_jobs.jobs.base import Plan

from .conftest import Infl

PLAN = Plan((), (), units=1000, batch_size=32)


def rates(
    monkeypatch: pytest.MonkeyPatch, speeds: dict[int, float], own: int, most: int
) -> dict[int, float]:
    """The result if batches have these speeds, and all others do not fit into memory."""

    def probe(batch_size: int, seconds: float) -> float:
        if batch_size not in speeds:
            raise torch.OutOfMemoryError
        return speeds[batch_size]

    def open_job(run: Any, *, device: Any, batch_size: int) -> Any:
        return SimpleNamespace(probe=lambda: batch_size)

    monkeypatch.setattr(dry_run, "open_job", open_job)
    monkeypatch.setattr(dry_run, "samples_per_second", probe)
    how: Any = SimpleNamespace(resolved_device=torch.device("cpu"))
    return dry_run._rates(None, how, own, most)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "speeds, most, tried, fastest",
    [
        (
            {16: 50, 32: 100, 64: 180, 128: 300, 256: 290, 512: 999},
            1024,
            256,
            128,
        ),  # the first loss ends it
        ({16: 50, 32: 100, 64: 180, 128: 300, 256: 400}, 128, 128, 128),  # a chunk ends it
        ({16: 50, 32: 100, 64: 180}, 1024, 64, 64),  # the memory ends it
        ({16: 130, 32: 100, 64: 90}, 1024, 64, 16),  # a smaller one is best
        ({16: 104, 32: 100, 64: 108, 128: 90}, 1024, 128, 32),  # not worth it
    ],
)
def test_the_fastest_batch(
    monkeypatch: pytest.MonkeyPatch,
    speeds: dict[int, float],
    most: int,
    tried: int,
    fastest: int,
) -> None:
    found = rates(monkeypatch, speeds, own=32, most=most)
    assert max(found) == tried
    assert found == {size: speeds[size] for size in found}
    assert dry_run.Estimate(PLAN, 32, 2, 200.0, found).fastest == fastest


def test_one_by_one_has_no_half(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rates(monkeypatch, {1: 10.0, 2: 30.0}, own=1, most=2) == {1: 10.0, 2: 30.0}


def test_without_trying_the_own_batch_stays() -> None:
    assert dry_run.Estimate(PLAN, 32, 2, 200.0).fastest == 32


def test_a_faster_batch_is_named_unless_the_user_chose_one(
    infl: Infl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faster(run: Any, how: Any, own: int, most: int) -> dict[int, float]:
        return {own: 1.0, own // 2: 3.0}

    monkeypatch.setattr(dry_run, "_rates", faster)
    words = ("submit", "grad-norms", "--task", "digits:DigitsTask", "--layer", "1", "--dry-run")
    plan = infl(*words, "--json").json
    best = plan["batch_size"] // 2
    assert plan["fastest_batch_size"] == best
    assert f"faster      3.00 times with --batch-size {best}\n" in infl(*words).out
    chosen = infl(*words, "--batch-size", "10", "--json").json
    assert (chosen["batch_size"], chosen["fastest_batch_size"]) == (10, 10)


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
    assert "LiSSA needs" in refused(*words, "--solver", "lissa", "--damping", "1e-9")
