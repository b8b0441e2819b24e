"""Runs over several nodes of Ray, which are raylets on this machine: one head, two nodes."""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from infl_cluster import versions
from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.datasets.mnist import default_data_dir
from influence_jobs.kinds import find_kind
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.models.ffdnet import FFDNet
from influence_jobs.models.mnist_mlp import MnistMLP
from influence_jobs.store import layout
from influence_jobs.store.run import Run
from influence_jobs.store.status import is_done, read_status
from influence_jobs.store.verify import find_damage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
ROWS, SHARDS = 256, 8
ONE: dict[str, Any] = {"labels": {"zone": "one"}}
TWO: dict[str, Any] = {"labels": {"zone": "two"}, "num_gpus": 1}


@dataclass
class Nodes:
    """A process with a cluster, whose nodes have one CPU each."""

    process: subprocess.Popen[str]
    environment: Mapping[str, str]
    address: str = ""

    def answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise AssertionError(f"the cluster ended with {self.process.wait()}")

    def ask(self, **command: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def add(self, name: str, *, hidden: str = "", **options: Any) -> str:
        """Add a node, from which a folder may be hidden; returns Ray's id of it."""
        node: str = self.ask(add=name, hidden=hidden, options={"num_cpus": 1, **options})
        return node

    def remove(self, name: str) -> None:
        """Kill a node."""
        self.ask(remove=name)

    def python(self, *words: str, **more: str) -> "subprocess.Popen[str]":
        """Start a program that connects to the cluster, as Ray does for a submitted job."""
        environment = {**self.environment, "RAY_ADDRESS": self.address, **more}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, *words], stdin=pipe, stdout=pipe, stderr=pipe, text=True,
            env=environment,
        )  # fmt: skip

    def drive(self, run: Run, *options: str, **more: str) -> "subprocess.Popen[str]":
        """Start the driver of a run."""
        return self.python("-m", "infl_cluster.driver_main", run.root, run.id, *options, **more)


@pytest.fixture(scope="module")
def nodes(bucket: str) -> Iterator[Nodes]:
    """Two nodes, of which the second has a GPU in name; they reach the bucket."""
    # Not tmp_path: Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="infl-") as folder:
        token = Path(folder, "token")
        token.write_text(secrets.token_hex(32))
        foreign = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
        environment = {
            **{name: value for name, value in os.environ.items() if name not in foreign},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": folder,  # also for the address that Ray leaves to later programs
            "PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(HERE), *sys.path]),
        }
        pipe = subprocess.PIPE
        argv = [sys.executable, str(HERE / "nodes_process.py")]
        with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
            nodes = Nodes(process, environment)
            nodes.address = nodes.answer()
            yield nodes
            left = psutil.Process(process.pid).children(recursive=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=60)  # the end of its input ends it
            process.kill()
            _, alive = psutil.wait_procs(left, timeout=3)  # an agent may outlive its node
            for one in alive:
                one.kill()


@pytest.fixture(scope="module")
def ids(nodes: Nodes) -> dict[str, str]:
    """Ray's ids of the two nodes."""
    return {"one": nodes.add("one", **ONE), "two": nodes.add("two", **TWO)}


def ended(driver: "subprocess.Popen[str]", code: int = 0) -> str:
    """What a driver said on its standard error, once it has ended."""
    _, err = driver.communicate(timeout=400)
    assert driver.returncode == code, err
    return err


def wait_until(holds: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def at_work(run: Run) -> int:
    return sum(node["at_work"] for node in read_status(run).get("nodes", {}).values())


def arrays(run: Run) -> dict[str, bytes]:
    root = Path(run.files.url, layout.ARRAYS)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def assert_good(run: Run) -> None:
    assert is_done(run)
    check = find_damage(run)
    assert (check.planned, check.damaged, check.missing) == (check.good, {}, ())


def request(nodes: Nodes, root: Path, shards: int, **options: Any) -> Any:
    """What a `RayBackend` of our fakes did with some shards; and on which node each was."""
    root.mkdir()
    driver = nodes.python(str(HERE / "fake_driver.py"))
    told = {
        "root": str(root),
        "ids": [f"ok-{i}" for i in range(shards)],
        "runner": "Placed",
        "options": options,
        "idle_fault": None,
        "quiet_s": 0.0,
    }
    out, _ = driver.communicate(json.dumps(told) + "\n", timeout=300)
    found = json.loads(next(x for x in out.splitlines() if x.startswith("RESULT "))[7:])
    return found, {path.read_text() for path in root.glob("*.node")}


@pytest.mark.slow
def test_nodes_with_other_software_are_told_before_a_shard_is_written(
    nodes: Nodes,
    ids: dict[str, str],
    tmp_path: Path,
    trained_root: Path,
    grad_norms_spec: GradNormsSpec,
) -> None:
    """The driver and where it was submitted have another torch than the nodes."""
    shutil.copytree(trained_root, tmp_path / "runs")
    run = Run.create(str(tmp_path / "runs"), grad_norms_spec)
    other = tmp_path / "other" / "torch-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    path = os.pathsep.join([str(other.parent), nodes.environment["PYTHONPATH"]])
    told = {versions.VARIABLE: json.dumps({"torch": "9.9.9"}), "PYTHONPATH": path}
    said = ended(nodes.drive(run, **told), code=2)
    ours = version("torch")
    assert f"has torch {ours}, and the run was submitted with torch 9.9.9: install the" in said
    assert f"error: node {socket.gethostname()} (" in said
    assert "install the same on the nodes and where you submit" in said
    assert run.manifest.done() == {}
    assert not run.files.names(layout.MANIFEST)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({}, {"one", "two"}),
        ({"node_labels": {"zone": "one"}}, {"one"}),
        ({"num_gpus": 1}, {"two"}),
    ],
    ids=str,
)
def test_workers_are_where_labels_and_gpus_are(
    nodes: Nodes, ids: dict[str, str], tmp_path: Path, options: dict[str, Any], places: set[str]
) -> None:
    found, on = request(nodes, tmp_path / "fakes", 16, **options)
    assert found["fault"] is None
    assert len(found["receipts"]) == 16
    assert on == {ids[place] for place in places}
    assert len({worker for _, worker in found["begun"]}) == len(places)


