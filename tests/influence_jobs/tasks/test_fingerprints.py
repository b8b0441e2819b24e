"""What changes a fingerprint, and how it is reported: data, code, or nothing."""

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from influence_jobs.errors import DataError, SpecError
from influence_jobs.specs.base import TaskSpec
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.fingerprints import (
    changed,
    code_alone,
    code_of,
    fingerprinted,
    require_unchanged,
)
from influence_jobs.tasks.mnist import MnistTask

TASK = """
import torch
from torch.utils.data import TensorDataset
from influence_jobs import Task
from own_parts import network


class Own(Task):
    def model(self):
        return network.make()

    def train_data(self):
        return TensorDataset(torch.arange(40.0)[:, None], torch.zeros(40))

    def losses(self, model, batch):
        return (model(batch[0])[:, 0] - batch[1]).square()
"""
NETWORK = """
from torch import nn


def make():
    return nn.Linear(1, 1)
"""

Write = Callable[..., Task]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes the two files of a user, and returns the task as a new process would load it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # an edit within a second counts
    names = ("own_task", "own_parts", "own_parts.network")

    def forget() -> None:
        for name in names:
            sys.modules.pop(name, None)

    def written(task: str = TASK, network: str = NETWORK) -> Task:
        (tmp_path / "own_parts").mkdir(exist_ok=True)
        (tmp_path / "own_parts" / "__init__.py").write_text("")
        (tmp_path / "own_parts" / "network.py").write_text(network)
        (tmp_path / "own_task.py").write_text(task)
        forget()
        importlib.invalidate_caches()
        found: Task = importlib.import_module("own_task").Own()
        return found

    yield written
    forget()


def spec_of(task: Task) -> TaskSpec:
    data, code = fingerprinted("own_task:Own", task)
    return TaskSpec(name="own_task:Own", data=data, code=code)


def test_words_about_code_are_no_code(write: Write) -> None:
    spec = spec_of(write())
    assert changed(spec, write()) == ""
    commented = TASK.replace("class Own(Task):", '# A note.\n\n\nclass Own(Task):\n    """Mine."""')
    assert changed(spec, write(commented.replace("make()", "make()  # theirs"))) == ""


@pytest.mark.parametrize(
    ("task", "network"),
    [
        (TASK.replace(".square()", ".abs()"), NETWORK),
        (TASK, NETWORK.replace("Linear(1, 1)", "Linear(1, 1, bias=False)")),
    ],
)
def test_code_that_changed_is_told_as_code(write: Write, task: str, network: str) -> None:
    """Also if the code is in another file that the task imports."""
    spec = spec_of(write())
    other = write(task, network)
    assert changed(spec, other) == "code"
    with pytest.raises(
        SpecError, match=r"^run x: the code of task own_task:Own changed since it was"
    ):
        require_unchanged("x", spec, other)


def test_data_that_changed_are_told_as_data(write: Write) -> None:
    """Also if the number of rows is the same, as in a file with other values."""
    spec = spec_of(write())
    task = write()
    task.train_data = lambda: TensorDataset(torch.arange(40.0)[:, None] + 1, torch.zeros(40))
    assert changed(spec, task) == "data"
    with pytest.raises(SpecError, match=r"^run x: the training data of own_task:Own are not those"):
        require_unchanged("x", spec, task)


def test_the_first_form_is_still_understood(write: Write, tmp_path: Path) -> None:
    """It hashed the bytes of the task's file, and no rows."""
    task = write()
    digest = hashlib.sha256((tmp_path / "own_task.py").read_bytes()).hexdigest()[:16]
    first = TaskSpec(name="own_task:Own", data=f"40 samples, code {digest}")
    assert changed(first, task) == ""
    assert fingerprinted("own_task:Own", task, like=first) == (first.data, "")
    assert changed(first, write(TASK + "\n# a note\n")) == "code"
    more = first.model_copy(update={"data": first.data.replace("40", "41")})
    assert changed(more, write()) == "data"


