"""examples/mislabelled.py: which labels are wrong, left out, and right again."""

from pathlib import Path

import numpy as np
import torch
from mislabelled import Mislabelled

from influence_jobs import Draw


def test_wrong_labels_images_left_out_and_images_corrected(mnist_dir: Path, tmp_path: Path) -> None:
    task = Mislabelled(data_dir=str(mnist_dir), limit=100, share=0.1)
    given = task.describe(np.arange(100))
    wrong = np.flatnonzero(given["label"] != given["true"])
    assert len(wrong) == 10
    again = Mislabelled(data_dir=str(mnist_dir), limit=100, share=0.1, flip_seed=1)
    assert set(np.flatnonzero(again.describe(np.arange(100))["label"] != given["true"])) != {*wrong}

    file = tmp_path / "suspects.csv"
    suspects = [int(wrong[0]), 0 if wrong[0] else 1, int(wrong[3])]
    file.write_text("rank,image\n" + "".join(f"1,{i}\n" for i in suspects))
    fewer = Mislabelled(data_dir=str(mnist_dir), limit=100, share=0.1, without=str(file))
    left = fewer.describe(np.arange(97))
    assert len(fewer.train_data()) == 97
    assert left["image"].tolist() == [i for i in range(100) if i not in suspects]
    assert left["label"].tolist() == np.delete(given["label"], suspects).tolist()
    _, labels = fewer.batch(torch.arange(97), Draw(0))
    assert labels.tolist() == left["label"].tolist()

    right = Mislabelled(data_dir=str(mnist_dir), limit=100, share=0.1, corrected=str(file))
    seen = right.describe(np.arange(100))
    still = np.flatnonzero(seen["label"] != seen["true"])
    assert still.tolist() == [i for i in wrong if i not in suspects]
    _, labels = right.batch(torch.arange(100), Draw(0))
    assert labels.tolist() == seen["label"].tolist()

    # What decides the result is in the fingerprint; a list's name is not.
    assert len({t.fingerprint() for t in (task, again, fewer, right)}) >= 3
    other = tmp_path / "other.csv"
    other.write_bytes(file.read_bytes())
    same = Mislabelled(data_dir=str(mnist_dir), limit=100, share=0.1, corrected=str(other))
    assert same.fingerprint() == right.fingerprint() != task.fingerprint()