@pytest.mark.slow
def test_two_workers_share_a_gpu(nodes: Nodes, tmp_path: Path) -> None:
    node = nodes.add("shared", num_cpus=2, num_gpus=1, labels={"zone": "shared"})
    options = {"num_gpus": 0.5, "node_labels": {"zone": "shared"}}
    try:
        found, on = request(nodes, tmp_path / "fakes", 16, **options)
    finally:
        nodes.remove("shared")
    assert (found["fault"], on) == (None, {node})
    assert len({worker for _, worker in found["begun"]}) == 2


@pytest.mark.slow
def test_a_label_that_no_node_has_is_told(
    nodes: Nodes, ids: dict[str, str], tmp_path: Path
) -> None:
    options = {"node_labels": {"zone": "three"}, "placement_timeout_s": 1}
    found, on = request(nodes, tmp_path / "fakes", 2, **options)
    # A node of another test may not be gone for Ray yet.
    have = r"the nodes have zone=one(, zone=shared)?, zone=two"
    said = rf"no node has the label zone=three: {have}; correct --node-label, or add a node with it"
    assert re.fullmatch(said, found["fault"])
    assert on == set()


SHORT = {"curvature_samples": 200, "damping": 0.1, "test": [5, 111]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("influence", {**SHORT, "solver": "cg"}),
        ("ablation", {**SHORT, "k": [50], "by": ["helpful", "random"], "mode": "remove"}),
    ],
)
def test_runs_of_several_steps_over_two_nodes_are_those_of_one_process(
    nodes: Nodes,
    ids: dict[str, str],
    tmp_path: Path,
    trained_root: Path,
    kind: str,
    options: dict[str, Any],
) -> None:
    runs = []
    for name in ("nodes", "here"):
        root = str(tmp_path / name)
        shutil.copytree(trained_root, root)
        (train,) = (path.name for path in Path(root).iterdir())
        found = find_kind(kind).request_type.of({"checkpoint": train, **options})
        (spec,) = found.specs(root, lambda _: None)
        runs.append(Run.create(root, spec))
    over_nodes, here = runs
    driver = nodes.drive(over_nodes)
    drive(here.root, here.id, InlineBackend(threads=1))
    ended(driver)
    for run in (over_nodes, here):
        assert_good(run)
    if here.array_names():
        assert arrays(over_nodes) == arrays(here)
    assert here.table_names() == over_nodes.table_names() != []
    for name in here.table_names():
        assert over_nodes.read_table(name).equals(here.read_table(name)), name
    workers = {
        entry.worker
        for folder in Path(over_nodes.root).iterdir()
        if (folder / layout.SPEC).exists() and "train" not in folder.name
        for entry in Run.open(over_nodes.root, folder.name).manifest.done().values()
        if entry.worker
    }
    assert len(workers) >= 2


READS_FOLDER = """

from influence_jobs.errors import DataError


class OfFolder(SlowTask):
    def train_data(self) -> TensorDataset:
        if not (HERE / "data" / "rows.npy").exists():
            raise DataError(f"no rows in {HERE / 'data'}")
        rows = torch.from_numpy(np.load(HERE / "data" / "rows.npy"))
        return TensorDataset(rows, rows[:, 0].long() % 3)
"""


