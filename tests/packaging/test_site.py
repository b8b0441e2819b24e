"""What the site's reference is made of is complete; `make docs` finds what does not fit."""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import commands_page
import errors_page
import pytest
import rooms_picture

import infl_cluster
import influence_jobs
from infl_cli.main import app
from infl_cli.options import flag
from influence_jobs.errors import InflError
from influence_jobs.kinds import kinds

PROJECT = Path(__file__).parents[2]
DOCS = PROJECT / "docs"
REFERENCE = DOCS / "reference"


def test_every_public_name_is_on_a_page() -> None:
    text = (REFERENCE / "api.md").read_text() + errors_page.errors()
    named = re.findall(r"^\.\. auto\w+:: (?:influence_jobs\.(?:\w+\.)*)?(\w+)$", text, re.MULTILINE)
    assert {*influence_jobs.__all__} <= {*named}


def test_every_error_is_on_a_page() -> None:
    for package in (influence_jobs, infl_cluster):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.rpartition(".")[2] not in ("driver_main", "hugging_face", "lightning"):
                importlib.import_module(module.name)
    ours = [kind for kind in _below(InflError) if kind.__module__.startswith("infl")]
    public = {"InflError", *(kind.__name__ for kind in ours if kind.__name__[0] != "_")}
    assert public == errors_page.public_errors().keys()


def _below(kind: type) -> Iterator[type]:
    for below in kind.__subclasses__():
        yield below
        yield from _below(below)


def test_messages_are_told_as_the_code_has_them() -> None:
    text = errors_page.errors()
    assert (
        "- `` there is no run <run_id> in <root>: `infl runs...` lists the runs there ``\n" in text
    )
    assert "\n- `the loss is not convex in the outputs, so it has no Gauss-Newton factors: " in text


def test_every_command_and_option_is_on_a_page() -> None:
    text = commands_page.commands() + commands_page.submit_commands()
    sections = dict(re.findall(r"^## `([^`]+)`\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    for name, kind in kinds().items():
        options = [flag(field) for field in kind.request_type.model_fields]
        section = sections[f"infl submit {name}"]
        shown = [option for option in options if option != "--task-options"]
        assert [option for option in shown if f"\n| `{option}" not in section] == []
    names = {group.name for group in app.registered_groups}
    names |= {c.name or c.callback.__name__ for c in app.registered_commands}
    assert {f"infl {name}" for name in names} <= sections.keys()
    assert "infl cluster down" in sections


def test_help_reads_as_it_is_written() -> None:
    text = commands_page.submit_commands()
    assert r"| `--reduce <kernel\|channel\|layer>` |" in text  # a bar would end the cell
    assert r"\[default: 0\]" in text  # no link


def test_every_variable_of_the_environment_is_on_a_page() -> None:
    text = (REFERENCE / "environment.md").read_text()
    code = [
        path.read_text() for folder in errors_page.CODE for path in (PROJECT / folder).rglob("*.py")
    ]
    read = re.compile(r"""environ(?:\.get\(|\[)"(\w+)"|"(INFL_\w+)\"""")
    named = {one or other for module in code for one, other in read.findall(module)}
    assert len(named) > 8
    assert [name for name in sorted(named) if f"`{name}`" not in text] == []


def test_the_picture_of_the_rooms_is_that_of_the_code() -> None:
    """If it is not: `make docs`, look at docs/rooms.svg, and commit it."""
    assert rooms_picture.PICTURE.read_text() == rooms_picture.picture()


def test_arrows_that_follow_from_others_are_left_out() -> None:
    found = {("a", "b"), ("b", "c"), ("a", "c"), ("a", "d"), ("c", "e"), ("a", "e")}
    assert rooms_picture.reduced(found) == [("a", "b"), ("a", "d"), ("b", "c"), ("c", "e")]


def _pages() -> Iterator[Path]:
    """The pages of the site that no README of their folder leads to."""
    for path in sorted(DOCS.rglob("*.md")):
        folder = DOCS / path.relative_to(DOCS).parts[0]
        if path == folder / "README.md" or not (folder / "README.md").exists():
            yield path


@pytest.mark.parametrize("page", [*_pages()], ids=lambda path: str(path.relative_to(DOCS)))
def test_every_page_is_in_the_table_of_contents(page: Path) -> None:
    index = (DOCS / "index.md").read_text()
    tables = "\n".join(re.findall(r"^```\{toctree\}\n(.*?)^```$", index, re.MULTILINE | re.DOTALL))
    entry = re.escape(str(page.relative_to(DOCS).with_suffix("")))
    assert page.name == "index.md" or re.search(rf"(?:^|<){entry}(?:>|$)", tables, re.MULTILINE)
