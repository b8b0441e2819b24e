"""The folder of runs that a word names."""

from pathlib import Path

import pytest

from influence_jobs.store.folder import runs_folder


def test_one_folder_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "inside")
    monkeypatch.chdir(tmp_path / "deep")
    for word in ("../runs", f"{tmp_path}/deep/../runs", f"{tmp_path}/runs"):
        assert runs_folder(word) == f"{tmp_path}/runs"
    assert runs_folder(tmp_path / "link" / ".." / "runs") == f"{tmp_path}/deep/runs"
    # Another machine may have the link lead elsewhere.
    assert runs_folder(tmp_path / "link" / "runs") == f"{tmp_path}/link/runs"
    assert runs_folder("s3://bucket/a/../b") == "s3://bucket/a/../b"
