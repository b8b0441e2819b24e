"""Files in a bucket of an object store, whose requests are repeated when they fail."""

import asyncio
import contextlib
import errno
import hashlib
import re
import tempfile
import time
from collections.abc import (
    AsyncGenerator,
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
from pathlib import Path
from typing import Any, TypeVar

from zarr.abc.store import Store
from zarr.core.buffer import Buffer

from influence_jobs.store.files import read_or_none, too_large

T = TypeVar("T")

READERS = 32  # requests at a time
PIECE_BYTES = 2**23  # of a file that are asked for at a time


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
            raise too_large(f"{self.url}/{name}", found.meta["size"])
        if found.meta["size"] <= PIECE_BYTES:
            return bytes(found.bytes())
        return b"".join(self._pieces(name, found.meta))

    def checksum(self, name: str) -> str:
        found = hashlib.sha256()
        with _os_errors(self.url):
            for piece in self._pieces(name, _repeated(partial(self._store.head, name))):
                found.update(piece)
        return found.hexdigest()

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
            return list(pool.map(partial(read_or_none, self, most=most), names))

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        with _os_errors(self.url, writing=True):
            _repeated(lambda: self._store.put(name, data))

    def write_by(self, name: str, written: Callable[[Path], object]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            written(path)
            with _os_errors(self.url, writing=True):
                _repeated(lambda: self._store.put(name, path))

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
