"""The pre-commit hooks run the same checks as `make lint`."""

import re
from pathlib import Path

import yaml

PROJECT = Path(__file__).parents[2]


def _without_flags(command: str) -> str:
    return " ".join(word for word in command.split() if not word.startswith("--"))


def test_hooks_and_lint_run_the_same() -> None:
    (recipe,) = re.findall(
        r"^lint:.*\n((?:\t.+\n)+)", (PROJECT / "Makefile").read_text(), re.MULTILINE
    )
    lint = [_without_flags(line.replace("$(BIN)/", "")) for line in recipe.splitlines()]
    config = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert [_without_flags(hook["entry"].removeprefix(".venv/bin/")) for hook in hooks] == lint
    assert {hook["language"] for hook in hooks} == {"system"}
