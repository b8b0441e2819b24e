"""A user's code reaches a cluster that does not have it, and nothing else of the user's does."""

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from infl_cluster import shipping, versions
from infl_cluster.head import Head
from influence_jobs.errors import RuntimeFault, SpecError
from influence_jobs.specs.base import TaskSpec
from influence_jobs.store.find import find_run
from influence_jobs.store.run import Run
from influence_jobs.tasks.fingerprints import code_of
from influence_jobs.tasks.registry import folder_of, name_of, task_class

TASK = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from influence_jobs import Task
{imports}


class Mine(Task):
    output_loss = "cross-entropy"

    def model(self):
        torch.manual_seed(0)
        return nn.Linear(3, 2)

    def train_data(self):
        torch.manual_seed(0)
        return TensorDataset(torch.randn({samples}, 3), torch.arange({samples}) % 2)

    test_data = train_data

    def outputs(self, model, batch):
        return model(batch[0])

    def targets(self, batch):
        return batch[1]

    def losses(self, model, batch):
        return F.cross_entropy(self.outputs(model, batch), batch[1], reduction="none")
"""
SECRETS = (".env", "token", "auth_token", "id_rsa", "weights.pt", "model.safetensors", "table.csv")


def secrets_in(folder: Path) -> None:
    """Files that must stay where they are."""
    for name in SECRETS:
        (folder / name).write_text("secret")
    (folder / "data").mkdir()
    (folder / "data" / "images.npy").write_text("secret")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "lib.py").write_text("secret = 1")
    (folder / "env").mkdir()
    (folder / "env" / "pyvenv.cfg").write_text("")
    (folder / "env" / "lib.py").write_text("secret = 1")


def a_project(folder: Path, name: str) -> Path:
    """A file with a task, a module that it needs beside it, and secrets around; made in `name`."""
    place = folder / name
    place.mkdir()
    secrets_in(place)
    helper = f"helper_of_{name}"
    (place / f"task_{name}.py").write_text(
        TASK.format(imports=f"from {helper} import SAMPLES", samples="SAMPLES")
    )
    (place / f"{helper}.py").write_text("SAMPLES = 40\n")
    (place / "other.py").write_text("import nothing_that_exists\n")
    return place / f"task_{name}.py"


def a_package(folder: Path, name: str) -> Path:
    """The same in a package, with imports from its own place and one by a name made at run time."""
    place = folder / name
    (place / "deep").mkdir(parents=True)
    secrets_in(place)
    for package in (place, place / "deep"):
        (package / "__init__.py").write_text("")
    later = f'import importlib\nLATER = importlib.import_module("{name}.la" + "ter").VALUE'
    (place / "deep" / "task.py").write_text(
        TASK.format(imports=f"from ..sizes import SAMPLES\n{later}", samples="SAMPLES")
    )
    (place / "sizes.py").write_text("SAMPLES = 40\n")
    (place / "later.py").write_text("VALUE = 1\n")
    (place / "labels.json").write_text("{}")
    return place / "deep" / "task.py"


def spec_of(file: Path) -> TaskSpec:
    kind = task_class(f"{file}:Mine")
    return TaskSpec(
        name=name_of(f"{file}:Mine"), data="", code=code_of(kind), folder=folder_of(kind)
    )


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def held(parcel: shipping.Parcel) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(parcel.data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_an_archive_has_the_task_and_what_it_imports(clean: Path) -> None:
    file = a_project(clean, "beside")
    parcel = shipping.pack(spec_of(file))
    assert {*held(parcel)} == {"task_beside.py", "helper_of_beside.py"}
    assert parcel.folders == (".",)
    assert b"secret" not in b"".join(held(parcel).values())
    assert {*SECRETS, "data/", ".venv/", "env/", "other.py"} == {*parcel.left}
    said = parcel.words()
    assert said.startswith("helper_of_beside.py, task_beside.py (")
    assert "stays here: .env, .venv/, auth_token, data/" in said
    assert "\n" not in said


def test_an_archive_has_the_whole_package(clean: Path) -> None:
    file = a_package(clean, "packed")
    parcel = shipping.pack(spec_of(file))
    inside = ("__init__.py", "deep/__init__.py", "deep/task.py", "later.py", "sizes.py")
    assert {*held(parcel)} == {f"packed/{name}" for name in inside}
    assert b"secret" not in b"".join(held(parcel).values())
    assert {f"packed/{name}" for name in (*SECRETS, "labels.json", "data/")} <= {*parcel.left}


def test_the_same_code_is_the_same_archive(clean: Path) -> None:
    file = a_project(clean, "same")
    spec = spec_of(file)
    first = shipping.pack(spec).name
    os.utime(file, (0, 1e9))
    assert shipping.pack(spec).name == first
    (clean / "same" / "helper_of_same.py").write_text("SAMPLES = 41\n")
    assert shipping.pack(spec).name != first


def test_installed_tasks_are_not_sent() -> None:
    assert shipping.pack(TaskSpec(name="mnist", data="")) is None


def test_code_that_ray_would_not_take_is_refused(
    clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = a_project(clean, "large")
    monkeypatch.setattr(shipping, "MOST_BYTES", 100)
    with pytest.raises(SpecError, match=r"task_large:Mine is .* packed, and Ray takes 100 B: inst"):
        shipping.pack(spec_of(file))


def test_a_link_of_another_name_is_refused(clean: Path) -> None:
    file = a_project(clean, "linked")
    file.rename(clean / "real.py")
    file.symlink_to(clean / "real.py")
    with pytest.raises(SpecError, match=r"module task_linked is a link to .*real.py"):
        shipping.pack(spec_of(file))


def test_a_package_with_a_link_to_elsewhere_is_refused(clean: Path) -> None:
    file = a_package(clean, "joined")
    elsewhere = clean / "store" / "joined"
    elsewhere.mkdir(parents=True)
    sizes = clean / "joined" / "sizes.py"
    sizes.rename(elsewhere / "sizes.py")
    sizes.symlink_to(elsewhere / "sizes.py")
    said = r"module joined.sizes is a link to .*store/joined/sizes.py, which has another package"
    with pytest.raises(SpecError, match=said):
        shipping.pack(spec_of(file))


@pytest.mark.parametrize("names", [("a_common", "task_apart"), ("task_apart", "z_common")])
def test_code_of_several_folders_keeps_its_fingerprint(
    clean: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    """It depends on the order of the files, so they must lie to each other as they did."""
    (common,) = {*names} - {"task_apart"}
    task = f"task_apart_{common}"
    root = clean / "elsewhere"  # where one works
    (root / f"{common}.py").write_text("SAMPLES = 40\n")
    (root / "tasks").mkdir()
    file = root / "tasks" / f"{task}.py"
    file.write_text(TASK.format(imports=f"from {common} import SAMPLES", samples="SAMPLES"))
    spec = spec_of(file)
    parcel = shipping.pack(spec)
    assert {*held(parcel)} == {f"{common}.py", f"tasks/{task}.py"}
    there = clean / "node"
    for name, text in held(parcel).items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(text)
    code = (
        "from infl_cluster import shipping; shipping.unpack()\n"
        "from influence_jobs.tasks.fingerprints import code_of\n"
        f"from {task} import Mine; print(code_of(Mine))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=there, env={**os.environ, **parcel.env()},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == spec.code


TRAIN = (
    sys.executable, "-c", "from infl_cli.entry import main; main()", "submit", "train", "--epochs",
    "1", "--lr", ".1",
)  # fmt: skip


def submit(head: Head, folder: Path, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Run `infl submit train` from a folder, on the Ray of the tests as on any cluster."""
    command = [*TRAIN, *words, "--address", head.dashboard_url, "--runs", str(folder / "runs")]
    environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(head.token_path), **env}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


