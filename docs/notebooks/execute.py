"""Execute the notebooks of this folder and keep their outputs: `make notebooks`.

    python docs/notebooks/execute.py [NAME.ipynb ...]

Each is executed in an empty folder, where its runs are made and then deleted. A notebook's cell
with the tag `parameters` says how large its work is; tests take the smaller values of the
notebook's metadata `tiny` instead.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))
CELL_DEADLINE_S = 600


def execute(notebook: Path, folder: Path, *, tiny: bool = False) -> Any:
    """Execute a notebook in a folder; return it with its outputs.

    Raises:
        CellExecutionError: A cell raised an error.
    """
    found = nbformat.read(notebook, as_version=4)
    if tiny:
        (cell,) = [c for c in found.cells if "parameters" in c.metadata.get("tags", ())]
        cell.source += f"\n{found.metadata['tiny']}"
    place = {"metadata": {"path": str(folder)}}
    # tqdm, which transformers imports, misses its widgets; nothing here shows its bars.
    env = {**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"}
    client = NotebookClient(found, timeout=CELL_DEADLINE_S, kernel_name="python3", resources=place)
    client.execute(env=env)
    for cell in found.cells:
        cell.metadata.pop("execution", None)  # when each cell ran
    return found


def main() -> None:
    """Execute the named notebooks, or all."""
    names = sys.argv[1:]
    for notebook in [HERE / Path(name).name for name in names] or NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(notebook, Path(folder)), notebook)
        print(f"{notebook.name}: {notebook.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
