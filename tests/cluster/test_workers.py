"""Stored bytes depend neither on the number of workers nor on the size of shards."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from infl_cluster.head import recorded_head, stop_head
from influence_jobs.models.ffdnet import FFDNet

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def home() -> Iterator[None]:
    with (
        tempfile.TemporaryDirectory(prefix="infl-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("INFL_HOME", folder)
        yield
        head = recorded_head()
        if head is not None:
            stop_head(head)


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A request of twelve shards of about two seconds."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "ffdnet.pt"
    torch.save(FFDNet(color=True).state_dict(), path)
    words = f"submit grad-norms --layer 11 --checkpoint {path} --stride 17 --limit 3072"
    return words.split()


def stored(request_: list[str], *words: str, runs: Path) -> dict[str, bytes]:
    """The bytes of the arrays of a run."""
    command = [sys.executable, "-c", "from infl_cli.main import main; main()", *request_, *words]
    result = subprocess.run(
        [*command, "--runs", str(runs)], capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    (run,) = runs.iterdir()
    root = run / "data.zarr"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def reference(request_: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same request in one process on all cores; each worker has one core."""
    return stored(request_, "--local", runs=tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("shard_size", ["256", "1024"])
def test_any_number_of_workers_and_any_shard_size_store_the_same_bytes(
    request_: list[str], tmp_path: Path, reference: dict[str, bytes], workers: str, shard_size: str
) -> None:
    sizes = ("--workers", workers, "--shard-size", shard_size)
    assert stored(request_, *sizes, runs=tmp_path) == reference
