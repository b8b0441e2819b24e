"""The pretended GPU, for every test of this folder that asks for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import influence_jobs
from influence_jobs.kinds.paper import request as paper

from .pretend import PretendGpu
from .runs import TASK, TEXTS, Submitted, submitter


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGpu]:
    with PretendGpu(monkeypatch) as device:
        yield device


@pytest.fixture
def here(gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch) -> Submitted:
    """Submits a kind on the pretended GPU."""
    monkeypatch.setattr(paper, "QUICK_SIZES", (5,))  # of 48 samples
    return submitter(gpu, monkeypatch)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with a short training of each task on the CPU."""
    root = tmp_path_factory.mktemp("trained")
    for task in (TASK, TEXTS):
        influence_jobs.submit("train", task=task, runs=root, epochs=2, quiet=True)
    return root
