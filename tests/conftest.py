"""Fixtures for all tests."""

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import psutil
import pytest
import torch
from playwright.sync_api import Browser, sync_playwright

from infl_cluster.driver import drive
from infl_cluster.head import Head, ensure_head, stop_head
from infl_cluster.inline import InlineBackend
from influence_jobs.kinds.grad_norms.job import GradNormsJob
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.kinds.train.spec import TrainedCheckpoint, TrainSpec
from influence_jobs.specs.base import TaskSpec, make_spec
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.registry import make_task
from influence_jobs.tasks.trust import trust_all

# A suite started in the background of a shell ignores Ctrl-C, and so would what it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Nothing of a test is remembered in the user's own folder.
os.environ["INFL_HOME"] = tempfile.mkdtemp(prefix="infl-home-")
atexit.register(shutil.rmtree, os.environ["INFL_HOME"], ignore_errors=True)
# Tiny tensors: a second thread only waits for the first, here and in what a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

trust_all()  # tests make specs without naming their tasks in a command

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
sys.path.insert(0, str(EXAMPLES.parent / "docs" / "site"))

CHROMIUM = [path for name in ("chromium", "google-chrome") if (path := shutil.which(name))]
# Without these options the browser asks its vendor's hosts for updates.
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]
FOREIGN = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def pytest_collection_finish() -> None:
    """Leave what is loaded by now out of garbage collections, of which a run makes several."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What a command set in this process ends with the test: more threads round otherwise."""
    yield
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="the only random schedule of faults to run")


def _processes_of(head: Head) -> list[psutil.Process]:
    """Processes of a head, found by ancestry and by its folder on their command line."""
    found = []
    if psutil.pid_exists(head.pid):
        supervisor = psutil.Process(head.pid)
        found = [supervisor, *supervisor.children(recursive=True)]
    for process in psutil.process_iter(["cmdline"]):
        if any(str(head.temp_dir) in word for word in process.info["cmdline"] or ()):
            found.append(process)
    return _alive(found)


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it has ended since it was listed
        return False


@pytest.fixture(scope="session")
def processes_of() -> Callable[[Head], list[psutil.Process]]:
    """Finds the processes of a head, in another way than the code under test."""
    return _processes_of


@pytest.fixture(scope="session")
def alive() -> Callable[[list[psutil.Process]], list[psutil.Process]]:
    """The processes that still run."""
    return _alive


@pytest.fixture(scope="session")
def ray_head() -> Iterator[Head]:
    """One Ray with two CPUs for all tests, under an INFL_HOME of its own."""
    # Not tmp_path: Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="infl-") as home, pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFL_HOME", home)
        for name in FOREIGN:
            patch.delenv(name, raising=False)
        # A job submitted by --address runs the `python` of its nodes.
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        head = ensure_head(idle_timeout_s=None, num_cpus=2)
        yield head
        processes = _processes_of(head)
        assert len(processes) > 5
        stop_head(head)
        assert _alive(processes) == []
        assert _processes_of(head) == []
        assert not (Path(os.environ["INFL_HOME"]) / "head.json").exists()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for all tests: Playwright begins only once in a process."""
    if not CHROMIUM:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM[0], args=QUIET)
        yield found
        found.close()


@pytest.fixture(scope="session")
def digits_task() -> Task:
    """The example task: real data, a convolutional net with BatchNorm, fast epochs."""
    return make_task(TaskSpec(name="digits:DigitsTask", data=""))


@pytest.fixture(scope="session")
def grad_norms_spec(digits_task: Task) -> GradNormsSpec:
    """Norms of three layers of a short training of the example."""
    task = TaskSpec(name="digits:DigitsTask", options={"width": 8}, data=digits_task.fingerprint())
    train = make_spec(TrainSpec, task=task, epochs=2, batch_size=32, lr=0.05, save_epochs=(1, 2))
    return make_spec(
        GradNormsSpec,
        task=task,
        checkpoints=(TrainedCheckpoint(train=train, epoch=2),),
        layers=("conv1", "conv2", "head"),
    )


@pytest.fixture(scope="session")
def trained_root(tmp_path_factory: pytest.TempPathFactory, grad_norms_spec: GradNormsSpec) -> Path:
    """A folder of runs with the example's training only. Copy it before writing."""
    root = tmp_path_factory.mktemp("trained")
    train = GradNormsJob.inputs(grad_norms_spec)[0]
    drive(str(root), Run.create(str(root), train).id, InlineBackend())
    return root


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, trained_root: Path, grad_norms_spec: GradNormsSpec
) -> Run:
    """The example's norms, computed in this process in shards of the default size. Do not write."""
    root = tmp_path_factory.mktemp("finished") / "runs"
    shutil.copytree(trained_root, root)
    run = Run.create(str(root), grad_norms_spec)
    drive(str(root), run.id, InlineBackend())
    return run


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of an empty bucket of a server that speaks S3."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # All servers of a process have the same buckets.
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ALLOW_HTTP", "true")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="runs")
        yield "s3://runs"
    server.stop()
