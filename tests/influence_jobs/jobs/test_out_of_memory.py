"""Batches that do not fit into memory are halved within a run, and that is remembered."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import digits
import numpy as np
import pytest
import torch

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.errors import DataError, RuntimeFault
from influence_jobs.kinds.baseline.spec import BaselineSpec
from influence_jobs.kinds.gradients.spec import GradientsSpec
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.memory import BatchSize, is_out_of_memory
from influence_jobs.report.made import made
from influence_jobs.specs.base import AnySpec, make_spec
from influence_jobs.specs.solvers import (
    ConjugateGradientSettings,
    Curvature,
    EkFacSettings,
    LissaSettings,
    SourceSettings,
)
from influence_jobs.store.run import Run

FITS = 20  # samples
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4000000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS = {
    "CPU": RuntimeError(CPU),
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "numpy": MemoryError("Unable to allocate 71.1 PiB"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    "workspace": RuntimeError(
        "GET was unable to find an engine to execute this computation after trying 7 plans."
    ),
    "driver": RuntimeError("CUDA driver error: out of memory"),
}


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Lets the task's network fail above some samples; gives the sizes of the batches it had."""

    def limit(most: int, error: Exception = ERRORS["CPU"]) -> list[int]:
        plain, seen = digits.DigitsNet.forward, list[int]()

        def forward(self: Any, images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            if len(images) > most:
                raise error
            return plain(self, images)

        monkeypatch.setattr(digits.DigitsNet, "forward", forward)
        return seen

    return limit


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INFL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def spec_of(grad_norms_spec, checkpoint, queries, s_test_of) -> Callable[[str], AnySpec]:
    """A spec of every kind that takes samples through the model."""
    task, first = grad_norms_spec.task, checkpoint.model_copy(update={"epoch": 1})
    curvature = Curvature(samples=300)

    def s_test(solver: Any, **fields: Any) -> AnySpec:
        return s_test_of(solver=solver, curvature=curvature, **fields)

    def make(name: str) -> AnySpec:
        specs: dict[str, Callable[[], AnySpec]] = {
            "grad-norms": lambda: grad_norms_spec.model_copy(
                update={"checkpoints": (first, checkpoint), "combine": "keep"}
            ),
            "gradients": lambda: make_spec(
                GradientsSpec, task=task, checkpoint=checkpoint, modules=("conv2", "head")
            ),
            "influence": lambda: make_spec(
                InfluenceSpec, task=task, s_tests=(s_test_of(),), keep_modules=True
            ),
            "relative": lambda: make_spec(
                InfluenceSpec,
                task=task,
                s_tests=(s_test(EkFacSettings(damping=0.1)),),
                relative="theta",
            ),
            "loss": lambda: make_spec(
                BaselineSpec, task=task, method="loss", queries=queries, checkpoint=checkpoint
            ),
            "norm": lambda: make_spec(
                BaselineSpec, task=task, method="norm", queries=queries, checkpoint=checkpoint
            ),
            "cg": lambda: s_test(ConjugateGradientSettings(damping=0.5)),
            "lissa": lambda: s_test(
                LissaSettings(damping=0.5, scale=30.0, depth=5, batch_size=64, repeats=2)
            ),
            "ek-fac": lambda: s_test(EkFacSettings(damping=0.1)),
            "source": lambda: s_test(SourceSettings()),
        }
        return specs[name]()

    return make


def values_of(run: Run) -> dict[str, np.ndarray]:
    return {name: np.asarray(run.array(name)[...]) for name in run.array_names()}


LONGEST = ("relative", "norm", "gradients")  # they halve as "influence" does
KINDS = [
    "grad-norms",
    "gradients",
    "influence",
    "relative",
    "loss",
    "norm",
    "cg",
    "lissa",
    "ek-fac",
]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind in LONGEST else ()) for kind in KINDS],
)
def test_halved_batches_give_the_same_numbers_up_to_rounding(
    kind: str, spec_of, fresh_root, carry_out, limited, home: Path
) -> None:
    spec = spec_of(kind)
    expected = values_of(carry_out(spec))
    root = fresh_root()
    for needed in getattr(spec, "s_tests", ()):
        carry_out(needed, root=root)
    seen = limited(FITS)
    run = carry_out(spec, root=root)
    assert max(seen) > FITS  # it was tried
    found = values_of(run)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert np.isfinite(values).all()
        np.testing.assert_allclose(values, expected[name], rtol=2e-3, atol=1e-4, err_msg=name)
        close = np.abs(values - expected[name]) <= 1e-5 * np.abs(expected[name]).max()
        assert close.all(), name
    used = {entry.batch_size for entry in run.manifest.entries() if entry.batch_size}
    assert used == {16}
    assert made(run).batches.startswith("16 samples")


