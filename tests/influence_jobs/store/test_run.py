from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from influence_jobs.errors import StoreError
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.store.files import LocalFiles
from influence_jobs.store.find import find_run, run_ids
from influence_jobs.store.layout import ArrayLayout, chunk_rows
from influence_jobs.store.run import Run
from influence_jobs.store.top import largest_rows


@pytest.fixture
def run(tmp_path: Path, grad_norms_spec: GradNormsSpec) -> Run:
    made = Run.create(str(tmp_path), grad_norms_spec)
    made.create_arrays([ArrayLayout("norms/a", (10, 3), 0, 4, ("sample", "channel"))])
    return made


def test_rows_read_back_and_missing_ones_are_nan(run: Run) -> None:
    run.write_rows("norms/a", 4, np.ones((4, 3)))
    values = run.array("norms/a")[:]
    assert np.isnan(values[:4]).all()
    assert (values[4:8] == 1).all()
    assert run.array("norms/a").metadata.dimension_names == ("sample", "channel")


@pytest.mark.parametrize(("start", "rows"), [(2, 2), (0, 3), (4, 5)])
def test_rows_that_share_a_chunk_with_others_are_refused(run: Run, start: int, rows: int) -> None:
    with pytest.raises(StoreError, match="not whole chunks of 4"):
        run.write_rows("norms/a", start, np.ones((rows, 3)))


def test_the_last_chunk_may_be_short(run: Run) -> None:
    run.write_rows("norms/a", 8, np.ones((2, 3)))


def test_a_flipped_byte_does_not_read_back_as_a_number(run: Run) -> None:
    run.write_rows("norms/a", 0, np.random.default_rng(0).random((4, 3)))
    path = Path(run.files.url, "data.zarr/norms/a/c/0/0")
    clean = path.read_bytes()
    for position in range(len(clean)):
        flipped = bytearray(clean)
        flipped[position] ^= 1
        path.write_bytes(bytes(flipped))
        with pytest.raises(ValueError, match="checksum"):
            Run.open(run.root, run.id).read_rows("norms/a", 0, 4)


def test_arrays_are_created_once(run: Run) -> None:
    run.write_rows("norms/a", 0, np.ones((4, 3)))
    run.create_arrays([ArrayLayout("norms/a", (10, 3), 0, 4, ("sample", "channel"))])
    assert (run.array("norms/a")[:4] == 1).all()


def test_unknown_arrays_are_named(run: Run) -> None:
    with pytest.raises(StoreError, match="has no array 'norms/b'; it has norms/a"):
        run.array("norms/b")


@given(num_rows=st.integers(1, 10**6), row_bytes=st.integers(4, 10**8))
def test_chunks_are_powers_of_two_of_bounded_size(num_rows: int, row_bytes: int) -> None:
    rows = chunk_rows(num_rows, row_bytes)
    assert rows & (rows - 1) == 0
    assert rows == 1 or rows * row_bytes <= 4 * 2**20
    assert 1 <= rows <= 1024


@given(num_rows=st.integers(1, 2 * 10**9))
def test_chunks_are_as_ever_up_to_16_million_rows_and_few_beyond(num_rows: int) -> None:
    rows = chunk_rows(num_rows, 4)
    if num_rows < 2 * 8192 * 1024:
        aim = max(256, min(1024, num_rows // 32))
        assert rows == 2 ** (aim.bit_length() - 1)
    assert num_rows / rows <= 2 * 8192


def test_runs_are_found_by_what_is_enough_of_their_name(run: Run, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    assert run_ids(run.root) == [run.id]
    assert find_run(run.root, "grad").id == run.id
    assert find_run(run.root, run.id[-12:-4]).id == run.id
    with pytest.raises(StoreError, match="there is no run train"):
        find_run(run.root, "train")


def test_an_ambiguous_name_is_not_guessed(run: Run, grad_norms_spec: GradNormsSpec) -> None:
    other = Run.create(run.root, grad_norms_spec.model_copy(update={"seed": 1}))
    with pytest.raises(StoreError) as refused:
        find_run(run.root, "grad-norms-digits")
    said = str(refused.value)
    ids = sorted([run.id, other.id])
    seeds = {run.id: "seed: 0", other.id: "seed: 1"}
    assert said.startswith(
        f"'grad-norms-digits' may be any of {ids[0]} ({seeds[ids[0]]}), {ids[1]} ({seeds[ids[1]]}):"
    )
    assert find_run(run.root, said.rpartition(" ")[2]).id == ids[0]  # as it proposes


def test_of_many_runs_some_are_listed(run: Run, grad_norms_spec: GradNormsSpec) -> None:
    for seed in range(1, 12):
        Run.create(run.root, grad_norms_spec.model_copy(update={"seed": seed}))
    with pytest.raises(StoreError, match=r"\), 4 more: give the whole id"):
        find_run(run.root, "grad")


def test_a_run_folder_that_cannot_be_written(
    tmp_path: Path, grad_norms_spec: GradNormsSpec
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write runs to .*--runs"):
        Run.create(str(tmp_path / "file"), grad_norms_spec)


def test_the_largest_rows_are_those_of_a_full_sort(finished_run: Run) -> None:
    values = finished_run.array("norms/conv2")[:]
    rows, totals = largest_rows(finished_run, "norms/conv2", 7)
    expected = np.argsort(-values.astype(np.float64).sum(1), kind="stable")[:7]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(totals, np.asarray(values)[expected].sum(1), rtol=1e-6)
    by_channel, _ = largest_rows(finished_run, "norms/conv2", 3, channel=5)
    np.testing.assert_array_equal(by_channel, np.argsort(-values[:, 5], kind="stable")[:3])


def test_arrays_say_what_they_hold(finished_run: Run) -> None:
    group = zarr.open_group(f"{finished_run.files.url}/data.zarr", mode="r")
    array = group["norms/conv2"]
    assert array.attrs["quantity"].startswith("L2 norm over the input axis")
    assert array.attrs["layer"] == "conv2"
    assert group.attrs["run"] == finished_run.id


def test_chunks_are_on_the_disk_before_the_manifest_vouches_for_them(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.create_arrays([ArrayLayout("kept", (2, 10, 3), 1, 4, ("checkpoint", "sample", "channel"))])
    synced: list[str] = []
    monkeypatch.setattr(LocalFiles, "sync", lambda _self, names: synced.extend(names))
    run.write_rows("kept", 4, np.ones((2, 6, 3)))
    written = {
        path.relative_to(run.files.url).as_posix()
        for path in Path(run.files.url, "data.zarr/kept/c").rglob("*")
        if path.is_file()
    }
    assert len(written) == 4
    assert set(synced) == written


def test_a_run_without_its_spec_is_told_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "grad-norms-mnist-0123456789ab").mkdir()
    with pytest.raises(StoreError, match=r"has lost its spec\.json: submit the same request"):
        find_run(str(tmp_path), "grad-norms-mnist-0123456789ab")
