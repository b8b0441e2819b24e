"""Install the wheel into an empty environment and use it; then run tests of the sdist there.

`make dist` calls it with the folder that `python -m build` has filled. The dependencies are those
of the environment that runs this script: torch and its packages are gigabytes, and CI has just
installed them. The new environment sees them by a .pth file. That file does not follow the .pth
file of an editable install, so `influence_jobs` can only come from the wheel.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

PACKAGES = ("influence_jobs", "infl_cluster", "infl_cli", "infl_configs")
SHIPPED = (
    *(f"{package}/py.typed" for package in PACKAGES),
    "infl_configs/mnist.yaml",
    "influence_jobs/report/templates/report.html.j2",
)

# Callbacks of packages whose users have them.
CALLBACKS = ("influence_jobs.training.hugging_face", "influence_jobs.training.lightning")
IMPORT_ALL = f"""
import importlib, pkgutil, sys
for name in {PACKAGES!r}:
    package = importlib.import_module(name)
    assert package.__file__.startswith(sys.prefix), package.__file__
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if module.name not in {CALLBACKS!r}:
            importlib.import_module(module.name)
"""

TASK = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_jobs import Task


class Tiny(Task):
    def model(self):
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def train_data(self):
        generator = torch.Generator().manual_seed(0)
        return TensorDataset(torch.rand(50, 4, generator=generator), torch.arange(50) % 3)

    def losses(self, model, batch):
        x, y = batch
        return F.cross_entropy(model(x), y, reduction="none")
"""


def main(dist: Path) -> None:
    """Try the wheel and the sdist.

    Raises:
        AssertionError: A file is missing from the wheel.
        CalledProcessError: A command failed.
    """
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in SHIPPED if name not in names]
    assert not missing, f"{wheel.name} lacks {missing}"
    assert any(name.endswith("licenses/LICENSE") for name in names), f"{wheel.name} lacks LICENSE"
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {*PACKAGES}

    with tempfile.TemporaryDirectory(prefix="infl-dist-") as folder:
        root = Path(folder)
        python = _environment(root / "env", wheel)
        work = root / "work"
        work.mkdir()
        (work / "tiny.py").write_text(TASK)
        _run(python, "-c", IMPORT_ALL, cwd=work)
        infl = python.with_name("infl")
        _run(infl, "--help", cwd=work)
        task = ("--task", "tiny:Tiny", "--layer", "all", "--epochs", "1", "--local")
        _run(infl, "submit", "grad-norms", *task, cwd=work)
        _run(infl, "top", "grad-norms-tiny", "--k", "3", cwd=work)
        _run(infl, "report", "grad-norms-tiny", "--out", "report", cwd=work)

        with tarfile.open(sdist) as archive:
            archive.extractall(root, filter="data")
        source = root / sdist.name.removesuffix(".tar.gz")
        pytest = ("-m", "pytest", "--quiet", "-p", "no:cacheprovider")
        _run(python, *pytest, "--quiet", "--collect-only", cwd=source)
        _run(python, *pytest, "tests/influence_jobs/tasks/test_digits.py", cwd=source)


def _environment(folder: Path, wheel: Path) -> Path:
    """Make an environment with the wheel and this one's other packages; returns its python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = (Path(sys.executable), "-m", "pip", "--python", python)
    _run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def _run(*command: str | Path, cwd: Path) -> None:
    print("+", *(word if "\n" not in str(word) else "..." for word in command), flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=cwd, env=environment, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
