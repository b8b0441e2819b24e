"""The manifest says which shards of a run are done, in one small file per shard.

The arrays themselves cannot say it: a lost chunk reads back as NaN without an error, and a chunk of
NaNs is never written. While a shard is computed, its file says "running" and the number of the
attempt. Only after the data are on disk it says "done", with their checksums. Each file has one
writer and is replaced atomically.
"""

import json
from collections.abc import Collection
from dataclasses import asdict

from influence_jobs.store import layout
from influence_jobs.store.documents import Entry, parsed
from influence_jobs.store.files import Files


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
        where = f"{self._files.url}/{_name(shard)}"
        return parsed(text, Entry, where, cure="delete it and resume")

    def write(self, entry: Entry) -> None:
        """Replace a shard's entry."""
        self._files.write(_name(entry.shard), json.dumps(asdict(entry), indent=1).encode())

    def keep_only(self, shards: Collection[str]) -> None:
        """Delete the entries of all other shards: those of a plan that was lost."""
        for name in self._files.names(layout.MANIFEST):
            if name.removesuffix(".json") not in shards:
                self._files.delete(f"{layout.MANIFEST}/{name}")

    def entries(self) -> list[Entry]:
        """All entries, by shard."""
        shards = [name.removesuffix(".json") for name in self._files.names(layout.MANIFEST)]
        return [entry for shard in shards if (entry := self.read(shard))]

    def done(self) -> dict[str, Entry]:
        """Entries of the finished shards, by shard."""
        return {entry.shard: entry for entry in self.entries() if entry.state == "done"}


def _name(shard: str) -> str:
    return f"{layout.MANIFEST}/{shard}.json"
