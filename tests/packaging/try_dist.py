"""Install wheel and sdist into empty environments and use them; run tests of the sdist there.

`make dist` calls it with the folder that `python -m build` has filled. An environment has the
package, and of the packages that it names as its requirements those that are installed where this
script runs, as links: torch and its packages are gigabytes. Nothing else is there, so a requirement
that is not named is missed, and `pip check` compares the versions with the ranges.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

from packaging.dependency_groups import resolve_dependency_groups
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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

LIBRARY = """
import importlib.util
import torch
from influence_jobs import GradNorms
from tiny import Tiny
assert [importlib.util.find_spec(name) for name in ("typer", "ray", "matplotlib")] == [None] * 3
task = Tiny()
norms = GradNorms(task.model().eval(), ["0", "2"], task.losses, reduction="layer")
batch = torch.utils.data.default_collate([task.train_data()[i] for i in range(5)])
print({name: found.shape for name, found in norms(batch).items()})
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
        work = root / "work"
        work.mkdir()
        (work / "tiny.py").write_text(TASK)

        _run(_environment(root / "plain", wheel, ""), "-c", LIBRARY, cwd=work)
        python = _environment(root / "env", wheel, "all")
        _run(python, "-c", IMPORT_ALL, cwd=work)
        _use(python, work)

        python = _environment(root / "of-sdist", sdist, "cli")
        _run(python.with_name("infl"), "--version", cwd=work)

        with tarfile.open(sdist) as archive:
            archive.extractall(root, filter="data")
        source = root / sdist.name.removesuffix(".tar.gz")
        tried = root / "env"
        project = tomllib.loads((source / "pyproject.toml").read_text())
        for line in resolve_dependency_groups(project["dependency-groups"], "dev"):
            requirement = Requirement(line)
            needed = distribution(requirement.name)
            _link([needed, *_closure(needed, set(requirement.extras))], _site(tried))
        pytest = (tried / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider")
        _run(*pytest, "-q", "--collect-only", cwd=source)
        _run(*pytest, "tests/influence_jobs/tasks/test_digits.py", cwd=source)


def _use(python: Path, work: Path) -> None:
    """What a user does first."""
    infl = python.with_name("infl")
    _run(infl, "--help", cwd=work)
    _run(infl, "--version", cwd=work)
    _run(infl, "doctor", cwd=work)
    task = ("--task", "tiny:Tiny", "--layer", "all", "--epochs", "1", "--local")
    _run(infl, "submit", "grad-norms", *task, cwd=work)
    _run(infl, "top", "grad-norms-tiny", "--k", "3", cwd=work)
    _run(infl, "report", "grad-norms-tiny", "--out", "report", cwd=work)


def _environment(folder: Path, package: Path, extra: str) -> Path:
    """Make an environment with a wheel or sdist and what it requires; returns its python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = (Path(sys.executable), "-m", "pip", "--python", python)
    _run(*pip, "install", "--quiet", "--no-deps", package, cwd=folder)
    (info,) = _site(folder).glob("influence_jobs-*.dist-info")
    _link(_closure(PathDistribution(info), {"", extra}), _site(folder))
    _run(*pip, "check", cwd=folder)
    return python


def _site(environment: Path) -> Path:
    (site,) = environment.glob("lib/python*/site-packages")
    return site


def _closure(start: Distribution, extras: set[str]) -> list[Distribution]:
    """The installed packages that one requires with some extras, and those that they require."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(start, frozenset(extras))]
    while waiting:
        one, asked = waiting.pop()
        name = canonicalize_name(one.name)
        if (name, asked) in seen:
            continue
        seen.add((name, asked))
        if one is not start:
            found[name] = one
        for requirement in _requirements(one, asked):
            ours = canonicalize_name(requirement.name) == canonicalize_name(start.name)
            of = start if ours else distribution(requirement.name)
            waiting.append((of, frozenset({"", *requirement.extras})))
    return [*found.values()]


def _requirements(one: Distribution, extras: frozenset[str]) -> Iterator[Requirement]:
    for line in one.requires or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
            yield requirement


def _link(packages: list[Distribution], site: Path) -> None:
    """Put links to the files of installed packages into another environment."""
    for one in packages:
        for file in one.files or ():
            path = site / file
            if ".." in file.parts or "__pycache__" in file.parts or path.exists():
                continue  # a script of the other environment, or a file of two packages
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(Path(str(one.locate_file(file))).resolve())


def _run(*command: str | Path, cwd: Path) -> None:
    print("+", *(word if "\n" not in str(word) else "..." for word in command), flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=cwd, env=environment, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
