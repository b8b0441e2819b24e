"""A folder of small files on a local disk or in an object store, with the few operations runs need.

Both kinds replace a file atomically, can create a file only if it is absent, and raise OSError if
something goes wrong. Nothing here knows what the files hold.
"""

import contextlib
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import (
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from influence_jobs.errors import StoreError
from influence_jobs.terms import size

if TYPE_CHECKING:
    from influence_jobs.store.object_files import ObjectFiles

T = TypeVar("T")

SYNCS = 16  # files and folders to wait for at a time
PARTIAL = ".partial"  # suffix of files being written, ours and Zarr's


class Files(Protocol):
    """Files below one folder. A file is named by its relative POSIX path."""

    url: str

    def read(self, name: str, *, most: int | None = None) -> bytes:
        """The bytes of a file.

        Args:
            most: Bytes that it may have.

        Raises:
            FileNotFoundError: There is no such file.
            StoreError: It is larger.
        """

    def read_all(self, names: Sequence[str], *, most: int | None = None) -> list[bytes | None]:
        """The bytes of many files; None for those that do not exist."""

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Replace the file as a whole: a reader sees the old bytes or the new ones, never a mix.

        Args:
            durable: Whether it must outlast a power cut; else the file may be empty or old then.
        """

    def write_by(self, name: str, written: Callable[[Path], object]) -> None:
        """Replace the file as a whole by one that `written` makes at a path of this machine.

        So a file of many gigabytes need not be in memory.
        """

    def checksum(self, name: str) -> str:
        """SHA-256 of a file, in hexadecimal. It is read in pieces.

        Raises:
            FileNotFoundError: There is no such file.
        """

    def create(self, name: str, data: bytes) -> bool:
        """Write the file if it is absent. Returns False if it already existed."""

    def delete(self, name: str) -> None:
        """Remove the file if it exists; a power cut does not bring it back."""

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files directly in a folder, without the folder's own name."""

    def folders(self) -> list[str]:
        """Sorted names of the folders directly below this one."""

    def sub(self, folder: str) -> "Files":
        """The files below one folder."""

    def zarr_store(self, folder: str) -> Store:
        """The folder as a Zarr store."""

    def sync(self, names: Iterable[str]) -> None:
        """Make files durable that other code wrote. Files that are missing are skipped."""

    def free_bytes(self) -> int | None:
        """Free space in bytes; None if it is not known."""

    def sweep(self, older_than_s: float = 0.0) -> None:
        """Remove partial files of killed writers. Give an age if other writers may be active."""


def read_or_none(files: Files, name: str, most: int | None) -> bytes | None:
    """The bytes of a file; None if there is no such file."""
    try:
        return files.read(name, most=most)
    except FileNotFoundError:
        return None


class LocalFiles:
    """Files on a local or shared disk.

    A folder may come from a stranger, so nothing below it is read or written through a link, and
    only plain files are read: a device or a pipe might never end.
    """

    def __init__(self, root: Path):
        self.root = root
        self.url = str(root)

    def read(self, name: str, *, most: int | None = None) -> bytes:
        try:
            path = self.plain(name)
            if most is not None and (found := path.stat().st_size) > most:
                raise too_large(path, found)
            return path.read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(*error.args) from error

    def checksum(self, name: str) -> str:
        try:
            with self.plain(name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except NotADirectoryError as error:
            raise FileNotFoundError(*error.args) from error

    def read_all(self, names: Sequence[str], *, most: int | None = None) -> list[bytes | None]:
        return [read_or_none(self, name, most) for name in names]

    def path(self, name: str) -> Path:
        """The path of a file or folder that lies below this one.

        Raises:
            StoreError: The name leads out of the folder, or through a link.
        """
        path = self.root
        for part in PurePosixPath(name).parts:
            path /= part
            if part in ("/", "..") or path.is_symlink():
                raise StoreError(
                    f"{path} may lead out of its folder: put a copy in place of the link"
                )
        return path

    def plain(self, name: str) -> Path:
        """The path of a plain file.

        Raises:
            FileNotFoundError, NotADirectoryError: There is no such file.
            StoreError: It is something else, or not below this folder.
        """
        path = self.path(name)
        if not stat.S_ISREG(path.stat().st_mode):
            raise StoreError(f"{path} is not a plain file: delete it")
        return path

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        with self._written_aside(name, lambda aside: aside.write_bytes(data), durable) as aside:
            aside.replace(self.path(name))

    def write_by(self, name: str, written: Callable[[Path], object]) -> None:
        with self._written_aside(name, written) as aside:
            aside.replace(self.path(name))

    def create(self, name: str, data: bytes) -> bool:
        path = self.path(name)
        with self._written_aside(name, lambda aside: aside.write_bytes(data)) as aside:
            try:
                path.hardlink_to(aside)
            except FileExistsError:
                return False
            except OSError:  # exFAT and some network disks have no hard links
                return _create_in_place(path, data)
            return True

    @contextlib.contextmanager
    def _written_aside(
        self, name: str, written: Callable[[Path], object], durable: bool = True
    ) -> Iterator[Path]:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            written(aside)
            if durable:
                _sync(aside)
            yield aside
        finally:
            aside.unlink(missing_ok=True)
        if durable:
            _sync(path.parent)  # so that the rename survives a power cut

    def delete(self, name: str) -> None:
        path = self.path(name)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            _sync(path.parent)

    def names(self, folder: str) -> list[str]:
        path = self.path(folder)
        if not path.is_dir():
            return []
        with os.scandir(path) as found:  # it asks for no file's type again, unlike iterdir
            return sorted(
                entry.name
                for entry in found
                if not entry.name.endswith(PARTIAL) and not entry.is_dir()
            )

    def folders(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if p.is_dir())

    def sub(self, folder: str) -> "LocalFiles":
        return LocalFiles(self.root / folder)

    def zarr_store(self, folder: str) -> Store:
        return _ArraysOfRun(self.path(folder))

    def sync(self, names: Iterable[str]) -> None:
        paths = {path for name in names if (path := self.root / name).exists()}
        # The folders may be new as well. A disk flushes for many at a time as fast as for one.
        folders = {
            folder for path in paths for folder in path.parents if self.root in folder.parents
        }
        with ThreadPoolExecutor(SYNCS) as pool:
            list(pool.map(_sync, [*paths, *folders]))

    def free_bytes(self) -> int | None:
        folder = self.root
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def sweep(self, older_than_s: float = 0.0) -> None:
        for path in self.root.rglob(f"*{PARTIAL}"):
            if path.is_dir() and not path.is_symlink():
                continue
            with contextlib.suppress(FileNotFoundError):
                if not older_than_s or time.time() - path.stat().st_mtime > older_than_s:
                    path.unlink()


def too_large(file: Path | str, found: int) -> StoreError:
    """The refusal of a file of so many bytes."""
    return StoreError(f"{file} has {size(found)}, which is more than a run writes there: delete it")


class _ArraysOfRun(LocalStore):
    """A Zarr store below which no link is followed, and nothing but plain files is read."""

    def _require_plain(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            LocalFiles(self.root).plain(key)

    def _require_inside(self, key: str) -> None:
        LocalFiles(self.root).path(key)

    async def get(self, key: str, *args: Any, **options: Any) -> Buffer | None:
        self._require_plain(key)
        return await super().get(key, *args, **options)

    def get_sync(self, key: str, **options: Any) -> Buffer | None:
        self._require_plain(key)
        return super().get_sync(key, **options)

    async def set(self, key: str, value: Buffer) -> None:
        self._require_inside(key)
        await super().set(key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        self._require_inside(key)
        super().set_sync(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        self._require_inside(key)
        await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        self._require_inside(key)
        await super().delete(key)

    async def delete_dir(self, prefix: str) -> None:
        self._require_inside(prefix)
        await super().delete_dir(prefix)

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        self._require_inside(prefix)
        async for name in super().list_dir(prefix):
            yield name


def _create_in_place(path: Path, data: bytes) -> bool:
    try:
        file = path.open("xb")
    except FileExistsError:
        return False
    with file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return True


def _sync(path: Path) -> None:
    """Make a file durable, or the names in a folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows cannot open a folder
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_files(url: str) -> "LocalFiles | ObjectFiles":
    """The files at a path or URL.

    Raises:
        StoreError: The URL's scheme is unknown, or the extra that it needs is not installed.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return LocalFiles(Path(url).expanduser().absolute())
    if scheme == "file":
        return LocalFiles(Path(rest))
    if scheme not in {"s3", "gs", "az"}:
        raise StoreError(f"runs cannot be kept at {url}: use a path, s3://, gs:// or az://")
    from influence_jobs.store.object_files import ObjectFiles  # late: it imports this module

    try:
        return ObjectFiles(url)
    except ImportError as error:
        raise StoreError(
            f"{url} needs the cloud extra: pip install 'influence-jobs[cloud]'"
        ) from error
