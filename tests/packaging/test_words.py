"""Pages and help texts use the names of docs/glossary.md, and docs/science.md has every method."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from infl_cli.main import app
from influence_jobs.kinds import kinds
from influence_jobs.kinds.baseline.spec import METHODS
from influence_jobs.specs.solvers import SolverSettings

DOCS = Path(__file__).parents[2] / "docs"
GLOSSARY = DOCS / "glossary.md"
# These pages speak of other libraries in their own words.
SPEAK_OF_OTHERS = {GLOSSARY, DOCS / "compared.md"}
# Names of things that have another name here.
OTHERS = re.compile(
    r"\b(test points?|training points?|data ?points?|proponents?|opponents?|IHVPs?"
    r"|inverse-Hessian-vector|regulari[sz]ation)\b",
    re.IGNORECASE,
)


def _helps(command: Any, path: str) -> Iterator[tuple[str, str]]:
    """The help texts of a command, its options, and its commands."""
    yield path, command.help or ""
    for parameter in command.params:
        yield f"{path} {parameter.name}", getattr(parameter, "help", None) or ""
    for name, other in getattr(command, "commands", {}).items():
        yield from _helps(other, f"{path} {name}")


HELPS = [*_helps(typer.main.get_command(app), "infl")]
PAGES = sorted({*DOCS.glob("**/*.md")} - SPEAK_OF_OTHERS)


def test_the_glossary_lists_the_other_names() -> None:
    rows = [line for line in GLOSSARY.read_text().splitlines() if line.startswith("| **")]
    assert 10 <= len(rows) <= 15
    also = " ".join(line.rpartition(" | ")[2] for line in rows)
    assert {"test point", "training point", "proponent"} <= {*OTHERS.findall(also)}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_a_page_has_no_other_name(page: Path) -> None:
    assert OTHERS.findall(page.read_text(encoding="utf-8")) == []


def test_no_help_has_another_name() -> None:
    assert len(HELPS) > 100
    assert [(where, said) for where, said in HELPS if OTHERS.search(said)] == []


def test_helps_are_sentences() -> None:
    """An option is told by a sentence that begins large, or by `name: meaning`, and ends."""
    texts = [(where, said.strip()) for where, said in HELPS if said]
    rough = [
        (where, said)
        for where, said in texts
        if said[-1] not in ".?" or not (said[0].isupper() or re.match(r"[\w@`-]+[:,] ", said))
    ]
    assert rough == []


# Parts of other methods, and what is taken in or made of all.
NO_METHODS = {"train", "s-test", "gram", "gradient-index", "query-gradients", "scores", "paper"}


def test_science_has_every_method() -> None:
    text = (DOCS / "science.md").read_text(encoding="utf-8")
    names = {*kinds()} - NO_METHODS | {*SolverSettings.by_name} | {*METHODS}
    assert (
        sorted(name for name in names if f"`{name}`" not in text and f" {name}" not in text) == []
    )
