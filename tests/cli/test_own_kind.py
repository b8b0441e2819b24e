"""A folder is enough for a kind of run: every command and Python know it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import influence_jobs
import influence_jobs.kinds
from infl_cli import submit
from influence_jobs.kinds import kinds
from influence_jobs.specs.base import Spec

FOLDER = Path(__file__).parent / "own_kinds"


@pytest.fixture
def own_kind() -> Iterator[None]:
    """The kind `losses`, for the time of a test."""
    influence_jobs.kinds.__path__.append(str(FOLDER))
    kinds.cache_clear()
    submit.add_command(kinds()["losses"])
    yield
    submit.app.registered_commands.pop()
    influence_jobs.kinds.__path__.remove(str(FOLDER))
    kinds.cache_clear()
    del Spec._by_kind["losses"]
    for module in [name for name in sys.modules if name.startswith("influence_jobs.kinds.losses")]:
        del sys.modules[module]


@pytest.mark.usefixtures("own_kind", "runs")
def test_a_kind_of_ones_own_is_known_everywhere(infl: Callable[..., Any]) -> None:
    at = ("--checkpoint", "train-digits", "--local")
    assert "losses" in infl("submit", "--help").out
    assert infl("submit", "losses", *at, "--dry-run", "--json").json["samples"] == 1500
    answer = infl("submit", "losses", *at, "--json")
    assert answer.code == 0, answer.err
    run = answer.json["run"]
    assert answer.json["arrays"].keys() == {"losses"}
    assert infl("status", run, "--json").json["status"] == "done"
    assert infl("verify", run).code == 0
    assert "Losses" in Path(infl("report", run).out.split()[0]).read_text()
    lines = infl("top", run, "--k", 2).out.splitlines()
    assert lines[0] == "losses: the sample's loss"
    assert lines[1].split() == ["sample", "label", "loss"]
    assert len(lines) == 4

    found = influence_jobs.submit("losses", checkpoint="train-digits", quiet=True)
    assert found.run.id == run
    ranked = found.top_k(2).to_pylist()
    assert ranked == infl("top", run, "--k", 2, "--json").json["top"]["losses"]
    assert ranked[0]["loss"] == float(found["losses"].max())
    assert found.figures == ("losses",)
    assert "Losses" in found._repr_html_()