@pytest.mark.ray
@pytest.mark.parametrize("make", [a_project, pytest.param(a_package, marks=pytest.mark.slow)])
def test_a_run_on_a_cluster_that_has_none_of_the_code(
    tmp_path: Path, ray_head: Head, make: Callable[[Path, str], Path]
) -> None:
    """The head was started before the file was written, elsewhere, and without its folder."""
    name = f"travels_{make.__name__}"
    file = make(tmp_path, name)
    done = submit(ray_head, tmp_path, "--task", f"{file}:Mine")
    assert done.returncode == 0, done.stderr
    assert f"to {ray_head.dashboard_url}: " in done.stderr
    assert "stays here: " in done.stderr
    run = find_run(str(tmp_path / "runs"), "train")
    log = "".join(path.read_text() for path in Path(run.root, run.id, "logs").iterdir())
    assert "computes on cpu" in log
    # Where it ran: in Ray's folder for the archive, not in ours.
    unpacked = [
        path
        for path in ray_head.temp_dir.rglob("*.py")
        if path.name in (file.name, f"helper_of_{name}.py") and "working_dir_files" in path.parts
    ]
    assert unpacked
    assert not [
        path
        for folder in {path.parent for path in unpacked}
        for path in folder.rglob("*")
        if path.name in (*SECRETS, "images.npy", "labels.json")
    ]
    # The same without Ray, in a process of its own.
    here = subprocess.run(
        [*TRAIN, "--task", f"{file}:Mine", "--local", "--runs", str(tmp_path / "here")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert here.returncode == 0, here.stderr
    assert Run.open(str(tmp_path / "here"), run.id).digest() == run.digest()


@pytest.mark.slow
@pytest.mark.ray
def test_other_versions_are_refused_before_a_shard_is_written(
    tmp_path: Path, ray_head: Head
) -> None:
    """The submitting side claims another torch than the nodes have."""
    file = a_project(tmp_path, "versions")
    claimed = tmp_path / "claimed" / "torch-9.9.9.dist-info"
    claimed.mkdir(parents=True)
    (claimed / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    path = os.pathsep.join(filter(None, [str(claimed.parent), os.environ.get("PYTHONPATH")]))
    done = submit(ray_head, tmp_path, "--task", f"{file}:Mine", PYTHONPATH=path)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "and the run was submitted with torch 9.9.9: install the same on the nodes" in last
    assert f"node {os.uname().nodename} has torch " in last
    assert not [*(tmp_path / "runs").glob("*/data.zarr")]
    assert not [*(tmp_path / "runs").glob("*/manifest/*")]


def test_versions_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(**names: str) -> None:
        found = {name.replace("_", "-"): value for name, value in names.items()}
        monkeypatch.setenv(versions.VARIABLE, json.dumps(found))

    ours = {"influence-jobs": "0.2", "revision": "aaa", "torch": "2.14.1+cu130"}
    told(influence_jobs="0.2", revision="aaa", torch="2.14.1")
    assert versions.difference(ours, "n") is None
    assert versions.difference({**ours, "revision": "bbb"}, "n") == (
        "node n has revision bbb, and the run was submitted with revision aaa: install the same on "
        "the nodes and where you submit"
    )
    assert versions.difference({"influence-jobs": "0.2", "torch": "2.14.1"}, "n") is None
    said = versions.difference({"influence-jobs": "0.1"}, "n")
    assert said.startswith("node n has influence-jobs 0.1, torch not at all, and the run was subm")
    told(influence_jobs="0.2", torch="2.14.1")
    assert versions.difference(ours, "n") is None
    monkeypatch.delenv(versions.VARIABLE)
    assert versions.difference({}, "n") is None
    monkeypatch.setattr(versions, "software", lambda: {"torch": "1"})
    told(torch="2")
    with pytest.raises(RuntimeFault, match="has torch 1, and the run was submitted with torch 2"):
        versions.require_same()
