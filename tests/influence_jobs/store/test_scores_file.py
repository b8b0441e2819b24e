"""What names a file of scores."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from influence_jobs.store.scores_file import is_scores_file


@pytest.mark.parametrize("word", ["scores.npy", "some/scores.parquet", "scores.zarr"])
def test_a_suffix_tells_a_file(word: str) -> None:
    assert is_scores_file(word)


def test_a_folder_of_zarr_is_one(tmp_path: Path) -> None:
    assert not is_scores_file(str(tmp_path))
    zarr.create_array(str(tmp_path / "scores"), data=np.zeros((2, 3)))
    assert is_scores_file(str(tmp_path / "scores"))


def test_many_runs_are_no_file() -> None:
    """Their names together are longer than a file's name may be."""
    assert not is_scores_file("+".join(["influence-mnist-0123456789ab"] * 10))
