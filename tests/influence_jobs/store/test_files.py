"""One contract for all kinds of files: a local folder, and a bucket of an S3 server."""

import errno
import hashlib
import os
import shutil
import threading
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from influence_jobs.errors import StoreError
from influence_jobs.store import object_files
from influence_jobs.store.files import LocalFiles, open_files
from influence_jobs.store.object_files import ObjectFiles, StorageError, be_patient


@pytest.fixture(params=["local", "s3"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> LocalFiles | ObjectFiles:
    if request.param == "local":
        return open_files(str(tmp_path / "root"))
    return open_files(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


def test_written_files_read_back_and_can_be_replaced(files: LocalFiles | ObjectFiles) -> None:
    files.write("folder/name.json", b"one")
    files.write("folder/name.json", b"two")
    assert files.read("folder/name.json") == b"two"
    assert files.names("folder") == ["name.json"]
    assert files.folders() == ["folder"]


@pytest.mark.parametrize("size", [0, 19, 40])
def test_a_large_file_is_written_and_summed_without_being_read_whole(
    files: LocalFiles | ObjectFiles, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(object_files, "PIECE_BYTES", 20)
    data = bytes(range(size))
    files.write("folder/large", b"old")
    files.write_by("folder/large", lambda path: path.write_bytes(data))
    assert files.names("folder") == ["large"]
    assert files.read("folder/large") == data
    assert files.checksum("folder/large") == hashlib.sha256(data).hexdigest()


def test_a_file_that_cannot_be_made_leaves_the_old_one(files: LocalFiles | ObjectFiles) -> None:
    files.write("name", b"old")

    def half(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        files.write_by("name", half)
    assert files.read("name") == b"old"
    assert files.names("") == ["name"]


def test_missing_files(files: LocalFiles | ObjectFiles) -> None:
    with pytest.raises(FileNotFoundError):
        files.read("nothing")
    with pytest.raises(FileNotFoundError):
        files.checksum("nothing")
    files.delete("nothing")
    assert files.names("nowhere") == []
    assert files.folders() == []


def test_create_keeps_what_is_there(files: LocalFiles | ObjectFiles) -> None:
    assert files.create("lease", b"first")
    assert not files.create("lease", b"second")
    assert files.read("lease") == b"first"
    files.delete("lease")
    assert files.create("lease", b"third")


def test_of_many_creators_one_wins(files: LocalFiles | ObjectFiles) -> None:
    wins: list[int] = []

    def contend(number: int) -> None:
        if files.create("lease", str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=contend, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert files.read("lease") == str(wins[0]).encode()


def test_names_are_of_one_folder_only(files: LocalFiles | ObjectFiles) -> None:
    for name in ("a/2", "a/1", "a/deeper/3", "b/4"):
        files.write(name, b"")
    assert files.names("a") == ["1", "2"]
    assert files.sub("a").names("deeper") == ["3"]


def test_arrays_can_be_kept_there(files: LocalFiles | ObjectFiles) -> None:
    array = zarr.create_array(
        files.zarr_store("data.zarr"), shape=(10, 3), chunks=(5, 3), dtype="float32"
    )
    array[:5] = np.ones((5, 3))
    again = zarr.open_array(files.zarr_store("data.zarr"), mode="r")
    assert float(np.asarray(again[:5]).sum()) == 15


def test_a_killed_writer_leaves_no_half_file(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    files.write("manifest/a.json", b"whole")
    (tmp_path / "manifest" / "b.json.0123.partial").write_bytes(b"ha")
    assert files.names("manifest") == ["a.json"]
    (tmp_path / "a-folder.partial").mkdir()
    files.sweep()
    assert [p.name for p in (tmp_path / "manifest").iterdir()] == ["a.json"]


def test_files_can_be_created_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    files = LocalFiles(tmp_path)
    assert files.create("lease", b"first")
    assert not files.create("lease", b"second")
    assert files.read("lease") == b"first"


def test_folders_that_cannot_be_opened_are_not_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.open

    def as_on_windows(path: Path, flags: int, *more: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(path, flags, *more)

    monkeypatch.setattr(os, "open", as_on_windows)
    files = LocalFiles(tmp_path)
    files.write("name", b"data")
    assert files.read("name") == b"data"


def test_free_space_is_told_without_posix_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.delattr(os, "statvfs")  # as on Windows, where shutil has other means
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert LocalFiles(tmp_path / "not" / "there").free_bytes() == usage.free


@pytest.mark.parametrize(
    ("kind", "expected", "number"),
    [
        ("GenericError", OSError, errno.EIO),
        ("PermissionDeniedError", PermissionError, errno.EACCES),
        ("UnauthenticatedError", PermissionError, errno.EACCES),
    ],
)
@pytest.mark.parametrize("operation", ["read", "write", "create", "delete", "names", "folders"])
def test_errors_of_an_object_store_are_os_errors(
    bucket: str, kind: str, expected: type[OSError], number: int, operation: str
) -> None:
    import obstore.exceptions

    class Broken:
        def __getattr__(self, _name: str) -> object:
            raise getattr(obstore.exceptions, kind)("no answer\nDebug source: ...")

    files = ObjectFiles(bucket)
    files._store = Broken()
    arguments = {"folders": (), "write": ("name", b""), "create": ("name", b"")}
    with pytest.raises(expected, match=r"no answer; check the bucket") as error:
        getattr(files, operation)(*arguments.get(operation, ("name",)))
    assert error.value.errno == number


class Overloaded(BaseHTTPRequestHandler):
    """An S3 server that says 503 many times before it answers."""

    left = 0

    def do_GET(self) -> None:
        found = b"here"
        if type(self).left:
            type(self).left -= 1
            self.send_response(503)
            found = b""
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(found)))
        self.send_header("Last-Modified", "Wed, 21 Oct 2026 07:28:00 GMT")
        self.send_header("ETag", '"1"')
        self.end_headers()
        self.wfile.write(found)

    def log_message(self, *_: object) -> None:
        pass


def test_a_driver_outlasts_an_overloaded_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A command gives up soon; a driver repeats for minutes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Overloaded)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x"), ("AWS_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}"), ("AWS_ALLOW_HTTP", "true"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_files, "_patient", False)
    fast = {"backoff": {"init_backoff": timedelta(milliseconds=1),
                        "max_backoff": timedelta(milliseconds=2), "base": 2}}  # fmt: skip
    for retry in (object_files._SOON, object_files._LATE):
        assert "backoff" not in retry
        monkeypatch.setitem(retry, "backoff", fast["backoff"])
    Overloaded.left = 60
    with pytest.raises(StorageError, match="503"):
        ObjectFiles("s3://runs").read("x")
    be_patient()
    assert ObjectFiles("s3://runs").read("x") == b"here"
    assert object_files._LATE["retry_timeout"] >= timedelta(minutes=5)
    server.shutdown()


def test_missing_credentials_are_told_as_such() -> None:
    """Not as the address of a service of the cloud, which is asked last."""
    error = OSError("Error performing PUT http://169.254.169.254/latest/api/token: 403")
    told = object_files.storage_message(error, "s3://runs")
    assert told == (
        "s3://runs: there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )


@pytest.mark.parametrize("times", [3, 20])
def test_an_answer_that_breaks_off_is_asked_for_again(
    bucket: str, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    import obstore.exceptions

    monkeypatch.setattr(object_files, "_PAUSE_S", 0.0)
    left = [times]

    class Breaking:
        def list_with_delimiter(self, *_: object) -> dict[str, list[object]]:
            left[0] -= 1
            if left[0]:
                raise obstore.exceptions.GenericError("request or response body error")
            return {"objects": [], "common_prefixes": []}

    files = ObjectFiles(bucket)
    files._store = Breaking()
    if times < 10:
        assert files.names("") == []
    else:
        with pytest.raises(StorageError, match="body error"):
            files.names("")


def test_a_bucket_that_is_not_there_is_an_os_error(bucket: str) -> None:
    with pytest.raises(OSError, match="nosuch"):
        ObjectFiles(f"{bucket}-nosuch/folder").write("name", b"")


def test_unknown_places_are_refused() -> None:
    with pytest.raises(StoreError, match="ftp://host/runs: use a path, s3://"):
        open_files("ftp://host/runs")


@pytest.mark.parametrize("size", [19, 20, 25, 40])
def test_a_large_object_is_read_in_pieces(
    bucket: str, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Each request has a deadline of its own, which a large file would not meet as a whole."""
    monkeypatch.setattr(object_files, "PIECE_BYTES", 20)
    files = ObjectFiles(bucket)
    data = bytes(range(size))
    files.write("large", data)
    asked: list[Any] = []
    store = files._store

    class Asked:
        def get(self, name: str, **options: Any) -> Any:
            asked.append(options.get("options", {}).get("range"))
            return store.get(name, **options)

    monkeypatch.setattr(files, "_store", Asked())
    assert files.read("large") == data
    assert asked == ([None] if size <= 20 else [None, (0, 20), (20, size)])


def test_an_error_of_a_sync_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a shard would be done whose data the disk has refused."""
    files = LocalFiles(tmp_path)
    files.write("a/x", b"x")

    def refuses(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fsync", refuses)
    with pytest.raises(OSError, match="Input/output error"):
        files.sync(["a/x"])
