"""The library without `influence_jobs.perceptrons` gives the same numbers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import infl_cluster
import influence_jobs

PROGRAM = Path(__file__).with_name("perceptron_numbers.py")
LIBRARY = Path(influence_jobs.__file__).parent
USE = re.compile(r" *# The only use of `perceptrons`.*?return faster\n", re.DOTALL)
USERS = ("curvature/lissa_steps.py", "training/ensemble.py")


@pytest.fixture(scope="module")
def bare_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the library without the package and the two places that use it."""
    copy = tmp_path_factory.mktemp("bare") / "influence_jobs"
    shutil.copytree(LIBRARY, copy, ignore=shutil.ignore_patterns("perceptrons", "__pycache__"))
    for name in USERS:
        text, uses = USE.subn("", (copy / name).read_text())
        assert uses == 1
        (copy / name).write_text(text)
    return copy


def run(library: Path, out: Path) -> Any:
    folders = (library.parent, Path(infl_cluster.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run(
        [sys.executable, PROGRAM, out], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(out)
    assert found["paths"].pop("library") == str(library / "__init__.py")
    return found


def test_nothing_else_names_the_package(bare_library: Path) -> None:
    imports = re.compile(r"^\s*(from|import) .*\bperceptrons\b", re.MULTILINE)
    naming = [p for p in bare_library.rglob("*.py") if imports.search(p.read_text())]
    assert naming == []


@pytest.mark.slow
def test_the_library_without_it_gives_the_same_numbers(bare_library: Path, tmp_path: Path) -> None:
    with_it, without = (
        run(LIBRARY, tmp_path / "with.pt"),
        run(bare_library, tmp_path / "without.pt"),
    )
    assert with_it["paths"] == {
        "lissa": {"PerceptronLissaSteps"},
        "ensembles": {"PerceptronSteps"},
    }
    assert without["paths"] == {
        "lissa": {"AnySteps"},
        "ensembles": {"StackedSteps", "one at a time"},
    }
    assert with_it["numbers"].keys() == without["numbers"].keys()
    for name, expected in without["numbers"].items():
        # Numbers stored as float32 (norms, results of jobs) agree to float32 precision.
        close = {torch.float64: 1e-9, torch.float32: 1e-6, torch.int64: 0}[expected.dtype]
        torch.testing.assert_close(
            with_it["numbers"][name],
            expected,
            rtol=close,
            atol=close / 10,
            msg=f"{name} differs",
        )