@pytest.fixture
def slow_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Norms in eight shards, each of which takes as many seconds as the file `nap` says."""
    file = tmp_path / f"{tmp_path.name}.py"  # Python imports one module of a name
    file.write_text((HERE.parent / "faults" / "slow_task.py").read_text() + READS_FOLDER)
    rows = np.random.default_rng(0).normal(size=(SHARDS * ROWS, 5)).astype(np.float32)
    rows[:, 0] = np.arange(len(rows))
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "rows.npy", rows)
    torch.manual_seed(0)
    head = torch.nn.Linear(4, 3)
    weights = {f"head.{name}": value for name, value in head.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pt")
    request = find_kind("grad-norms").request_type.of(
        {
            "task": f"{file}:OfFolder",
            "layer": ["all"],
            "checkpoint": [f"{tmp_path}/weights.pt"],
        }
    )
    (spec,) = request.specs(str(tmp_path / "runs"), lambda _: None)
    return Run.create(str(tmp_path / "runs"), spec)


def reference_of(run: Run, folder: Path) -> dict[str, bytes]:
    """The arrays of the same run, computed in this process."""
    other = Run.create(str(folder), run.spec)
    drive(other.root, other.id, InlineBackend(threads=1), shard_rows=ROWS, batch_size=ROWS)
    return arrays(other)


def test_norms_over_two_nodes_are_those_of_one_process(
    nodes: Nodes, ids: dict[str, str], tmp_path: Path, slow_run: Run
) -> None:
    run = slow_run
    (tmp_path / "hold").write_text(str(ROWS))
    # By default one worker a CPU, and so one on each node.
    driver = nodes.drive(run, "--shard-rows", str(ROWS), "--batch-size", str(ROWS))
    try:
        wait_until(lambda: at_work(run) == 2)
        (tmp_path / "hold").unlink()
        ended(driver)
    finally:
        driver.kill()
    assert_good(run)
    assert arrays(run) == reference_of(run, tmp_path / "reference")
    entries = [entry for s, entry in run.manifest.done().items() if s != layout.FINISH]
    assert {entry.attempt for entry in entries} == {1}
    assert len({entry.worker for entry in entries}) == 2
    assert {entry.threads for entry in entries} == {1}  # of a node with one core


@pytest.mark.slow
def test_a_node_is_lost_and_another_one_joins(
    nodes: Nodes, ids: dict[str, str], tmp_path: Path, slow_run: Run
) -> None:
    run = slow_run
    expected = reference_of(run, tmp_path / "reference")
    (tmp_path / "nap").write_text("1.5")
    sizes = ("--shard-rows", str(ROWS), "--batch-size", str(ROWS))
    driver = nodes.drive(run, "--workers", "2", *sizes)
    try:
        wait_until(lambda: len(run.manifest.done_shards()) >= 1)
        before = {entry.worker for entry in run.manifest.entries()}
        nodes.remove("one")
        nodes.remove("two")
        # Nobody can compute now; the status says what it waits for.
        wait_until(lambda: "waiting for a node" in (read_status(run).get("message") or ""))
        nodes.add("three")
        nodes.add("four")
        ended(driver)
    finally:
        driver.kill()
        for name in ("three", "four"):
            nodes.remove(name)
        ids |= {"one": nodes.add("one", **ONE), "two": nodes.add("two", **TWO)}
    assert_good(run)
    assert arrays(run) == expected
    done = [entry for s, entry in run.manifest.done().items() if s != layout.FINISH]
    assert max(entry.attempt for entry in done) == 2
    assert sum(entry.attempt - 1 for entry in done) <= 2  # what the lost nodes were at
    workers = {entry.worker for entry in done}
    assert workers & before
    assert workers - before


@pytest.mark.slow
def test_a_stopped_worker_on_another_node_is_replaced(
    nodes: Nodes, ids: dict[str, str], tmp_path: Path, slow_run: Run
) -> None:
    run = slow_run
    expected = reference_of(run, tmp_path / "reference")
    (tmp_path / "hold").write_text(str(ROWS * 3))
    sizes = ("--shard-rows", str(ROWS), "--batch-size", str(ROWS))
    driver = nodes.drive(run, "--workers", "1", "--stalled-after", "15", *sizes)
    try:
        wait_until(lambda: len(run.manifest.done_shards()) == 3)
        worker = next(entry.worker for entry in run.manifest.done().values())
        psutil.Process(int(worker.rpartition(":")[2])).suspend()
        (tmp_path / "hold").unlink()
        wait_until(lambda: read_status(run).get("stalled") == 1)
        assert f"in process {worker}, which was ended" in read_status(run)["message"]
        ended(driver)
    finally:
        driver.kill()
    assert_good(run)
    assert arrays(run) == expected
    pid, until = int(worker.rpartition(":")[2]), time.monotonic() + 60
    while psutil.pid_exists(pid) and time.monotonic() < until:  # Ray takes some seconds to kill it
        time.sleep(0.1)
    assert not psutil.pid_exists(pid)
    log = "".join(
        run.files.read(f"{layout.LOGS}/{name}").decode() for name in run.files.names(layout.LOGS)
    )
    assert "shard 000000768-000001024: no progress for 0:1" in log


@pytest.mark.slow
def test_a_run_in_an_object_store_over_two_nodes(
    nodes: Nodes,
    ids: dict[str, str],
    bucket: str,
    tmp_path: Path,
    grad_norms_spec: GradNormsSpec,
    finished_run: Run,
) -> None:
    run = Run.create(f"{bucket}/{tmp_path.name}", grad_norms_spec)
    ended(nodes.drive(run, "--workers", "2", "--shard-rows", "256"))
    assert_good(run)
    for name in finished_run.array_names():
        np.testing.assert_array_equal(run.array(name)[:], finished_run.array(name)[:])
    entries = [entry for s, entry in run.manifest.done().items() if s != layout.FINISH]
    assert len({entry.worker for entry in entries}) == 2


def request_of(data: str, folder: Path, root: Path) -> Run:
    """Norms of MNIST or of patches, whose data lie in `folder`."""
    folder.mkdir()
    options: dict[str, Any]
    if data == "mnist":
        fetched = default_data_dir() / "MNIST" / "raw"
        if not fetched.is_dir():
            pytest.skip("MNIST has not been fetched")
        shutil.copytree(fetched, folder / "MNIST" / "raw")
        options = {"task": "mnist", "data_dir": str(folder), "limit": 1000, "layer": ["1"]}
        model: torch.nn.Module = MnistMLP()
    else:
        rng = np.random.default_rng(0)
        for i in range(2):
            pixels = rng.integers(0, 255, (321, 481, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
        options = {"task": "ffdnet", "images": str(folder), "stride": 9, "layer": ["11"]}
        model = FFDNet(color=True)
    torch.save(model.state_dict(), root.parent / "weights.pt")
    options["checkpoint"] = [str(root.parent / "weights.pt")]
    (spec,) = find_kind("grad-norms").request_type.of(options).specs(str(root), lambda _: None)
    return Run.create(str(root), spec)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "cure"), [("mnist", "run `infl data mnist`"), ("images", "name a folder with jpg")]
)
def test_a_node_without_the_data_is_named_with_the_cure(
    nodes: Nodes, ids: dict[str, str], tmp_path: Path, data: str, cure: str
) -> None:
    run = request_of(data, tmp_path / "data", tmp_path / "runs")
    nodes.add("without", labels={"zone": "without"}, hidden=str(tmp_path / "data"))
    try:
        err = ended(nodes.drive(run, "--node-label", "zone=without"), code=2)
    finally:
        nodes.remove("without")
    (line,) = err.strip().splitlines()
    assert line.startswith(f"error: on node {socket.gethostname()}: ")
    assert str(tmp_path / "data") in line
    assert cure in line
    assert "each node that computes needs the data and weights, at the same place or on" in line
    assert read_status(run)["state"] == "failed"


@pytest.mark.slow
def test_a_node_without_the_folder_of_runs_is_named(
    nodes: Nodes, ids: dict[str, str], tmp_path: Path
) -> None:
    run = request_of("images", tmp_path / "data", tmp_path / "runs")
    nodes.add("without", labels={"zone": "without"}, hidden=run.root)
    try:
        err = ended(nodes.drive(run, "--node-label", "zone=without"), code=2)
    finally:
        nodes.remove("without")
    said = f"on node {socket.gethostname()}: {run.files.url} is not the folder of the run there"
    assert said in err
    assert "put the runs on storage that all nodes share" in err


@pytest.mark.slow
def test_a_node_without_the_data_that_joins_later_does_not_end_the_run(
    nodes: Nodes, ids: dict[str, str], tmp_path: Path, slow_run: Run
) -> None:
    run = slow_run
    expected = reference_of(run, tmp_path / "reference")
    (tmp_path / "hold").write_text(str(ROWS * 3))
    words = ("--node-label", "kind=ours", "--workers", "2")
    sizes = ("--shard-rows", str(ROWS), "--batch-size", str(ROWS))
    nodes.add("with", labels={"kind": "ours"})
    driver = nodes.drive(run, *words, *sizes)
    try:
        wait_until(lambda: len(run.manifest.done_shards()) == 3)
        nodes.add("without", labels={"kind": "ours"}, hidden=str(tmp_path / "data"))
        wait_until(lambda: "goes on without" in (read_status(run).get("message") or ""))
        assert "no rows in " in read_status(run)["message"]
        (tmp_path / "hold").unlink()
        ended(driver)
        nodes.remove("without")
    finally:
        driver.kill()
        nodes.remove("with")
    assert_good(run)
    assert arrays(run) == expected
    assert {entry.attempt for entry in run.manifest.done().values()} == {1}
