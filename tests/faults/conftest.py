"""The world that is disturbed, and the record of what came of it."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fault_proxy import Proxy
from fault_schedules import NUM_SCHEDULES
from faults_base import ForkServer, World, arrays_of, stored_in
from faults_s3 import SECRET

from infl_cluster.head import recorded_head, stop_head


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def undisturbed(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A run that nothing happens to."""
    world = World(fork_server, tmp_path_factory.mktemp("undisturbed"))
    world.complete()
    world.reference, world.expected = stored_in(world.run), arrays_of(world.run)
    return world


@pytest.fixture
def world(fork_server: ForkServer, undisturbed: World, tmp_path: Path) -> Iterator[World]:
    found = World(fork_server, tmp_path / "world", reference=undisturbed.reference,
                  expected=undisturbed.expected)  # fmt: skip
    yield found
    found.close()


@pytest.fixture(scope="session")
def ray_home() -> Iterator[str]:
    """An INFL_HOME with a short path, for a Ray of two CPUs that runs share until one kills it."""
    with tempfile.TemporaryDirectory(prefix="infl-") as folder:
        yield folder


@pytest.fixture
def ray_world(world: World, ray_home: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("INFL_HOME", ray_home)
    world.env["INFL_HOME"] = ray_home
    world.how = ("--workers", "2")
    yield world
    world.let_go()


@pytest.fixture
def s3_world(world: World, bucket: str, tmp_path: Path) -> Iterator[World]:
    """Runs in a bucket, which commands reach through a proxy and the judge directly."""
    server = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    assert server.hostname is not None
    assert server.port is not None
    world.proxy = Proxy(server.hostname, server.port)
    world.root = f"{bucket}/{tmp_path.name}"
    names = ("AWS_ACCESS_KEY_ID", "AWS_REGION", "AWS_ALLOW_HTTP")
    world.env |= {name: os.environ[name] for name in names}
    world.env |= {"AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": world.proxy.url}
    yield world
    world.proxy.close()


@pytest.fixture
def s3_ray_world(s3_world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="infl-") as home:
        monkeypatch.setenv("INFL_HOME", home)
        s3_world.env["INFL_HOME"] = home
        yield s3_world
        if head := recorded_head():
            stop_head(head)


@pytest.fixture(scope="session", autouse=True)
def no_ray_is_left(ray_home: str) -> Iterator[None]:
    yield
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFL_HOME", ray_home)
        if head := recorded_head():
            stop_head(head)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        one = metafunc.config.getoption("--seed")
        metafunc.parametrize("seed", [one] if one is not None else range(NUM_SCHEDULES))
