"""What is fed: every file that a command may read from a stranger, and the command's words.

A target takes an input and returns whether it was accepted. It raises `InflError` to refuse;
anything else that it raises is a fault, and so is accepting what is wrong.
"""

import contextlib
import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter
from safetensors.torch import save as save_safetensors
from torch import nn

from infl_cli.runs import list_runs
from influence_jobs.datasets import mnist
from influence_jobs.datasets.images import ImageFolder
from influence_jobs.errors import InflError, StoreError
from influence_jobs.models.checkpoints import load_weights
from influence_jobs.report.made import made
from influence_jobs.requests.subject import training_of
from influence_jobs.specs.base import TaskSpec, parse_spec
from influence_jobs.store import layout
from influence_jobs.store.documents import (
    Entry,
    Holder,
    JobFile,
    PlanFile,
    ProgressFile,
    Status,
    Summary,
    Width,
    parsed,
)
from influence_jobs.store.find import find_run
from influence_jobs.store.lease import Lease, LeaseHeld, live_holder
from influence_jobs.store.run import Run
from influence_jobs.store.status import is_done, rate_and_eta, read_status
from influence_jobs.store.verify import find_damage

from .mutate import changed_bytes, changed_json

Change = Callable[[random.Random, Sequence[bytes]], bytes]


@dataclass(frozen=True)
class Target:
    """Something that reads inputs.

    Attributes:
        seeds: Good inputs; each is accepted.
        act: Reads an input; returns whether it was accepted.
        count: Inputs of the long test.
    """

    name: str
    seeds: tuple[bytes, ...]
    act: Callable[[bytes], bool]
    change: Change
    count: int


def targets_of_run(run: Run) -> list[Target]:
    """Every file of a run's folder, which is written anew for each input."""
    folder = Path(run.files.url)
    files = [
        ("spec", layout.SPEC, looked_at, 1_500),
        ("plan", layout.PLAN, looked_at, 1_500),
        ("manifest", next(f"manifest/{p.name}" for p in manifest_of(folder)), looked_at, 1_500),
        ("finish", f"manifest/{layout.FINISH}.json", looked_at, 500),
        ("summary", layout.SUMMARY, looked_at, 700),
        ("status", layout.STATUS, looked_at, 1_500),
        ("lease", layout.LEASE, led, 1_500),
        ("job", layout.JOB, read_as(layout.JOB, JobFile), 1_000),
        ("width", "width.json", read_as("width.json", Width), 500),
        ("progress", "progress/a.json", read_as("progress/a.json", ProgressFile), 500),
        ("zarr of the group", f"{layout.ARRAYS}/zarr.json", arrays_read, 300),
        ("zarr of an array", f"{layout.ARRAYS}/norms/head/zarr.json", arrays_read, 1_000),
        ("chunk", f"{layout.ARRAYS}/norms/head/c/0/0", arrays_read, 300),
        ("table", f"{layout.TABLES}/samples.parquet", table_read, 1_000),
    ]
    return [of_file(run, folder, *file) for file in files]


def targets_of_documents(run: Run) -> list[Target]:
    """The same files as documents alone, many more of them."""
    folder = Path(run.files.url)
    kinds: list[tuple[str, str, Any]] = [
        ("plan alone", layout.PLAN, PlanFile),
        ("entry alone", next(f"manifest/{p.name}" for p in manifest_of(folder)), Entry),
        ("summary alone", layout.SUMMARY, Summary),
        ("status alone", layout.STATUS, Status),
        ("lease alone", layout.LEASE, Holder),
        ("job alone", layout.JOB, JobFile),
    ]

    def reader(kind: Any) -> Callable[[bytes], bool]:
        def read(data: bytes) -> bool:
            found = parsed(data, kind, "x")
            again = parsed(TypeAdapter(kind).dump_json(found), kind, "x")
            assert again == found, "a document changes when it is written"
            return True

        return read

    def spec_read(data: bytes) -> bool:
        spec = parse_spec(data, "x")
        assert parse_spec(spec.model_dump_json(), "x").run_id == spec.run_id
        return True

    found = [
        Target(name, ((folder / file).read_bytes(),), reader(kind), changed_json, 10_000)
        for name, file, kind in kinds
    ]
    seed = (folder / layout.SPEC).read_bytes()
    return [*found, Target("spec alone", (seed,), spec_read, changed_json, 12_000)]


