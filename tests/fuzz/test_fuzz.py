"""Damaged and hostile inputs: refused in one line, never a traceback, never taken for good.

A failing input is told by its target and number; `INFL_FUZZ=SEED` makes others.
"""

import os
import random
import warnings
from pathlib import Path

import pytest

from influence_jobs.errors import InflError
from influence_jobs.store import lease as lease_module
from influence_jobs.store.run import Run

from .targets import Target, copy_of_run, targets_of_documents, targets_of_run, targets_of_users

SEED = os.environ.get("INFL_FUZZ", "1")
FEW = 12  # inputs of a target in the fast test
NAMES = (
    "spec", "plan", "manifest", "finish", "summary", "status", "lease", "job", "width", "progress",
    "zarr of the group", "zarr of an array", "chunk", "table", "preset", "image", "IDX",
    "checkpoint of torch", "checkpoint of safetensors", "spec alone", "plan alone", "entry alone",
    "summary alone", "status alone", "lease alone", "job alone",
)  # fmt: skip


@pytest.fixture
def targets(
    tmp_path: Path, finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Target]:
    monkeypatch.setattr(lease_module, "WATCH_S", 0.0)
    # What is damaged on purpose need not be durable.
    monkeypatch.setattr("influence_jobs.store.files._sync", lambda _: None)
    monkeypatch.setattr("os.fsync", lambda _: None)
    (tmp_path / "runs").mkdir()
    run = copy_of_run(finished_run, tmp_path / "runs")
    found = [*targets_of_run(run), *targets_of_documents(run), *targets_of_users(tmp_path)]
    return {target.name: target for target in found}


def feed(target: Target, count: int) -> int:
    """Feed changed inputs; returns how many were accepted."""
    accepted = 0
    for number in range(count):
        rng = random.Random(f"{SEED}/{target.name}/{number}")
        data = target.change(rng, target.seeds)
        try:
            accepted += target.act(data)
        except InflError as error:
            told = str(error)
            assert told
            assert "\n" not in told, f"input {number} of {target.name}: {told!r}"
        except Exception as error:
            raise AssertionError(
                f"input {number} of {target.name}, seed {SEED}: "
                f"{type(error).__name__}: {error}; {data[:200]!r}"
            ) from error
    return accepted


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_good_inputs_are_accepted_and_some_damaged_ones_are_not(
    targets: dict[str, Target], name: str
) -> None:
    target = targets[name]
    good = [data for data in target.seeds if b"{{{" not in data]
    if name not in ("image", "preset"):  # some of which are refused as they are
        assert all(target.act(data) for data in good)
    assert feed(target, FEW) < FEW + (name == "summary")  # readers can do without it


@pytest.mark.faults
@pytest.mark.timeout(1500)
@pytest.mark.filterwarnings("ignore")
def test_a_hundred_thousand_inputs(
    targets: dict[str, Target], capsys: pytest.CaptureFixture[str]
) -> None:
    assert {*targets} == {*NAMES}
    total = 0
    for target in targets.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            accepted = feed(target, target.count)
        total += target.count
        with capsys.disabled():
            print(f"\n{target.name}: {target.count:,} inputs, {accepted:,} accepted", end="")
        assert accepted < target.count or target.name == "summary"
    with capsys.disabled():
        print(f"\n{total:,} inputs in all, seed {SEED}")
    assert total >= 100_000
