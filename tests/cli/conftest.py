"""Run `infl` in this process, on small runs and images."""

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infl_cli import dry_run
from infl_cli.main import main
from infl_cluster import launch
from influence_jobs import devices
from influence_jobs.jobs import automatic
from influence_jobs.models.ffdnet import FFDNet
from influence_jobs.store.run import Run


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The object that --json prints as the last line of standard output."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


Infl = Callable[..., Answer]


@pytest.fixture
def infl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Infl]:
    """Runs `infl` in an empty folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command puts the working directory there
    for module in (devices, dry_run):
        monkeypatch.setattr(module, "cores", lambda: 1)
    monkeypatch.setattr(launch, "threads", lambda: 1)
    for module in (automatic, dry_run):
        monkeypatch.setattr(module, "PROBE_S", 0.0)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("INFL_RUNS", "INFL_DATA", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["infl", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main()
        code = leaving.value.code
        assert isinstance(code, int)
        return Answer(code, *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, handler)


def _tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def refused(infl: Infl, tmp_path: Path) -> Callable[..., str]:
    """Runs `infl`, which must refuse with one line and code 2, and write nothing.

    Returns the line.
    """

    def run(*words: object) -> str:
        before = _tree(tmp_path)
        answer = infl(*words)
        assert answer.code == 2
        assert answer.out == ""
        assert answer.err.startswith("error: ")
        assert answer.err.count("\n") == 1
        assert "Traceback" not in answer.err
        assert _tree(tmp_path) == before
        return answer.err

    return run


@pytest.fixture
def runs(tmp_path: Path, finished_run: Run) -> Path:
    """The folder `runs` of the working directory, with the example's training and its norms."""
    shutil.copytree(finished_run.root, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of two images with 40 x 48 pixels of noise."""
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 40, 3), dtype=np.uint8)
    for name, image in zip(("a.png", "b.png"), pixels, strict=True):
        Image.fromarray(image).save(folder / name)
    return folder


@pytest.fixture
def ffdnet_file(tmp_path: Path) -> Path:
    """A state dict of an untrained colour FFDNet."""
    torch.manual_seed(0)
    torch.save(FFDNet(color=True).state_dict(), tmp_path / "ffdnet.pth")
    return tmp_path / "ffdnet.pth"