def manifest_of(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / layout.MANIFEST).iterdir() if p.stem != layout.FINISH)


def of_file(
    run: Run, folder: Path, name: str, file: str, act: Callable[[Run], bool], count: int
) -> Target:
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps(MISSING[file]))
    good = path.read_bytes()

    def feed(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            return act(Run.open(run.root, run.id))
        finally:
            path.write_bytes(good)

    change = changed_json if file.endswith(".json") else changed_bytes
    return Target(name, (good,), feed, change, count)


MISSING = {
    layout.LEASE: {"owner": "a1", "host": "h", "pid": 5, "process_started": 1.5, "beat": 2.5},
    layout.JOB: {"address": "https://cluster:8265", "submission_id": "train-1"},
    "width.json": {"variants_side_by_side": 4},
    "progress/a.json": {"units": 3, "resumed": 1},
}


def looked_at(run: Run) -> bool:
    """What most commands read. A run that is said to be good is the run that it was."""
    with contextlib.redirect_stdout(io.StringIO()):
        list_runs(run.root, json=True)
    status = read_status(run)
    rate_and_eta(status)
    find_run(run.root, run.id)
    page = made(run)
    assert page.seconds >= 0
    is_done(run)
    check = find_damage(run)
    if status["state"] == "done" and not check.damaged and check.good == check.planned:
        assert check.planned == SHARDS, "a run with another plan is said to be good"
        # Who takes the checksum away has forged, not damaged it.
        entries = [run.files.read(f"manifest/{name}") for name in run.files.names("manifest")]
        if all(b'"checksum"' in entry for entry in entries):
            assert run.digest() == DIGEST[0], "a run with another manifest is said to be good"
        return True
    return False


SHARDS = 6
DIGEST: list[str] = []  # of the good run


def led(run: Run) -> bool:
    """A driver comes: it gets the lease, or says who has it. Nobody's claim leads elsewhere."""
    with contextlib.suppress(StoreError):
        live_holder(run.files)
    before = {path for path in Path(run.root).rglob("*") if "lease" not in path.name}
    try:
        with Lease(run.files):
            return True
    except LeaseHeld:
        return True
    finally:
        assert {path for path in Path(run.root).rglob("*") if "lease" not in path.name} == before


def read_as(file: str, kind: Any) -> Callable[[Run], bool]:
    def read(run: Run) -> bool:
        found = run.read_json(file, kind)
        assert isinstance(found, dict)
        return True

    return read


def arrays_read(run: Run) -> bool:
    """Arrays that verify as good have the right numbers."""
    check = find_damage(run)
    if check.damaged:
        return False
    for name, expected in NUMBERS.items():
        values = run.array(name)[:]
        assert np.array_equal(np.asarray(values), expected), "other numbers are said to be good"
        assert run.row_axis(name) == 0
    return True


NUMBERS: dict[str, Any] = {}  # of the good run


def table_read(run: Run) -> bool:
    run.read_table("samples").to_pylist()
    return True


# -- inputs of users ---------------------------------------------------------------------------


def targets_of_users(folder: Path) -> list[Target]:
    """Files that a user names."""
    return [
        Target("preset", presets(), preset_read(folder), changed_bytes, 1_000),
        Target("image", images(), image_read(folder), changed_bytes, 6_000),
        Target("IDX", (idx(),), idx_read(folder), changed_bytes, 3_000),
        Target(
            "checkpoint of torch", checkpoints(), weights_read(folder, "pt"), changed_bytes, 4_000
        ),
        Target(
            "checkpoint of safetensors",
            (save_safetensors(small().state_dict()),),
            weights_read(folder, "safetensors"),
            changed_bytes,
            4_000,
        ),
    ]


def presets() -> tuple[bytes, ...]:
    from importlib.resources import files

    found = [e for e in files("infl_configs").iterdir() if e.name.endswith(".yaml")]
    more = (
        b"train: {epochs: 2, lr: 1e-3}\n",
        b"train: &a {lr: 0.1}\nother: *a\n",
        b"train:\n  epochs: !!int '3'\n  lr: !!float '1'\n  when: 2001-01-01\n",
    )
    return (*(entry.read_bytes() for entry in found), *more)


def preset_read(folder: Path) -> Callable[[bytes], bool]:
    path = folder / "mine.yaml"
    task = TaskSpec(name="mnist", data="none")

    def read(data: bytes) -> bool:
        path.write_bytes(data)
        training_of(task, preset=str(path), given={}, say=lambda _: None)
        return True

    return read


def images() -> tuple[bytes, ...]:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    found = []
    for form, mode in (
        ("PNG", "RGB"), ("PNG", "P"), ("PNG", "I;16"), ("PNG", "LA"), ("JPEG", "RGB"),
        ("JPEG", "CMYK"), ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "F"), ("TIFF", "1"),
    ):  # fmt: skip
        image = Image.fromarray(pixels)
        if mode == "I;16":
            image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 256)
        else:
            image = image.convert(mode)
        stream = io.BytesIO()
        image.save(stream, form)
        found.append(stream.getvalue())
    return tuple(found)


