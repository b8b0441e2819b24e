"""Benchmarks are run by hand, and some need peers: what they take from us must be there."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted(Path(__file__).parents[2].glob("benchmarks/*.py"))
OURS = ("influence_jobs", "infl_cluster", "infl_cli", "infl_configs")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_benchmark_takes_from_us_is_there(script: Path) -> None:
    imports = [
        node
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OURS)
    ]
    for node in imports:
        module = importlib.import_module(str(node.module))
        missing = [alias.name for alias in node.names if not _has(module, alias.name)]
        assert missing == [], f"{script.name}: {node.module} has no {missing}"


def test_what_is_run_where_a_gpu_is_needs_neither_ray_nor_zarr() -> None:
    program = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('ray', 'zarr'):\n"
        "            raise ModuleNotFoundError(f'{name} is hidden')\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "sys.path[:0] = ['benchmarks', '.']\n"
        "import gpu, tests.pretend_gpu.test_card\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _has(module: object, name: str) -> bool:
    if hasattr(module, name):
        return True
    try:
        importlib.import_module(f"{module.__name__}.{name}")  # type: ignore[attr-defined]
    except ModuleNotFoundError:
        return False
    return True
