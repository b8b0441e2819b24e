"""Completion of words in bash and zsh, as the shells ask for it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from influence_jobs.kinds import kinds

KINDS = sorted(name for name in kinds() if name.startswith("gr"))
SLOW = {"torch", "ray", "sklearn", "scipy", "matplotlib"}
WATCHED = f"""
import atexit, sys
atexit.register(lambda: print(*sorted({SLOW!r} & set(sys.modules)), file=sys.stderr))
from infl_cli.entry import main
main()
"""


def _asked(**variables: str) -> list[str]:
    """What `infl` answers to a shell; loads nothing that takes seconds."""
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == "\n"
    return done.stdout.splitlines()


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """A folder with the script `infl`, as pip would write it."""
    script = tmp_path / "bin" / "infl"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nfrom infl_cli.entry import main\nmain()\n")
    script.chmod(0o755)
    return script.parent


def _shell(shell: str, script: str, bin_folder: Path) -> list[str]:
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [shell, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def _zsh_names(told: str) -> list[str]:
    return sorted(re.findall(r'"([\w-]+)":"', told))


def test_there_are_several_kinds_that_begin_alike() -> None:
    assert {"grad-norms", "gradients", "gradient-scores"} <= set(KINDS)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("infl submit gr", KINDS),
        ("infl doc", ["doctor"]),
        ("infl submit grad-norms --red", ["--reduce"]),
        ("infl submit grad-norms --reduce k", ["kernel"]),
    ],
)
def test_what_bash_is_told(words: str, found: list[str]) -> None:
    count = str(len(words.split()) - 1)
    told = _asked(_INFL_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=count)
    assert sorted(told) == found


def test_what_zsh_is_told() -> None:
    told = _asked(_INFL_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="infl submit gr")
    assert told[0].startswith("_arguments '*: :((")
    assert _zsh_names("".join(told)) == KINDS


def test_bash_completes(bin_folder: Path) -> None:
    script = """
    source <(_INFL_COMPLETE=source_bash infl)
    complete -p infl
    COMP_WORDS=(infl submit gr) COMP_CWORD=2
    _infl_completion infl
    printf '%s\\n' "${COMPREPLY[@]}"
    """
    bound, *found = _shell("bash", script, bin_folder)
    assert bound == "complete -o default -F _infl_completion infl"
    assert sorted(found) == KINDS


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_completes(bin_folder: Path) -> None:
    script = """
    autoload -Uz compinit && compinit -D -u
    source <(_INFL_COMPLETE=source_zsh infl)
    echo $_comps[infl]
    _arguments() { print -r -- $1 }
    words=(infl submit gr) CURRENT=3
    _infl_completion
    """
    bound, told = _shell("zsh", script, bin_folder)
    assert bound == "_infl_completion"
    assert _zsh_names(told) == KINDS
