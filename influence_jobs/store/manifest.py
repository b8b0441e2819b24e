"""The manifest says which shards of a run are done, in one small file per shard.

The arrays themselves cannot say it: a lost chunk reads back as NaN without an error, and a chunk of
NaNs is never written. While a shard is computed, its file says "running" and the number of the
attempt. Only after the data are on disk it says "done", with their checksums. Each file has one
writer and is replaced atomically.

A finished run has a summary beside it, so that readers of many runs need not read every entry.
Whoever is about to change an entry drops the summary first. It holds only as long as no entry is
missing, and the last one is the one that it was made with. It can be lost or damaged at any time:
the entries say the same.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy.typing as npt

from influence_jobs.errors import StoreError
from influence_jobs.store import layout
from influence_jobs.store.documents import MOST_BYTES, Entry, Summary, Used, parsed
from influence_jobs.store.files import Files


class Manifest:
    """All entries of one run."""

    def __init__(self, files: Files):
        self._files = files

    def read(self, shard: str) -> Entry | None:
        """A shard's entry; None if the shard was never started."""
        try:
            text = self._files.read(_name(shard), most=MOST_BYTES)
        except FileNotFoundError:
            return None
        return self._parsed(shard, text)

    def _parsed(self, shard: str, text: bytes | None) -> Entry | None:
        if not text:  # see `write`
            return None
        where = f"{self._files.url}/{_name(shard)}"
        entry = parsed(text, Entry, where, cure="delete it and resume")
        if entry.shard != shard:
            raise StoreError(f"{where} is damaged (it is of {entry.shard}): delete it and resume")
        # Of what is in the file: it may have fewer fields than this version knows, or more.
        if entry.checksum and entry.checksum != _checksum_of(json.loads(text)):
            raise StoreError(f"{where} is damaged (it was changed): delete it and resume")
        return entry

    def write(self, entry: Entry, *, durable: bool = False) -> None:
        """Replace a shard's entry.

        A power cut may leave an empty file, which means that the shard was never started, or the
        earlier entry. One that says "done" is durable on return, and so is any if asked for; its
        file and folder are synced at once, since many shards a second wait for the disk.
        """
        name, fields = _name(entry.shard), asdict(entry)
        fields["checksum"] = _checksum_of(fields)
        self._files.write(name, json.dumps(fields, indent=1).encode(), durable=False)
        if durable or entry.state == "done":
            self._files.sync([name])

    def keep_only(self, shards: Collection[str]) -> None:
        """Delete the entries of all other shards: those of a plan that was lost."""
        for shard in self._shards():
            if shard not in shards:
                self._files.delete(_name(shard))

    def entries(self) -> list[Entry]:
        """All entries, by shard."""
        shards = self._shards()
        texts = self._files.read_all([_name(shard) for shard in shards], most=MOST_BYTES)
        found = (self._parsed(shard, text) for shard, text in zip(shards, texts, strict=True))
        return [entry for entry in found if entry is not None]

    def done(self) -> dict[str, Entry]:
        """Entries of the finished shards, by shard."""
        return {entry.shard: entry for entry in self.entries() if entry.state == "done"}

    def done_shards(self) -> Collection[str]:
        """Ids of the finished shards; of a run with a summary without reading its entries."""
        shards = self._shards()
        return shards if self._stored_summary(shards) else self.done().keys()

    def summary(self) -> Summary:
        """What all entries say together."""
        return self._stored_summary(self._shards()) or self._summed()

    def write_summary(self) -> None:
        """Write the summary, when all entries are done and none will change."""
        found = self._summed()
        found["checksum"] = _checksum_of(found)
        self._files.write(layout.SUMMARY, json.dumps(found, indent=1).encode())

    def drop_summary(self) -> None:
        """Remove the summary, before an entry changes."""
        self._files.delete(layout.SUMMARY)

    def _stored_summary(self, shards: Sequence[str]) -> Summary | None:
        """The summary, if it holds for a manifest with these entries."""
        try:
            text = self._files.read(layout.SUMMARY, most=MOST_BYTES)
            found = parsed(text, Summary, layout.SUMMARY)
        except (FileNotFoundError, StoreError):
            return None
        holds = (
            found["entries"] == len(shards)
            and found.pop("checksum", "") == _checksum_of(found)
            and found["finish"] == self._finish_digest()
        )
        return found if holds else None

    def _finish_digest(self) -> str:
        (text,) = self._files.read_all([_name(layout.FINISH)], most=MOST_BYTES)
        return checksum(text or b"")

    def _summed(self) -> Summary:
        return summary_of(self.entries(), self._finish_digest())

    def _shards(self) -> list[str]:
        return [name.removesuffix(".json") for name in self._files.names(layout.MANIFEST)]


def summary_of(entries: Iterable[Entry], finish: str) -> Summary:
    """What entries say together. Only those that are done count in the digest."""
    entries = sorted(entries, key=lambda entry: entry.shard)
    sums = {
        entry.shard: [dict(sorted(entry.arrays.items())), dict(sorted(entry.files.items()))]
        for entry in entries
        if entry.state == "done"
    }
    used = Counter(json.dumps(dict(entry.software)) for entry in entries)
    shards = [entry for entry in entries if entry.shard != layout.FINISH]
    return {
        "entries": len(entries),
        "shards": len(shards),
        "finish": finish,
        "digest": checksum(json.dumps(sums).encode()),
        "retries": sum(max(0, entry.attempt - 1) for entry in entries),
        "seconds": sum(entry.seconds for entry in entries),
        "workers": len({entry.worker for entry in shards if entry.worker}),
        "ended": max((entry.finished_at for entry in entries if entry.finished_at), default=None),
        "used": [Used(software=json.loads(t), entries=n) for t, n in used.most_common()],
        "batch_sizes": sorted({entry.batch_size for entry in entries if entry.batch_size}),
    }


def _checksum_of(document: Mapping[str, Any]) -> str:
    """SHA-256 of a document without its own checksum."""
    fields = {name: value for name, value in document.items() if name != "checksum"}
    return checksum(json.dumps(fields, sort_keys=True).encode())


def checksum(data: npt.NDArray[Any] | bytes) -> str:
    """SHA-256, in hexadecimal, of bytes or of an array's bytes in C order."""
    return hashlib.sha256(data if isinstance(data, bytes) else data.tobytes()).hexdigest()


def _name(shard: str) -> str:
    return f"{layout.MANIFEST}/{shard}.json"
