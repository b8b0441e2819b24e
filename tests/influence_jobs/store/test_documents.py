"""Files of a run folder that are damaged, or made by a stranger."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from influence_jobs.errors import StoreError
from influence_jobs.store import layout
from influence_jobs.store.documents import (
    Entry,
    Holder,
    JobFile,
    PlanFile,
    ProgressFile,
    Status,
    Width,
    parsed,
)
from influence_jobs.store.files import LocalFiles
from influence_jobs.store.lease import Lease, holder_of
from influence_jobs.store.run import Run, now
from influence_jobs.store.status import rate_and_eta, read_status

KINDS = [Status, PlanFile, Holder, JobFile, ProgressFile, Width, Entry]
GOOD: dict[Any, dict[str, Any]] = {
    Status: {
        "state": "done", "phase": None, "message": None, "started_at": 1.0, "updated_at": 2.0,
        "shards_done": 1, "shards_total": 1, "units_before": 0, "units_done": 3, "units_total": 3,
        "retries": 0, "failures": {},
    },
    PlanFile: {
        "batch_size": 4, "units": 3, "inputs": {}, "shards": [{"id": "0-3", "start": 0, "stop": 3}],
    },
    Holder: {"owner": "a1", "host": "h", "pid": 5, "process_started": 1.5, "beat": 2.5},
    JobFile: {"address": "https://cluster:8265", "submission_id": "train-1"},
    ProgressFile: {"units": 3},
    Width: {"variants_side_by_side": 4},
    Entry: {"shard": "0-3", "start": 0, "stop": 3, "attempt": 1, "spec": "ab"},
}  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@pytest.mark.parametrize("kind", KINDS)
def test_any_json_is_the_document_or_refused(kind: Any) -> None:
    good = GOOD[kind]
    assert parsed(json.dumps(good).encode(), kind, "x") is not None

    @settings(max_examples=300, deadline=None)
    @given(value=JSON, name=st.sampled_from([*good]), replaced=st.booleans())
    def accepts_nothing_else(value: Any, name: str, replaced: bool) -> None:
        data = json.dumps({**good, name: value} if replaced else value).encode()
        try:
            found: Any = parsed(data, kind, "run r: file.json", cure="delete it")
        except StoreError as error:
            assert str(error).startswith("run r: file.json is damaged (")
            assert "\n" not in str(error)
            return
        found = found if isinstance(found, dict) else vars(found)
        assert {*good} <= {*found}
        assert type(found[name]) in (type(good[name]), type(value), float)

    accepts_nothing_else()


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Entry, "files", {"../../.ssh/id": "x"}),
        (Entry, "files", {"/dev/zero": "x"}),
        (Entry, "shard", "../x"),
        (Holder, "owner", "../../x"),
        (Holder, "pid", 0),
        (Holder, "pid", -1),
        (Status, "phase", "../../x"),
        (Status, "phase", "x" * 1000),
        (Holder, "owner", "x" * 1000),
        (Status, "units_done", -1),
        (Status, "started_at", float("nan")),
        (Status, "started_at", 1e300),
        (Status, "units_done", 10**400),
        (Status, "rate", 0.0),
        (Status, "rate", 1e-300),
        (Status, "rate", float("inf")),
        (Entry, "finished_at", 1e300),
        (Entry, "attempt", 10**4000),
        (Holder, "pid", 2**40),
        (Holder, "beat", float("inf")),
        (JobFile, "address", "javascript:alert(1)"),
        (JobFile, "submission_id", "../stop"),
        (PlanFile, "batch_size", 0),
        (Width, "variants_side_by_side", 0),
    ],
)
def test_values_that_would_do_harm_are_refused(kind: Any, field: str, value: Any) -> None:
    with pytest.raises(StoreError, match=r"^x is damaged \("):
        parsed(json.dumps({**GOOD[kind], field: value}).encode(), kind, "x")


def test_the_speed_is_what_the_driver_has_measured() -> None:
    counts = {"units_done": 2, "units_total": 12, "state": "running", "rate": 4.0}
    found = parsed(json.dumps({**GOOD[Status], **counts}).encode(), Status, "x")
    assert rate_and_eta({**found}) == (4.0, 2.5)
    found["work_started_at"] = now() - 1000
    assert rate_and_eta({**found}) == (4.0, 2.5)


def test_a_status_of_an_earlier_version_has_the_mean_speed() -> None:
    """If its work had begun."""
    counts = {"units_done": 2, "units_total": 3, "state": "running"}
    found = parsed(json.dumps({**GOOD[Status], **counts}).encode(), Status, "x")
    assert rate_and_eta({**found}) is None
    found["work_started_at"] = now() - 4
    assert rate_and_eta({**found}) == pytest.approx((0.5, 2), rel=0.1)


def test_a_lease_of_null_does_not_hang(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    files.write(layout.LEASE, b"null")
    with pytest.raises(StoreError, match=r"lease\.json is damaged"), Lease(files):
        pass


def test_a_lost_answer_does_not_lock_the_driver_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has written the lease, but says that it exists: the holder is oneself."""
    create = LocalFiles.create

    def answer_is_lost(self: LocalFiles, name: str, data: bytes) -> bool:
        create(self, name, data)
        return False

    files = LocalFiles(tmp_path)
    monkeypatch.setattr(LocalFiles, "create", answer_is_lost)
    with Lease(files) as lease:
        assert not lease.lost.is_set()
    assert files.names("") == []


