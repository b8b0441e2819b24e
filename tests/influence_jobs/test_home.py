"""What is remembered between commands, and where nothing can be."""

from pathlib import Path

import pytest

from influence_jobs.errors import RuntimeFault
from influence_jobs.home import infl_home, is_known, make_known


@pytest.mark.parametrize("home", ["own", "file/below"])
def test_what_the_user_names_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    """Also where the folder cannot be made, for as long as the command lasts."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("INFL_HOME", str(tmp_path / home))
    name = f"https://{tmp_path}"
    assert not is_known("cluster", name)
    make_known("cluster", name)
    assert is_known("cluster", name)
    assert not is_known("code", name)
    assert not is_known("cluster", f"{name}/other")


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(_path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("INFL_HOME")
    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(RuntimeFault, match="set INFL_HOME to a folder of yours"):
        infl_home()
    make_known("code", "a file")
