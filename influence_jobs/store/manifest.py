"""The manifest says which shards of a run are done, in one small file per shard.

The arrays themselves cannot say it: a lost chunk reads back as NaN without an error, and a chunk of
NaNs is never written. While a shard is computed, its file says "running" and the number of the
attempt. Only after the data are on disk it says "done", with their checksums. Each file has one
writer and is replaced atomically.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from influence_jobs.errors import StoreError
from influence_jobs.store import layout
from influence_jobs.store.files import Files


@dataclass(frozen=True)
class Entry:
    """A shard's record.

    Attributes:
        start: First row.
        stop: Row after the last one.
        attempt: How often the shard was started, including this time.
        spec: Hash of the spec that it was computed for.
        arrays: SHA-256 of the rows written, by array.
        files: SHA-256 of the files written, by name.
        seconds: Time taken, including the writing.
        worker: Host and process that computed it.
        software: Versions and revision that computed it; empty in runs older than this field.
    """

    shard: str
    start: int
    stop: int
    attempt: int
    spec: str
    state: Literal["running", "done"] = "running"
    arrays: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    worker: str = ""
    software: Mapping[str, str] = field(default_factory=dict)
    finished_at: float | None = None


class Manifest:
    """All entries of one run."""

    def __init__(self, files: Files):
        self._files = files

    def read(self, shard: str) -> Entry | None:
        """A shard's entry; None if the shard was never started."""
        try:
            text = self._files.read(_name(shard))
        except FileNotFoundError:
            return None
        try:
            return Entry(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{self._files.url}/{_name(shard)} is damaged ({error}); delete it and resume"
            ) from error

    def write(self, entry: Entry) -> None:
        """Replace a shard's entry."""
        self._files.write(_name(entry.shard), json.dumps(asdict(entry), indent=1).encode())

    def entries(self) -> list[Entry]:
        """All entries, by shard."""
        shards = [name.removesuffix(".json") for name in self._files.names(layout.MANIFEST)]
        return [entry for shard in shards if (entry := self.read(shard))]

    def done(self) -> dict[str, Entry]:
        """Entries of the finished shards, by shard."""
        return {entry.shard: entry for entry in self.entries() if entry.state == "done"}


def _name(shard: str) -> str:
    return f"{layout.MANIFEST}/{shard}.json"
