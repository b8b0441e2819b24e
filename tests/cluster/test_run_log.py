"""The log of a driver costs a record no more when it is long."""

import logging
import time
from pathlib import Path

import pytest

from infl_cluster import run_log as module
from infl_cluster.run_log import run_log
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.store import layout
from influence_jobs.store.files import LocalFiles
from influence_jobs.store.run import Run

log = logging.getLogger("infl_cluster.test")


@pytest.fixture
def run(tmp_path: Path, grad_norms_spec: GradNormsSpec) -> Run:
    return Run.create(str(tmp_path), grad_norms_spec)


def lines(run: Run) -> list[str]:
    names = run.files.names(layout.LOGS)
    text = b"".join(run.files.read(f"{layout.LOGS}/{name}") for name in names)
    return text.decode().splitlines()


def test_a_long_log_is_written_about_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    original = LocalFiles.write

    def write(self: LocalFiles, name: str, data: bytes, *, durable: bool = True) -> None:
        written.append(len(data))
        original(self, name, data, durable=durable)

    monkeypatch.setattr(LocalFiles, "write", write)
    monkeypatch.setattr(module, "WRITE_EVERY_S", 1e6)
    with run_log(run):
        for i in range(5000):
            log.info("shard %09d done in 0.01 s, attempt 1", i)
    found = lines(run)
    assert [int(line.split()[4]) for line in found] == [*range(5000)]
    size = sum(len(line) + 1 for line in found)
    assert sum(written) == size
    assert max(written) < 2 * module.PART_BYTES < size


def test_what_is_said_is_on_disk_while_nothing_more_is_said(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITE_EVERY_S", 0.02)
    with run_log(run):
        log.info("first")
        deadline = time.monotonic() + 20
        while not lines(run):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        log.warning("second")
    assert [line.split()[-1] for line in lines(run)] == ["first", "second"]


def test_a_log_that_could_not_be_written_is_written_later(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    original = LocalFiles.write
    monkeypatch.setattr(module, "WRITE_EVERY_S", 0.02)
    with run_log(run):
        monkeypatch.setattr(LocalFiles, "write", full)
        log.info("told")
        time.sleep(0.1)
        monkeypatch.setattr(LocalFiles, "write", original)
    assert [line.split()[-1] for line in lines(run)] == ["told"]


def test_the_last_words_are_the_error(run: Run) -> None:
    with pytest.raises(ZeroDivisionError), run_log(run):
        raise ZeroDivisionError("one by nought")
    assert lines(run)[-1] == "ZeroDivisionError: one by nought"


def test_a_link_in_place_of_the_log_does_not_end_the_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITE_EVERY_S", 0.02)
    monkeypatch.setattr(module, "PART_BYTES", 10)
    link = Path(run.files.url, layout.LOGS)
    link.symlink_to(tmp_path)
    with run_log(run):
        log.info("told")
        time.sleep(0.1)  # the thread meets the link as well
        link.unlink()
        deadline = time.monotonic() + 20
        while not lines(run):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert [line.split()[-1] for line in lines(run)] == ["told"]
    assert not [*tmp_path.glob("*.log")]
