"""The progress of a run in a cell: one output, updated in place, that ends with the result."""

import os
import re
import sys

import pytest

nbclient = pytest.importorskip("nbclient", reason="no nbclient")
pytest.importorskip("ipykernel", reason="no ipykernel")

import nbformat

pytestmark = pytest.mark.slow  # it starts a kernel

START = """
import os, signal, threading
import influence_jobs
from digits import DigitsTask
"""
RUN = 'found = influence_jobs.submit("influence", task=DigitsTask(width=4), epochs=12, test=[3])'
ENDLESS = 'influence_jobs.submit("train", task=DigitsTask(width=4), epochs=5000)'
# As the button of a notebook does it, once the training is under way.
INTERRUPT = """
def interrupt():
    while not os.path.isdir("runs") or not any(
        os.path.isdir(f"runs/{name}/progress") for name in os.listdir("runs") if name not in known
    ):
        pass
    os.kill(os.getpid(), signal.SIGINT)

known = set(os.listdir("runs"))
threading.Thread(target=interrupt).start()
"""
STATES = "[(name, influence_jobs.open_run(f'runs/{name}').state) for name in os.listdir('runs')]"


class Client(nbclient.NotebookClient):  # type: ignore[name-defined]
    """Keeps every message that shows something, updates too."""

    def process_message(self, msg, cell, cell_index):
        if msg["header"]["msg_type"] in ("display_data", "update_display_data"):
            self.seen.append((cell_index, msg["header"]["msg_type"], msg["content"]))
        return super().process_message(msg, cell, cell_index)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Cells: a run with what it needs, the same again, an interrupted one, and what is left."""
    folder = tmp_path_factory.mktemp("notebook")
    cells = [START, RUN, RUN, INTERRUPT + ENDLESS, STATES]
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, cells)])
    client = Client(
        notebook, timeout=300, allow_errors=True, resources={"metadata": {"path": str(folder)}}
    )
    client.seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFL_HOME", str(folder / "home"))
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for examples/digits.py
        client.execute()
    return notebook.cells, client.seen


def test_one_output_is_updated_and_ends_with_the_result(executed) -> None:
    cells, seen = executed
    shown = [(kind, content) for cell, kind, content in seen if cell == 1]
    assert [kind for kind, _ in shown[1:]] == ["update_display_data"] * (len(shown) - 1)
    assert len({content["transient"]["display_id"] for _, content in shown}) == 1
    texts = [content["data"]["text/plain"] for _, content in shown]
    assert any(re.search(r"\d+%  [\d,]+ of [\d,]+ samples, .*ETA \d+:\d\d", t) for t in texts)
    assert "<progress" in "".join(content["data"]["text/html"] for _, content in shown)
    last = texts[-1].splitlines()
    assert re.fullmatch(
        r"influence-digitstask-\w+ \(3 of 3\): done, 1,500 samples in \d+:\d\d", last[-1]
    )
    assert all(": done, " in line for line in last)
    (output,) = [o for o in cells[1].outputs if o.output_type == "display_data"]
    assert output["data"]["text/plain"] == texts[-1]
    assert "<progress" not in output["data"]["text/html"]


def test_a_run_that_is_done_says_so_in_a_line(executed) -> None:
    cells, _ = executed
    (output,) = cells[2].outputs
    assert (output.output_type, output.name) == ("stream", "stdout")
    assert output.text.endswith("is already done\n")


def test_an_interrupted_run_says_so_and_can_go_on(executed) -> None:
    cells, _ = executed
    kinds = [output.output_type for output in cells[3].outputs]
    assert kinds[-1] == "error"
    assert cells[3].outputs[-1].ename == "KeyboardInterrupt"
    (bar,) = [o for o in cells[3].outputs if o.output_type == "display_data"]
    assert re.search(r"stopped, at \d+%; the same call goes on from there$", bar.data["text/plain"])
    states = cells[4].outputs[0].data["text/plain"]
    assert states.count("'stopped'") == 1
    assert states.count("'done'") >= 2
