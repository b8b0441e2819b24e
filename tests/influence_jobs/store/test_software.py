"""Which revision of the code a result says it was made with."""

import subprocess
from collections.abc import Iterator

import pytest

from influence_jobs.store import software as module
from influence_jobs.store.software import software


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    software.cache_clear()
    yield
    software.cache_clear()


def git(monkeypatch: pytest.MonkeyPatch, *, tracked: str, described: str = "") -> None:
    monkeypatch.setattr(module, "_says", lambda c: tracked if "ls-files" in c else described)


def test_versions_are_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_OTHERS", ("torch", "no-such-package"))
    git(monkeypatch, tracked="software.py", described="0123456789ab+changes")
    found = software()
    assert set(found) == {"influence-jobs", "torch", "python", "revision"}
    assert found["revision"] == "0123456789ab+changes"


def test_a_repository_of_someone_elses_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_installed_from", lambda: None)
    git(monkeypatch, tracked="", described="0123456789ab")
    assert "revision" not in software()


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 5.0)])
def test_without_git_it_is_what_pip_installed(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_: list[str]) -> str:
        raise error

    class Installed:
        text: str | None = '{"vcs_info": {"vcs": "git", "commit_id": "abc"}}'

        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return self.text

    monkeypatch.setattr(module, "_says", fail)
    monkeypatch.setattr(module, "distribution", lambda _: Installed())
    assert software()["revision"] == "abc"
    for text in (None, '{"dir_info": {"editable": true}}'):
        software.cache_clear()
        monkeypatch.setattr(Installed, "text", text)
        assert "revision" not in software()
