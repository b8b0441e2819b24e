"""The notebooks run, are as they were executed, and hold nothing that is not theirs."""

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="no nbclient")
pytest.importorskip("ipykernel", reason="no ipykernel")

import nbformat

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
sys.path.insert(0, str(FOLDER))

from execute import NOTEBOOKS, execute

MOST_BYTES = 300_000
# Paths of a machine, and what warns: none belongs into a page.
STRAY = re.compile(r"/(?:home|root|tmp|work|usr|Users|mnt)/|site-packages|Warning|Traceback")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def faults(notebook) -> list[str]:
    """What is wrong with a notebook's outputs."""
    cells = code_cells(notebook)
    found = []
    if [cell.execution_count for cell in cells] != [*range(1, len(cells) + 1)]:
        found.append("the cells were not executed once each, in order")
    if not any(cell.outputs for cell in cells):
        found.append("no outputs")
    for cell in cells:
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"an error: {output.ename}")
            elif output.get("name") == "stderr":
                found.append(f"standard error: {output.text[:80]}")
            else:
                texts = [output.get("text", ""), *output.get("data", {}).values()]
                stray = [m[0] for text in texts if (m := STRAY.search(str(text)))]
                found += [f"not its own: {word}" for word in stray]
    return found


def test_there_is_one_for_each_audience() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["classifier", "image-to-image", "language-model"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_is_whole_and_small(path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert faults(notebook) == []
    assert path.stat().st_size < MOST_BYTES
    pictures = [o for c in code_cells(notebook) for o in c.outputs if "<img" in str(o)]
    tables = [o for c in code_cells(notebook) for o in c.outputs if "<table" in str(o)]
    assert len(tables) >= 3
    assert pictures or path.stem == "language-model"


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, id=path.stem, marks=pytest.mark.slow if path.stem != "classifier" else ()
        )
        for path in NOTEBOOKS
    ],
)
def test_it_runs_from_an_empty_folder(path, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("INFL_HOME", str(tmp_path / "home"))
    before = nbformat.read(path, as_version=4)
    executed = execute(path, tmp_path, tiny=True)
    assert faults(executed) == []
    kinds = [[o.output_type for o in c.outputs] for c in code_cells(executed)]
    kept = [[o.output_type for o in c.outputs] for c in code_cells(before)]
    assert kinds == kept  # the kept outputs are of this code


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_links_lead_somewhere(path) -> None:
    notebook = nbformat.read(path, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert links
    assert [link for link in links if "://" not in link and not (FOLDER / link).exists()] == []


def test_faults_are_seen() -> None:
    def with_outputs(*outputs, count=1):
        cell = nbformat.v4.new_code_cell("x", outputs=[*outputs], execution_count=count)
        return faults(nbformat.v4.new_notebook(cells=[cell]))

    stream = {"output_type": "stream", "name": "stdout"}
    new = nbformat.v4.new_output
    assert with_outputs(new(**stream, text="fine")) == []
    assert with_outputs(new(**stream, text="fine"), count=2)
    assert with_outputs()
    assert with_outputs(new("error", ename="E", evalue="", traceback=[]))
    assert with_outputs(new("stream", name="stderr", text="fine"))
    assert with_outputs(new(**stream, text="in /home/me/x"))
    assert with_outputs(new("display_data", data={"text/html": "<b>UserWarning</b>"}))
