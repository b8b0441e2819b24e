"""The numerical rooms run with torch, numpy and Pillow alone, as on a bare GPU machine."""

import subprocess
import sys

MODULES = (
    "influence_jobs",
    "influence_jobs.curvature",
    "influence_jobs.gradients",
    "influence_jobs.methods.attribution",
    "influence_jobs.methods.baselines",
    "influence_jobs.methods.relative",
    "influence_jobs.models.checkpoints",
    "influence_jobs.perceptrons.ensemble",
    "influence_jobs.perceptrons.lissa",
    "influence_jobs.tasks.ffdnet",
    "influence_jobs.tasks.mnist",
    "influence_jobs.training.ensemble",
    "influence_jobs.training.ensemble_width",
    "influence_jobs.training.recorded_norms",
    "influence_jobs.training.train",
)
ABSENT = (
    "ray",
    "zarr",
    "pydantic",
    "typer",
    "pyarrow",
    "torchvision",
    "platformdirs",
    "filelock",
    "safetensors",
)

SCRIPT = f"""
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
for module in {MODULES!r}:
    importlib.import_module(module)
"""


def test_the_numerical_rooms_need_neither_ray_nor_zarr_nor_pydantic() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
