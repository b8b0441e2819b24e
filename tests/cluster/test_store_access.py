import json
import os
import stat
from pathlib import Path

import pytest

from infl_cluster import store_access
from infl_cluster.supervisor import Supervisor
from influence_jobs.errors import RuntimeFault


def test_a_job_gets_the_variables_of_its_submit_through_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("OTHER", "x")
    env = store_access.keep(tmp_path / "access", "job-1")
    assert "secret" not in json.dumps(dict(env))
    (path,) = (tmp_path / "access").iterdir()
    assert [stat.S_IMODE(p.stat().st_mode) for p in (path.parent, path)] == [0o700, 0o600]
    assert json.loads(path.read_text())["AWS_SECRET_ACCESS_KEY"] == "secret"
    assert "OTHER" not in json.loads(path.read_text())

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of the time when Ray was started")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    store_access.take()
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "secret"
    assert store_access.for_workers() == env
    store_access.forget()
    assert not path.exists()


def test_without_a_file_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(store_access.FILE_VARIABLE, raising=False)
    before = dict(os.environ)
    store_access.take()
    store_access.forget()
    assert dict(os.environ) == before
    assert store_access.for_workers() == {}


def test_ray_itself_has_no_variables_of_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be stale in jobs that are submitted later."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "old")
    monkeypatch.setenv("PLAIN", "kept")
    supervisor = Supervisor(tmp_path, idle_timeout_s=None, num_cpus=None, num_gpus=None)
    environment = supervisor._environment()
    assert "AWS_SESSION_TOKEN" not in environment
    assert environment["PLAIN"] == "kept"


def test_the_files_of_jobs_that_were_killed_are_deleted(tmp_path: Path) -> None:
    for job in ("killed", "running", "submitting"):
        store_access.keep(tmp_path / "access", job)
    for job in ("killed", "running"):
        os.utime(tmp_path / "access" / f"{job}.json", (0, 0))
    supervisor = Supervisor(tmp_path, idle_timeout_s=None, num_cpus=None, num_gpus=None)

    class Client:
        def unfinished(self) -> list[str]:
            return ["running"]

    supervisor._forget_access(Client())  # type: ignore[arg-type]
    assert sorted(store_access.kept(tmp_path / "access")) == ["running", "submitting"]
    supervisor._forget_access(Silent())  # type: ignore[arg-type]
    assert len(store_access.kept(tmp_path / "access")) == 2


class Silent:
    def unfinished(self) -> list[str]:
        raise RuntimeFault("no Ray answers")
