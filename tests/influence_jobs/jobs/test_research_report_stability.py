"""Table 4.1 of the research report: images in the top 100 by attribution of two trainings."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from infl_configs import read_preset
from influence_jobs.kinds.train.spec import TrainedCheckpoint, TrainSpec
from influence_jobs.specs.base import TaskSpec, make_spec
from influence_jobs.store.checkpoints import load_checkpoint
from influence_jobs.store.run import Run
from influence_jobs.tasks.mnist import MnistTask

TEST_IDS = [3520, 3879, 597, 2667, 5673, 8616, 5570, 9489, 3714, 7362]
TOP = 100


def top_by_query(root: Path, data_dir: Path, seed: int) -> list[set[int]]:
    """Train with recorded norms, then rank by activations x norms over both hidden layers."""
    paths = {"data_dir": str(data_dir)}
    task = MnistTask(data_dir=str(data_dir))
    spec = make_spec(
        TrainSpec,
        task=TaskSpec(name="mnist", options={"limit": None}, paths=paths, data=task.fingerprint()),
        seed=seed,
        norm_layers=("fc1", "fc2"),
        **read_preset("mnist")["train"],
    )
    run = Run.create(str(root), spec)
    drive(str(root), run.id, InlineBackend(threads=1))
    model = task.model().eval()
    load_checkpoint(model, str(root), TrainedCheckpoint(train=spec, epoch=20))
    activations: dict[str, npt.NDArray[np.float32]] = {}
    for name in ("fc1", "fc2"):
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, name=name: activations.__setitem__(name, output.relu().numpy())
        )
    with torch.no_grad():
        model(task.test_images()[TEST_IDS])
    scores_QN = sum(
        activations[name] @ np.asarray(run.array(f"norms/{name}")[:]).T for name in activations
    )
    return [set(np.argsort(-row)[:TOP].tolist()) for row in scores_QN]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_seeds_share_45_to_70_percent_of_their_top_100(tmp_path: Path, mnist_dir: Path) -> None:
    first, second = (top_by_query(tmp_path, mnist_dir, seed) for seed in (0, 1))
    overlaps = [len(a & b) for a, b in zip(first, second, strict=True)]
    print("overlap of the top 100, by test id:", dict(zip(TEST_IDS, overlaps, strict=True)))
    assert all(45 <= overlap <= 70 for overlap in overlaps), overlaps
