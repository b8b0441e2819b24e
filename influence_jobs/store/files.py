"""A folder of small files on a local disk or in an object store, with the few operations runs need.

Both kinds replace a file atomically, can create a file only if it is absent, and raise OSError if
something goes wrong. Nothing here knows what the files hold.
"""

import asyncio
import contextlib
import errno
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from influence_jobs.errors import StoreError
from influence_jobs.terms import size

T = TypeVar("T")

READERS = 32  # requests to an object store at a time
PIECE_BYTES = 2**23  # of a file in an object store that are asked for at a time
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


def _read_or_none(files: Files, name: str, most: int | None) -> bytes | None:
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
                raise _too_large(path, found)
            return path.read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(*error.args) from error

    def read_all(self, names: Sequence[str], *, most: int | None = None) -> list[bytes | None]:
        return [_read_or_none(self, name, most) for name in names]

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
                    f"{path} may lead out of its folder: replace the link by what it names"
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
            raise StoreError(f"{path} is no plain file: delete it")
        return path

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        path = self.path(name)
        with self._written_aside(name, data, durable=durable) as aside:
            aside.replace(path)

    def create(self, name: str, data: bytes) -> bool:
        path = self.path(name)
        with self._written_aside(name, data) as aside:
            try:
                path.hardlink_to(aside)
            except FileExistsError:
                return False
            except OSError:  # exFAT and some network disks have no hard links
                return _create_in_place(path, data)
            return True

    @contextlib.contextmanager
    def _written_aside(self, name: str, data: bytes, *, durable: bool = True) -> Iterator[Path]:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            with aside.open("wb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
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


def _too_large(file: Path | str, found: int) -> StoreError:
    return StoreError(f"{file} has {size(found)}, more than a run writes there: delete it")


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


class StorageError(OSError):
    """An object store does not answer, or refuses. The message is one line with the store's URL."""


# How long a request is repeated if the store does not answer or says that it is overloaded. A
# command tells its user soon; a driver and its workers outlast minutes of it.
_SOON = {"retry_timeout": timedelta(seconds=10), "max_retries": 10}
_LATE = {"retry_timeout": timedelta(minutes=10), "max_retries": 1000}
_patient = False


def be_patient() -> None:
    """Let this process repeat requests to an object store for minutes: it is a driver or a worker.

    It holds for files that are opened from now on.
    """
    global _patient
    _patient = True


def _object_store(url: str) -> Any:
    from obstore.store import from_url  # an optional extra

    retry: Any = _LATE if _patient else _SOON
    with _os_errors(url):
        return from_url(url, retry_config=retry)


class ObjectFiles:
    """Files in a bucket of an object store (s3://, gs://, az://), through obstore."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._store = _object_store(self.url)

    def read(self, name: str, *, most: int | None = None) -> bytes:
        with _os_errors(self.url):
            return _repeated(partial(self._read, name, most))

    def _read(self, name: str, most: int | None) -> bytes:
        found = self._store.get(name)
        if most is not None and found.meta["size"] > most:
            raise _too_large(f"{self.url}/{name}", found.meta["size"])
        if found.meta["size"] <= PIECE_BYTES:
            return bytes(found.bytes())
        return b"".join(self._pieces(name, found.meta))

    def _pieces(self, name: str, meta: Any) -> Iterator[bytes]:
        """A large file in pieces: a request has 30 seconds. All are of the same version of it."""
        same = {"if_match": meta["e_tag"]} if meta["e_tag"] else {}
        for start in range(0, meta["size"], PIECE_BYTES):
            span = (start, min(start + PIECE_BYTES, meta["size"]))
            yield _repeated(partial(self._piece, name, {"range": span, **same}))

    def _piece(self, name: str, options: Mapping[str, Any]) -> bytes:
        return bytes(self._store.get(name, options=dict(options)).bytes())

    def read_all(self, names: Sequence[str], *, most: int | None = None) -> list[bytes | None]:
        with ThreadPoolExecutor(READERS) as pool:  # a store takes its time to answer each
            return list(pool.map(partial(_read_or_none, self, most=most), names))

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        with _os_errors(self.url, writing=True):
            _repeated(lambda: self._store.put(name, data))

    def create(self, name: str, data: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError

        with _os_errors(self.url, writing=True):
            try:
                _repeated(lambda: self._store.put(name, data, mode="create"))
            except AlreadyExistsError:
                return False
        return True

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), _os_errors(self.url):
            _repeated(lambda: self._store.delete(name))

    def names(self, folder: str) -> list[str]:
        with _os_errors(self.url):
            listing = _repeated(lambda: self._store.list_with_delimiter(folder))
        return sorted(entry["path"].rpartition("/")[2] for entry in listing["objects"])

    def folders(self) -> list[str]:
        with _os_errors(self.url):
            prefixes = _repeated(self._store.list_with_delimiter)["common_prefixes"]
        return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in prefixes)

    def sub(self, folder: str) -> "ObjectFiles":
        return ObjectFiles(f"{self.url}/{folder}")

    def zarr_store(self, folder: str) -> Store:
        return _arrays_in_store(_object_store(f"{self.url}/{folder}"))

    def sync(self, names: Iterable[str]) -> None:
        """Nothing to do: an object that was put is durable."""

    def free_bytes(self) -> int | None:
        return None

    def sweep(self, older_than_s: float = 0.0) -> None:
        """Nothing to do: an object is never partly written."""


# obstore repeats requests that are refused or not answered, but not those whose answer breaks off.
_BROKEN_OFF = "body error"
_TIMES, _PAUSE_S = 10, 0.2


def _repeated(call: Callable[[], T]) -> T:
    """Make a call again if its answer breaks off."""
    for _ in range(_TIMES - 1):
        try:
            return call()
        except Exception as error:
            if _BROKEN_OFF not in str(error):
                raise
        time.sleep(_PAUSE_S)
    return call()


def _arrays_in_store(store: Any) -> Store:
    """A Zarr store in an object store, whose reads and writes are repeated likewise."""
    from zarr.storage import ObjectStore

    async def repeated(call: Callable[[], Awaitable[T]]) -> T:
        for _ in range(_TIMES - 1):
            try:
                return await call()
            except Exception as error:
                if _BROKEN_OFF not in str(error):
                    raise
            await asyncio.sleep(_PAUSE_S)
        return await call()

    class Arrays(ObjectStore[Any]):
        async def get(self, *args: Any, **options: Any) -> Buffer | None:
            plain = super().get
            return await repeated(lambda: plain(*args, **options))

        async def set(self, key: str, value: Buffer) -> None:
            plain = super().set
            await repeated(lambda: plain(key, value))

        async def set_if_not_exists(self, key: str, value: Buffer) -> None:
            plain = super().set_if_not_exists
            await repeated(lambda: plain(key, value))

        async def delete(self, key: str) -> None:
            plain = super().delete
            await repeated(lambda: plain(key))

        async def exists(self, key: str) -> bool:
            plain = super().exists
            return await repeated(lambda: plain(key))

        async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
            plain = super().list_dir

            async def names() -> list[str]:
                return [name async for name in plain(prefix)]

            for name in await repeated(names):
                yield name

    return Arrays(store)


@contextlib.contextmanager
def _os_errors(url: str, *, writing: bool = False) -> Iterator[None]:
    """Raise obstore's own errors as OSError.

    Its error for a missing file already is one. When writing, it is the bucket that is missing.
    """
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

    try:
        yield
    except FileNotFoundError as error:
        if not writing:
            raise
        raise StorageError(errno.EIO, storage_message(error, url)) from error
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise PermissionError(errno.EACCES, storage_message(error, url)) from error
    except BaseError as error:
        raise StorageError(errno.EIO, storage_message(error, url)) from error


def is_of_store(error: BaseException) -> bool:
    """Whether an error is an object store's own; such errors come through Zarr as they are."""
    return type(error).__module__.startswith("obstore")


# Where a machine of a cloud gets its role's credentials: asked last, if there are no others.
_METADATA_SERVICE = re.compile(r"169\.254\.169\.254|metadata\.google\.internal")
_CURES = {
    "s3": ("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", "AWS_REGION, AWS_ENDPOINT_URL"),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS", "the project"),
    "az": ("AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY", "the endpoint"),
}


def storage_message(error: BaseException, url: str) -> str:
    """An object store's error in one line, with what to check."""
    said = " ".join(str(error).split())
    said = re.sub(r"Debug source:.*|<[^>]*>", " ", said).strip()[:300]
    variables, place = _CURES.get(url.partition("://")[0], ("them", "the endpoint"))
    if _METADATA_SERVICE.search(said):
        return f"{url}: there are no credentials: set {variables}"
    return f"{url}: {said}; check the bucket's name, {place} and the credentials"


def open_files(url: str) -> LocalFiles | ObjectFiles:
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
    try:
        return ObjectFiles(url)
    except ImportError as error:
        raise StoreError(
            f"{url} needs the cloud extra: pip install 'influence-jobs[cloud]'"
        ) from error
