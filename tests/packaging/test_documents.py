"""Links, commands and Python snippets of the documents work, and their pictures are small."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from resnet import write_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.models import resnet18

from infl_cli.main import app, main
from influence_jobs import Draw, Task, __version__
from influence_jobs.contract import CHECKS, jobs

PROJECT = Path(__file__).parents[2]
DOCUMENTS = [
    *sorted(PROJECT.glob("*.md")),
    *sorted(PROJECT.glob("docs/**/*.md")),
    *sorted(PROJECT.glob("benchmarks/*.md")),
]
RESULTS = PROJECT / "docs" / "results"

# A comment before a block says why it is not run: <!-- not run: it needs a cluster -->
_BLOCK = re.compile(
    r"^(?P<why><!-- not run: .+? -->\n+)?```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def _blocks(document: Path, language: str) -> Iterator[tuple[int, str]]:
    """The blocks of a language that are run: the first line's number, and the text."""
    text = document.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        if found["language"] == language and not found["why"]:
            yield text.count("\n", 0, found.start("text")) + 1, found["text"]


COMMANDS = [
    pytest.param(line, id=f"{document.relative_to(PROJECT)}:{start + offset}")
    for document in DOCUMENTS
    for start, text in _blocks(document, "sh")
    for offset, line in enumerate(text.splitlines())
    if line.startswith("infl ")
]
SNIPPETS = [
    pytest.param(text, id=f"{document.relative_to(PROJECT)}:{start}")
    for document in DOCUMENTS
    for start, text in _blocks(document, "python")
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8"))
    files = [link.partition("#")[0] for link in links if "://" not in link and link[0] != "#"]
    assert [name for name in files if not (document.parent / name).exists()] == []


def test_results_are_small() -> None:
    sizes = {path: path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()}
    assert [path for path, size in sizes.items() if size > 100_000] == []
    assert sum(sizes.values()) < 1_500_000


def test_the_citation_names_this_version() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (__version__, project["license"])


def test_there_are_commands_and_snippets_to_try() -> None:
    assert len(COMMANDS) >= 10
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_understood(line: str) -> None:
    name, *words = shlex.split(line, comments=True)
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name = words.pop(0)
        command = command.commands[name]
    command.make_context(name, words)  # parses, and calls nothing


YOUR_MODEL = PROJECT / "docs" / "your-model.md"


def test_from_an_empty_file_to_the_first_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    _, text = next(_blocks(YOUR_MODEL, "sh"))
    lines = text.splitlines()
    assert [line.split()[1] for line in lines][:2] == ["init", "check"]
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as leaving:
            main()
        assert leaving.value.code == 0, (line, *capsys.readouterr())


def test_every_hook_of_a_task_is_in_the_table() -> None:
    hooks = {name for name in vars(Task) if name[0] != "_"} - {"given", "published"}
    rows = re.findall(r"^\| `(\w+)", YOUR_MODEL.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for name in rows if name in vars(Task)} == hooks


def test_every_check_is_in_the_table() -> None:
    text = YOUR_MODEL.read_text(encoding="utf-8")
    assert [name for name, *_ in CHECKS if f"\n| {name} |" not in text] == []


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x).relu()).relu().mean((2, 3))


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer3 = _Block()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer3(x))


def _losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def _names() -> dict[str, Any]:
    """The names that snippets use and do not define."""
    model = _Network()
    return {
        "F": F,
        "Task": Task,
        "TensorDataset": TensorDataset,
        "batch": (torch.rand(5, 1, 8, 8), torch.arange(5) % 3),
        "features": torch.rand(20, 4),
        "labels": torch.arange(20) % 3,
        "losses": _losses,
        "model": model,
        "nn": nn,
        "torch": torch,
        "vectors_QP": torch.rand(2, sum(p.numel() for p in model.parameters())),
    }


@pytest.fixture(scope="session")
def influence_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished influence run of the test samples that the documents' snippets ask for."""
    tests = {found for text in SNIPPETS for found in re.findall(r"\btest=(\d+)", text.values[0])}
    folder = tmp_path_factory.mktemp("documents")
    command = [sys.executable, "-c", "from infl_cli.main import main; main()"]
    command += ["submit", "influence", "--task", "many_tests:ManyTestsTask", "--epochs", "1"]
    command += ["--local", "--solver", "identity", "--layer", "all"]
    command += [word for test in sorted(tests) for word in ("--test", test)]
    path = [str(Path(__file__).parent), str(PROJECT / "examples"), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs").glob("influence-*")
    return run


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of images that README's task reads."""
    folder = tmp_path_factory.mktemp("images")
    write_digits(folder, count=6, tests=6, classes=3)
    return folder


def test_the_first_model_of_the_readme(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From a network and two folders of images to scores, by README's file and commands alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(jobs, "ASKED", {"grad-norms": jobs.ASKED["grad-norms"]})  # seconds each
    readme = PROJECT / "README.md"
    start = readme.read_text().partition("## Your own model")[0].count("\n")
    task = next(text for line, text in _blocks(readme, "python") if line > start)
    task = task.replace("/data/images", str(image_folder)).replace("(64, 64)", "(32, 32)")
    (tmp_path / "mine.py").write_text(task)
    torch.save(resnet18(num_classes=3).state_dict(), "resnet.pt")
    commands = next(text for line, text in _blocks(readme, "sh") if line > start)
    for line in commands.splitlines():
        monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
        with pytest.raises(SystemExit) as leaving:
            main()
        assert leaving.value.code == 0, (line, *capsys.readouterr())
    assert f"{image_folder}/train/" in capsys.readouterr().out


@pytest.mark.parametrize("text", SNIPPETS)
def test_a_snippet_runs(
    text: str,
    influence_run: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)  # for many_tests
    names = _names()
    # The documents name a run that does not exist here.
    text = text.replace("/data/images", str(image_folder))
    exec(re.sub(r"runs/influence-\w+-[0-9a-f]{12}", str(influence_run), text), names)  # noqa: S102
    for kind in names.values():
        if isinstance(kind, type) and issubclass(kind, Task) and kind is not Task:
            task = kind()
            batch = task.batch(torch.arange(4), Draw(0))
            assert task.losses(task.model(), batch).shape == (4,)