@pytest.mark.parametrize("error", ERRORS)
def test_every_way_to_run_out_of_memory_is_known(error: str) -> None:
    assert is_out_of_memory(ERRORS[error])
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    batches, seen = BatchSize(64), list[int]()

    def function(ids: torch.Tensor, _: Any) -> int:
        if len(ids) > 10:
            raise ERRORS[error]
        seen.extend(ids.tolist())
        return len(ids)

    groups = [torch.arange(100), torch.arange(100, 117)]
    sizes = [size for _, size in batches.map(function, groups)]
    assert seen == list(range(117))  # each once, in order
    assert (batches.size, max(sizes)) == (8, 8)
    assert sum(sizes[-3:]) == 17  # no batch of two groups


def test_other_errors_are_not_tried_again() -> None:
    calls = list[int]()

    def function(ids: torch.Tensor, _: Any) -> None:
        calls.append(len(ids))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        list(BatchSize(8).map(function, [torch.arange(20)]))
    assert calls == [8]


def test_samples_that_were_fetched_in_advance_are_fetched_anew_in_small_batches() -> None:
    fetched = list[list[int]]()

    def fetch(ids: torch.Tensor) -> torch.Tensor:
        fetched.append(ids.tolist())
        return ids.clone()

    def in_advance(items: Iterator[Any]) -> Iterator[Any]:
        yield from list(items)

    def function(ids: torch.Tensor, same: torch.Tensor) -> None:
        assert torch.equal(ids, same)
        if len(ids) > 2:
            raise ERRORS["GPU"]

    found = BatchSize(8).map(function, [torch.arange(16)], fetch=fetch, loader=in_advance)
    assert torch.cat([ids for ids, _ in found]).tolist() == list(range(16))
    assert fetched[:2] == [list(range(8)), list(range(8, 16))]


def test_a_sample_that_does_not_fit_alone_is_told_in_one_line(
    spec_of, fresh_root, limited, carry_out, home: Path
) -> None:
    limited(0)
    told = "out of memory with sample 0 alone: choose fewer layers (--layer), fewer queries, or a "
    for kind, line in {"loss": told, "grad-norms": "out of memory: choose a smaller"}.items():
        with pytest.raises(RuntimeFault) as found:
            carry_out(spec_of(kind), root=fresh_root())
        assert f"6 of 6 shards failed, the first: {line}" in str(found.value)
        assert "\n" not in str(found.value)


def test_what_cudnn_cannot_compute_is_told_with_what_it_says() -> None:
    """It says the same where it lacks memory."""

    def function(ids: torch.Tensor, _: Any) -> None:
        raise ERRORS["workspace"]

    with pytest.raises(DataError, match=r"^out of memory with sample 3 alone \(GET was unable to"):
        [*BatchSize(4).map(function, [torch.arange(3, 9)])]


def test_the_halved_size_is_remembered_for_runs_without_a_size_alone(
    spec_of, fresh_root, limited, home: Path
) -> None:
    seen = limited(FITS)

    def tried(batch_size: int | None) -> int:
        run = Run.create(str(fresh_root()), spec_of("loss"))
        seen.clear()
        drive(run.root, run.id, InlineBackend(), batch_size=batch_size)
        assert {e.batch_size for e in run.manifest.entries() if e.batch_size} == {16}
        return max(seen)

    assert tried(None) == 64
    (file,) = (home / "batches").iterdir()
    kept = json.loads(file.read_text())
    assert (kept["batch_size"], kept["out_of_memory"]) == (16, True)
    assert "digits:DigitsTask" in kept["of"]
    assert tried(None) == 16
    assert tried(64) == 64  # as it was asked for
    file.write_text("not JSON")
    assert tried(None) == 64


def test_a_resumed_run_goes_on_with_the_halved_size(
    spec_of, fresh_root, limited, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(str(fresh_root()), spec_of("loss"))
    seen = limited(FITS)
    drive(run.root, run.id, InlineBackend(), shard_rows=256)
    first = min(run.manifest.done_shards())
    run.files.delete(f"manifest/{first}.json")
    run.files.delete("manifest/finish.json")
    run.files.delete("summary.json")
    run.files.delete("status.json")
    seen.clear()
    drive(run.root, run.id, InlineBackend())
    assert max(seen) == 16


def test_nothing_is_remembered_where_there_is_no_home(
    spec_of, fresh_root, limited, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("INFL_HOME", str(tmp_path / "file" / "below"))
    limited(FITS)
    run = Run.create(str(fresh_root()), spec_of("loss"))
    drive(run.root, run.id, InlineBackend())
    assert run.manifest.entries()[0].batch_size == 16