def image_read(folder: Path) -> Callable[[bytes], bool]:
    where = folder / "images"
    where.mkdir()

    def read(data: bytes) -> bool:
        (where / "a.png").write_bytes(data)
        for color in (True, False):
            found = ImageFolder(where, color=color)
            height, width = found.sizes[0]
            image = found.load(0)
            assert image.dtype == torch.uint8
            assert image.shape == (3 if color else 1, height, width)
        return True

    return read


def idx() -> bytes:
    return b"\0\0\x08\x03\0\0\0\x05\0\0\0\x04\0\0\0\x04" + bytes(range(80))


def idx_read(folder: Path) -> Callable[[bytes], bool]:
    digest = hashlib.md5(idx(), usedforsecurity=False).hexdigest()
    file = mnist._IdxFile("five-images", digest, (5, 4, 4))

    def read(data: bytes) -> bool:
        (folder / file.name).write_bytes(data)
        found = mnist._read(folder, file)
        assert found.flatten().tolist() == list(range(80)), "other pixels are accepted"
        return True

    return read


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def checkpoints() -> tuple[bytes, ...]:
    found = []
    for zipped in (True, False):
        for wrap in (lambda s: s, lambda s: {"state_dict": s, "epoch": 3}):
            stream = io.BytesIO()
            torch.save(wrap(small().state_dict()), stream, _use_new_zipfile_serialization=zipped)
            found.append(stream.getvalue())
    return tuple(found)


def weights_read(folder: Path, suffix: str) -> Callable[[bytes], bool]:
    path = folder / f"weights.{suffix}"
    right = small().state_dict()

    def read(data: bytes) -> bool:
        path.write_bytes(data)
        model = small()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        try:
            load_weights(model, path)
        except InflError:
            assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
            raise
        if data[:2] == b"PK":  # an archive has checksums, the other forms have none
            assert all(torch.equal(t, right[n]) for n, t in model.state_dict().items())
        return True

    return read


def copy_of_run(run: Run, root: Path) -> Run:
    """A copy of a finished run alone, and what its good numbers are."""
    shutil.copytree(run.files.url, root / run.id)
    copy = Run.open(str(root), run.id)
    DIGEST[:] = [copy.digest()]
    NUMBERS.update({name: np.asarray(copy.array(name)[:]) for name in copy.array_names()})
    return copy