def test_data_that_are_others_each_time_are_refused() -> None:
    class Augmented(MnistTask):
        def __init__(self) -> None:
            pass

        def train_data(self) -> torch.Tensor:
            return torch.zeros(5)

        def batch(self, ids: torch.Tensor, draw: Draw) -> torch.Tensor:
            return torch.rand(len(ids))

    with pytest.raises(DataError, match="Augmented gives different numbers each time"):
        Task.fingerprint(Augmented())


def test_tasks_of_this_package_have_no_code_of_the_users() -> None:
    assert code_of(MnistTask) == ""


def test_code_alone_keeps_the_rest_to_the_letter() -> None:
    text = '''"""Of the module."""

x = "# no comment"  # one
y = """a text that is no docstring"""


def f(a):
    """Of the function,

    in several lines.
    """
    return {"é": a}  # é


class C:
    "Short."
'''
    assert code_alone(text).splitlines() == [
        'x = "# no comment"',
        'y = """a text that is no docstring"""',
        "def f(a):",
        '    return {"é": a}',
        "class C:",
    ]


def test_code_alone_counts_lines_as_python_does() -> None:
    assert code_alone("\x0c\nlr = 1.5\n# one\ns = 'a\u2028b'\n# two\n").split("\n")[-2:] == [
        "lr = 1.5",
        "s = 'a\u2028b'",
    ]


def test_a_module_that_is_imported_late_counts(write: Write) -> None:
    lazy = TASK.replace("from own_parts import network\n", "").replace(
        "        return network.make()",
        "        import own_parts.network as n\n\n        return n.make()",
    )
    spec = spec_of(write(lazy))
    assert "own_parts.network" not in sys.modules
    assert (
        changed(spec, write(lazy, NETWORK.replace("Linear(1, 1)", "Linear(1, 1, False)"))) == "code"
    )


def test_files_that_changed_after_their_import_are_refused(write: Write, tmp_path: Path) -> None:
    task = write()
    spec = spec_of(task)
    (tmp_path / "own_parts" / "network.py").write_text(NETWORK.replace("(1, 1)", "(1, 1, False)"))
    with pytest.raises(SpecError, match=r"changed after Python imported it .* restart Python"):
        changed(spec, task)


def test_a_file_of_another_encoding_is_read(write: Write, tmp_path: Path) -> None:
    task = write()
    (tmp_path / "own_task.py").write_bytes(b"\xef\xbb\xbf" + TASK.encode())  # with a mark
    assert code_of(type(task)) == code_of(type(write()))


NOTEBOOK = """
from influence_jobs import Task
SCALE = 2.0
class Net:
    depth = 3
    def forward(self, x):
        return SCALE * x
class Own(Task):
    weight = "mean"
    def model(self):
        return Net()
    def losses(self, model, batch):
        return [1.5 * part for part in batch]
"""


def test_all_that_a_task_of_a_notebook_uses_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def code(text: str) -> str:
        module: Any = ModuleType("__main__")  # has no file
        monkeypatch.setitem(sys.modules, "__main__", module)
        exec(text, vars(module))  # noqa: S102
        return code_of(module.Own)

    found = code(NOTEBOOK)
    assert code("\n\n" + NOTEBOOK.replace("SCALE = 2.0", "SCALE = 2.0  # twice")) == found
    for old, new in (
        ("SCALE = 2.0", "SCALE = 3.0"),
        ("depth = 3", "depth = 4"),
        ("SCALE * x", "SCALE + x"),
        ('"mean"', '"sum"'),
        ("1.5 *", "2.5 *"),
    ):
        assert code(NOTEBOOK.replace(old, new)) != found, old


def test_what_is_imported_from_a_module_is_no_module(write: Write, tmp_path: Path) -> None:
    """A file that happens to have the name of a function does not count."""
    lazy = TASK.replace("from own_parts import network\n", "").replace(
        "        return network.make()",
        "        from own_parts.network import make\n\n        return make()",
    )
    spec = spec_of(write(lazy))
    (tmp_path / "make.py").write_text("x = 1")
    assert changed(spec, write(lazy)) == ""
