"""One run: a folder with a spec, arrays, a manifest of finished shards, and tables."""

import io
import itertools
import json
import math
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from influence_jobs.errors import StoreError
from influence_jobs.home import is_known
from influence_jobs.specs.base import Spec, parse_spec
from influence_jobs.store import layout
from influence_jobs.store.documents import MOST_BYTES, Asked, JobFile, PlanFile, parsed
from influence_jobs.store.files import open_files, read_or_none
from influence_jobs.store.folder import for_runs
from influence_jobs.store.layout import ArrayLayout
from influence_jobs.store.manifest import Manifest, checksum

D = TypeVar("D")

BLOCK_ROWS = 2**20  # of a table, as many as Parquet writes at a time
# What Zarr raises for metadata that are no JSON, of a wrong type, or incomplete.
_NO_METADATA = (ValueError, TypeError, KeyError, AttributeError, OverflowError)


class Run:
    """The files of one run.

    The constructor touches no file; `open` reads and `create` writes.

    Args:
        root: Folder of all runs: a path, or an s3://, gs:// or az:// URL.
        spec: The run's spec.
    """

    def __init__(self, root: str, spec: Spec):
        self.root = root
        self.spec = spec
        self.id = spec.run_id
        self.files = open_files(root).sub(self.id)
        self.manifest = Manifest(self.files)

    @classmethod
    def open(cls, root: str, run_id: str) -> "Run":
        """An existing run.

        Raises:
            StoreError: There is no such run, or its spec does not match its name.
        """
        files = open_files(root).sub(run_id)
        try:
            text = files.read(layout.SPEC, most=MOST_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(
                f"there is no run {run_id} in {root}: "
                f"`infl runs{for_runs(root)}` lists the runs there"
            ) from None
        run = cls(root, parse_spec(text, f"{files.url}/{layout.SPEC}"))
        if run.id != run_id:
            raise StoreError(
                f"run {run_id}: its {layout.SPEC} was changed and now describes {run.id}; "
                "restore it, or submit the changed request as a run of its own"
            )
        return run

    @classmethod
    def create(cls, root: str, spec: Spec) -> "Run":
        """The run of a spec, created if it does not exist yet.

        If it exists, its spec is updated with the current paths of its inputs. Paths are not part
        of a spec's identity.

        Raises:
            StoreError: The folder cannot be written.
        """
        run = cls(root, spec)
        text = spec.model_dump_json(indent=2).encode()
        try:
            if not run.files.create(layout.SPEC, text) and run._stored_spec() != spec:
                run.files.write(layout.SPEC, text)
        except OSError as error:
            raise StoreError(
                f"cannot write runs to {root} ({error.strerror or error}): mend that, or choose "
                "another folder with --runs"
            ) from error
        return cls.open(root, run.id)

    def _stored_spec(self) -> Spec | None:
        """The spec in the folder; None if it is damaged. The folder's name is its hash."""
        try:
            return Run.open(self.root, self.id).spec
        except StoreError:
            return None

    # -- plan and status --------------------------------------------------------------------------

    def read_json(self, name: str, kind: type[D]) -> D | None:
        """A JSON file of the run, one of `store.documents`; None if it does not exist.

        Raises:
            StoreError: It is damaged.
        """
        try:
            data = self.files.read(name, most=MOST_BYTES)
        except FileNotFoundError:
            return None
        return parsed(data, kind, f"run {self.id}: {name}")

    def plan(self) -> PlanFile | None:
        """plan.json; None before the run has begun.

        Raises:
            StoreError: It is damaged.
        """
        return self.read_json(layout.PLAN, PlanFile)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Replace a JSON file of the run."""
        self.files.write(name, json.dumps(value, indent=1).encode())

    @property
    def resume_command(self) -> str:
        """The command that goes on with the run as it was submitted.

        On the cluster where it was, if you named that.
        """
        try:
            job = self.read_json(layout.JOB, JobFile)
        except StoreError:  # damaged; a resumed run writes it anew
            job = None
        address = job["address"] if job else None
        # A run folder may come from a stranger, whose server must not get the token.
        known = address and is_known("cluster", address)
        asked = job.get("asked", {}) if job else {}
        words: list[tuple[str, object]] = [("address", address)] if address and known else []
        words += [
            (name, one)
            for name, value in asked.items()
            if name in Asked.__annotations__
            for one in (value if isinstance(value, list) else [value])
        ]
        more = (f" --{name.replace('_', '-')} {shlex.quote(f'{one}')}" for name, one in words)
        return f"infl resume {self.id}{for_runs(self.root)}{''.join(more)}"

    # -- arrays -----------------------------------------------------------------------------------

    def create_arrays(self, layouts: Sequence[ArrayLayout]) -> None:
        """Create the arrays that do not exist yet, with their full shape.

        They are filled with NaN, those of whole numbers with 0. Metadata that are missing, damaged
        or of another shape are written anew. Chunks are left alone: their checksums say whether
        they are right.
        """
        group = self._group()
        group.attrs["run"] = self.id
        for array in layouts:
            for parent in PurePosixPath(array.name).parents[:-1]:
                self._group(f"{parent}")
            if self._is_there(group, array):
                continue
            self.files.delete(f"{layout.ARRAYS}/{array.name}/zarr.json")
            group.create_array(
                array.name,
                shape=array.shape,
                chunks=array.chunks,
                dtype=array.dtype,
                fill_value=float("nan") if np.issubdtype(array.dtype, np.floating) else 0,
                # Without the checksum a damaged byte would silently read back as a wrong number.
                compressors=[
                    BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"),
                    Crc32cCodec(),
                ],
                dimension_names=array.dims,
                attributes={**array.attributes, "row_axis": array.row_axis},
            )

    def _group(self, path: str = "") -> zarr.Group:
        """A group of arrays; its metadata are written anew if they are missing or damaged."""
        store = self.files.zarr_store(layout.ARRAYS)
        try:
            return zarr.open_group(store, path=path, mode="a")
        except _NO_METADATA:
            self.files.delete(f"{PurePosixPath(layout.ARRAYS, path)}/zarr.json")
            return zarr.open_group(store, path=path, mode="a")

    def _is_there(self, group: zarr.Group, array: ArrayLayout) -> bool:
        try:
            found = group.get(array.name)
        except _NO_METADATA:
            return False
        return isinstance(found, zarr.Array) and (found.shape, found.chunks, found.dtype.name) == (
            array.shape,
            array.chunks,
            array.dtype,
        )

    @cached_property
    def _arrays(self) -> dict[str, "zarr.Array[Any]"]:
        if not self._has_arrays():  # opening would create the folder
            raise StoreError(
                f"run {self.id} has no arrays: it has not begun, or they were deleted "
                f"(infl verify {self.id}{for_runs(self.root)} --repair, then {self.resume_command})"
            )
        with self._metadata():
            group = zarr.open_group(self.files.zarr_store(layout.ARRAYS), mode="r+")
            members = sorted(group.members(None))
            arrays = {name: node for name, node in members if isinstance(node, zarr.Array)}
            for name, array in arrays.items():
                if array.attrs.get("row_axis") not in range(array.ndim):
                    raise ValueError(f"{name} does not say along which axis its rows lie")
        return arrays

    @contextmanager
    def _metadata(self) -> Iterator[None]:
        try:
            yield
        except _NO_METADATA as error:
            raise StoreError(
                f"run {self.id}: the metadata of its arrays are damaged ({error}): "
                f"infl verify {self.id}{for_runs(self.root)} --repair, then {self.resume_command}"
            ) from error

    def array_names(self) -> list[str]:
        """Sorted names of all arrays; empty before the run has begun."""
        return list(self._arrays) if self._has_arrays() else []

    def _has_arrays(self) -> bool:
        return "zarr.json" in self.files.names(layout.ARRAYS)

    def array(self, name: str) -> "zarr.Array[Any]":
        """An array; its data are not read yet.

        Raises:
            StoreError: The run has no such array.
        """
        found = self._arrays.get(name)
        if found is None:
            names = ", ".join(self._arrays) or "none yet"
            raise StoreError(f"run {self.id} has no array {name!r}; it has {names}")
        return found

    def write_rows(self, name: str, start: int, values: npt.NDArray[Any]) -> str:
        """Write rows of an array and return the SHA-256 of their bytes (C order, little endian).

        Rows must be whole chunks: two writers of one chunk would overwrite each other's rows.
        """
        array, axis = self.array(name), self.row_axis(name)
        stop = start + values.shape[axis]
        rows, total = array.chunks[axis], array.shape[axis]
        if start % rows or (stop % rows and stop != total):
            raise StoreError(f"rows {start}..{stop} of {name} are not whole chunks of {rows}")
        values = np.ascontiguousarray(values, dtype=array.dtype)
        array[(*(slice(None),) * axis, slice(start, stop))] = values
        # Zarr does not sync; the chunks must be on disk before the manifest says so.
        cells = [range(math.ceil(n / c)) for n, c in zip(array.shape, array.chunks, strict=True)]
        cells[axis] = range(start // rows, math.ceil(stop / rows))
        keys = ("/".join(map(str, index)) for index in itertools.product(*cells))
        self.files.sync(f"{layout.ARRAYS}/{name}/c/{key}" for key in keys)
        return checksum(values)

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows `start` to `stop` of an array, along its row axis."""
        array, axis = self.array(name), self.row_axis(name)
        return np.asarray(array[(*(slice(None),) * axis, slice(start, stop))])

    def row_axis(self, name: str) -> int:
        """The axis of an array along which its rows lie."""
        return int(str(self.array(name).attrs["row_axis"]))

    def digest(self) -> str:
        """One SHA-256 over the manifest's checksums of all finished shards."""
        return self.manifest.summary()["digest"]

    # -- tables and other files -------------------------------------------------------------------

    def write_table(self, name: str, table: pa.Table) -> dict[str, str]:
        """Replace a Parquet table. Returns {name of its file: the file's SHA-256}."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        file = f"{layout.TABLES}/{name}.parquet"
        self.files.write(file, buffer.getvalue())
        return {file: checksum(buffer.getvalue())}

    def write_table_in_blocks(self, name: str, blocks: Iterable[pa.Table]) -> dict[str, str]:
        """Like `write_table` of the blocks one after the other; one at a time is in memory.

        The bytes are those of `write_table` if each block but the last has `BLOCK_ROWS`.

        Raises:
            pyarrow.ArrowException: A block does not fit the columns of the first.
        """
        file, found = f"{layout.TABLES}/{name}.parquet", iter(blocks)
        first = next(found)

        def written(path: Path) -> None:
            with pq.ParquetWriter(path, first.schema) as writer:
                for block in itertools.chain([first], found):
                    writer.write_table(_like(block, first.schema), row_group_size=BLOCK_ROWS)

        self.files.write_by(file, written)
        return {file: self.files.checksum(file)}

    def read_table(self, name: str) -> pa.Table:
        """A Parquet table of the run.

        Raises:
            StoreError: It is missing or damaged.
        """
        with self._intact(name):
            return pq.read_table(self._table_file(name))

    def table_blocks(self, name: str) -> Iterator[pa.Table]:
        """The row groups of a Parquet table of the run, one at a time.

        Raises:
            StoreError: It is missing or damaged.
        """
        with self._intact(name):
            parquet = pq.ParquetFile(self._table_file(name))
        for group in range(parquet.num_row_groups):
            with self._intact(name):
                block = parquet.read_row_group(group)
            yield block

    def _table_file(self, name: str) -> io.BytesIO:
        try:
            return io.BytesIO(self.files.read(f"{layout.TABLES}/{name}.parquet"))
        except FileNotFoundError:
            return io.BytesIO()

    @contextmanager
    def _intact(self, name: str) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, ValueError, OSError):  # as which arrow tells corrupt data
            if read_or_none(self.files, layout.SPEC, MOST_BYTES) is None:
                raise StoreError(
                    f"run {self.id} is no longer in {self.root}, and what was made from it needs "
                    "it: bring its folder back, or delete what needs it and submit that again"
                ) from None
            raise StoreError(
                f"the table of {self.id}'s {name} is missing or damaged: "
                f"infl verify {self.id}{for_runs(self.root)}"
            ) from None

    def table_names(self) -> list[str]:
        """Sorted names of all tables."""
        return [name.removesuffix(".parquet") for name in self.files.names(layout.TABLES)]


def now() -> float:
    """Seconds since 1970, the unit of all times in a run's files."""
    return time.time()


def _like(block: pa.Table, schema: pa.Schema) -> pa.Table:
    """A block in the columns of the first. Only what is all None is cast: no value changes.

    Raises:
        pyarrow.ArrowInvalid: It has other columns, or columns of another type.
    """
    if {*block.column_names} != {*schema.names}:
        raise pa.ArrowInvalid(f"columns {block.column_names} after {schema.names}")
    block = block.select(schema.names)
    for own, wanted in zip(block.schema, schema, strict=True):
        if own.type != wanted.type and not pa.types.is_null(own.type):
            raise pa.ArrowInvalid(f"column {own.name} is {own.type} after {wanted.type}")
    return block.cast(schema)