def link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "secret")


def folder_link(path: Path) -> None:
    path.parent.rmdir()
    path.parent.symlink_to(path.parent.parent.parent / "elsewhere")


@pytest.mark.parametrize("plant", [link, folder_link])
def test_no_link_is_followed_out_of_the_folder(
    tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    files = LocalFiles(tmp_path / "runs")
    (tmp_path / "runs/report").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    secrets = [tmp_path / "secret", tmp_path / "runs/secret", tmp_path / "elsewhere/report.html"]
    for secret in secrets:
        secret.write_text("mine")
    plant(tmp_path / "runs/report/report.html")
    name = "report/report.html"
    for act in (
        lambda: files.read(name),
        lambda: files.write(name, b"theirs"),
        lambda: files.create(name, b"theirs"),
        lambda: files.delete(name),
    ):
        with pytest.raises(StoreError, match="may lead out of its folder: put a copy in place"):
            act()
    assert [secret.read_text() for secret in secrets] == ["mine"] * 3


def test_names_do_not_lead_out_and_only_plain_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    files = LocalFiles(tmp_path / "runs")
    for name in ("../secret", "a/../../secret", str(tmp_path / "secret")):
        with pytest.raises(StoreError, match="may lead out of its folder"):
            files.read(name)
    files.write("status.json", b"{}")
    os.mkfifo(tmp_path / "runs/pipe")
    with pytest.raises(StoreError, match="pipe is not a plain file: delete it"):
        files.read("pipe")


@pytest.mark.parametrize("planted", ["zarr.json", "x/zarr.json", "x/c/0", "x/c", "x"])
def test_arrays_are_neither_read_nor_written_through_links(tmp_path: Path, planted: str) -> None:
    files = LocalFiles(tmp_path / "run")

    def array() -> Any:
        return zarr.open_group(files.zarr_store("data.zarr"), mode="r+")["x"]

    made = zarr.open_group(files.zarr_store("data.zarr"), mode="a")
    made.create_array("x", shape=(4,), chunks=(2,), dtype="float32")[:] = 1
    place, outside = tmp_path / "run/data.zarr" / planted, tmp_path / "outside"
    place.rename(outside)
    place.symlink_to(outside)
    before = {path: path.read_bytes() for path in [outside, *outside.rglob("*")] if path.is_file()}
    for act in (lambda: array()[:], lambda: array().__setitem__(slice(None), 2)):
        with pytest.raises(StoreError, match="may lead out of its folder: put a copy in place"):
            act()
    after = {path: path.read_bytes() for path in [outside, *outside.rglob("*")] if path.is_file()}
    assert after == before


@pytest.mark.parametrize("planted", ["zarr.json", "x/zarr.json", "x/c/0"])
def test_a_pipe_among_arrays_does_not_hold_the_reader(tmp_path: Path, planted: str) -> None:
    files = LocalFiles(tmp_path)
    made = zarr.open_group(files.zarr_store("data.zarr"), mode="a")
    made.create_array("x", shape=(4,), chunks=(2,), dtype="float32")[:] = 1
    place = tmp_path / "data.zarr" / planted
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(StoreError, match="is not a plain file: delete it"):
        zarr.open_group(files.zarr_store("data.zarr"), mode="r+")["x"][:]  # type: ignore[index]


@pytest.mark.parametrize(
    "name", ["spec.json", "plan.json", "status.json", "lease.json", "manifest/a.json"]
)
def test_a_document_without_an_end_is_not_read(
    tmp_path: Path, finished_run: Run, name: str
) -> None:
    """A file of a terabyte, which takes no space."""
    shutil.copytree(finished_run.files.url, tmp_path / finished_run.id)
    with (tmp_path / finished_run.id / name).open("ab") as file:
        file.truncate(2**40)
    with pytest.raises(StoreError, match=rf"{name} has 1\.1 TB, which is more than a run writes"):
        run = Run.open(str(tmp_path), finished_run.id)
        run.plan()
        holder_of(run.files)
        run.manifest.done()
        read_status(run)


def test_an_endless_summary_is_not_read_either(tmp_path: Path, finished_run: Run) -> None:
    shutil.copytree(finished_run.files.url, tmp_path / finished_run.id)
    with (tmp_path / finished_run.id / "summary.json").open("ab") as file:
        file.truncate(2**40)
    assert Run.open(str(tmp_path), finished_run.id).digest() == finished_run.digest()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_nested_without_end_is_refused(kind: Any) -> None:
    for text in (b"[" * 10**6, b'{"files":' * 10**5, b'{"failures": ' + b'{"a":' * 10**5):
        with pytest.raises(StoreError, match=r"^x is damaged \("):
            parsed(text, kind, "x")
