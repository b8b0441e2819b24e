"""Links, commands and Python snippets of the documents work, and their pictures are small."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
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
    r"^(?P<why><!-- not run: .+? -->\n+)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


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
    text = _BLOCK.sub("", document.read_text(encoding="utf-8"))
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not _leads_somewhere(document, link)] == []


def _leads_somewhere(document: Path, link: str) -> bool:
    """Whether there is such a file, and the heading in it that the link names, if it names one."""
    name, _, anchor = link.partition("#")
    target = document.parent / name if name else document
    if not anchor or target.suffix != ".md":
        return target.exists()
    text = _BLOCK.sub("", target.read_text(encoding="utf-8"))
    titles = [re.sub(r"[^\w\- ]", "", title.lower()) for title in _HEADING.findall(text)]
    return anchor in [title.strip().replace(" ", "-") for title in titles]


MAKEFILE = (PROJECT / "Makefile").read_text(encoding="utf-8")
TARGETS = {
    name for line in re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE) for name in line.split()
}
EXTRAS = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_block_is_tried_or_says_why_not(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    found = [*_BLOCK.finditer(text)]
    assert text.count("```") == 2 * len(found)  # none is indented, and none is not closed
    assert [
        b["text"] for b in found if not b["why"] and not _is_tried(b["language"], b["text"])
    ] == []


def _is_tried(language: str, text: str) -> bool:
    """Whether a block is output, or a directive of the site, or is tried in this file or here."""
    match language:
        case "sh":
            return all(_line_is_tried(line) for line in text.splitlines())
        case "yaml":
            return list(yaml.safe_load_all(text)) != []
        case "toml":
            return tomllib.loads(text) != {}
        case "json":
            return json.loads(text) is not None
    return language in ("", "python") or language[0] == "{"


def _line_is_tried(line: str) -> bool:
    """A command of infl is parsed below; targets of make and extras of pip must exist."""
    match shlex.split(line, comments=True):
        case (
            []
            | ["infl", *_]
            | ["source", ".venv/bin/activate"]
            | ["python3", "-m", "venv", ".venv"]
        ):
            return True
        case ["make", *targets]:
            return {word for word in targets if "=" not in word} <= TARGETS
        case ["pip", "install", *words]:
            named = [
                re.fullmatch(r"(?:influence-jobs|\.)(?:\[([\w,]+)\])?", word) for word in words
            ]
            extras = {extra for n in named if n and n[1] for extra in n[1].split(",")}
            return any(named) and extras <= EXTRAS.keys()
    return False


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


@cache
def _infl() -> Any:
    return typer.main.get_command(app)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_understood(line: str) -> None:
    name, *words = shlex.split(line, comments=True)
    command = _infl()
    while hasattr(command, "commands"):
        name = words.pop(0)
        command = command.commands[name]
    command.make_context(name, words)  # parses, and calls nothing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_a_command_in_a_sentence_exists(document: Path) -> None:
    text = _BLOCK.sub("", document.read_text(encoding="utf-8"))
    assert [code for code in re.findall(r"`infl ([^`]+)`", text) if not _exists(code.split())] == []


def _exists(words: list[str]) -> bool:
    """Whether there is such a command with these options; arguments may be left out."""
    command = _infl()
    while hasattr(command, "commands") and words and words[0][0] != "-":
        names = re.split(r"\\?\|", words.pop(0))  # one of several
        if not all(re.fullmatch("[a-z-]+", name) for name in names):
            return True  # whichever stands for it
        if not command.commands.keys() >= {*names}:
            return False
        command = command.commands[names[0]]
    known = {name for parameter in command.params for name in parameter.opts}
    return "--task" in words or {w.strip("[]") for w in words if "--" in w} <= {*known, "--help"}


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
    """The folder of images that the first task of docs/start.md reads."""
    folder = tmp_path_factory.mktemp("images")
    write_digits(folder, count=6, tests=6, classes=3)
    return folder


def test_the_first_model_of_your_own(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From a network and two folders of images to scores, by a page's file and commands alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(jobs, "ASKED", {"grad-norms": jobs.ASKED["grad-norms"]})  # seconds each
    page = PROJECT / "docs" / "start.md"
    start = page.read_text().partition("## Your own model")[0].count("\n")
    task = next(text for line, text in _blocks(page, "python") if line > start)
    task = task.replace("/data/images", str(image_folder)).replace("(64, 64)", "(32, 32)")
    (tmp_path / "mine.py").write_text(task)
    torch.save(resnet18(num_classes=3).state_dict(), "resnet.pt")
    commands = next(text for line, text in _blocks(page, "sh") if line > start)
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


def test_the_terminal_session_has_the_commands_of_the_readme() -> None:
    drawn = (PROJECT / "docs" / "session.svg").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", drawn).replace("&#160;", " ")
    shown = re.findall(r"\$ (infl .+?)\s*$", text, re.MULTILINE)
    commands = [
        " ".join(line.split("#")[0].split())
        for _, block in _blocks(PROJECT / "README.md", "sh")
        for line in block.splitlines()
    ]
    assert len(shown) >= 2
    assert set(shown) <= {*commands}
