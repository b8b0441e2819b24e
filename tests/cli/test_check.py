"""`infl init` and `infl check`, as a user begins."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from influence_jobs.contract import jobs

Infl = Callable[..., Any]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PROBE_S", 0.0)
    monkeypatch.delitem(sys.modules, "begun_here", raising=False)


def test_a_new_task_works_as_it_stands(infl: Infl, tmp_path: Path) -> None:
    begun = infl("init", "begun_here.py")
    assert (begun.code, begun.out) == (
        0,
        "begun_here.py is written; next: infl check begun_here.py:MyTask\n",
    )
    text = (tmp_path / "begun_here.py").read_text()
    assert len(text.splitlines()) < 60
    assert "template" not in text
    checked = infl("check", "begun_here.py:MyTask", "--width", 4, "--json")
    assert checked.code == 0, checked.out
    assert {finding["mark"] for finding in checked.json["findings"]} == {"ok"}
    said = infl("check", "begun_here.py:MyTask", "--width", 4).out.splitlines()[-1]
    assert said == (
        "next: infl submit influence --task begun_here.py:MyTask --width 4 --test 0 --local"
    )
    assert "\nok    parameters: 690 numbers in 4 parameters are trained\n" in checked.out
    words = ("--task", "begun_here.py:MyTask", "--width", 2, "--epochs", 1, "--local")
    found = infl("submit", "influence", *words, "--test", 0, "--solver", "ek-fac")
    assert found.code == 0, found.err
    assert not (tmp_path / "runs" / "nothing").exists()


def test_init_never_overwrites(infl: Infl, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 1\n")
    refused = infl("init", "mine.py")
    assert (refused.code, refused.err) == (
        2,
        "error: mine.py is there already: choose another name\n",
    )
    assert (tmp_path / "mine.py").read_text() == "x = 1\n"
    assert "there is no folder nowhere: make it first" in infl("init", "nowhere/mine.py").err
    for name in ("mine", "my-task.py", "2.py"):
        assert "cannot be imported: name it like my_task.py" in infl("init", name).err


WRONG = {
    "averaged": (
        ', reduction="none"',
        "",
        "has shape (), and one number for each sample is needed",
    ),
    "divided": ("return F.", "return 1 / len(batch[1]) * F.", "divides by"),
    "a column of targets": ("return batch[1]", "return batch[1][:, None]", "give each sample its"),
    "targets of floats": ("return batch[1]", "return batch[1].float()", "use .long()"),
}


@pytest.mark.parametrize(("before", "after", "cause"), WRONG.values(), ids=WRONG)
def test_submit_says_what_check_says(
    infl: Infl, tmp_path: Path, before: str, after: str, cause: str
) -> None:
    infl("init", "begun_here.py")
    file = tmp_path / "begun_here.py"
    text = file.read_text().replace("self.targets(batch), red", "batch[1], red")
    assert before in text
    file.write_text(text.replace(before, after))
    (failed,) = [
        line.partition(": ")[2]
        for line in infl("check", "begun_here.py:MyTask").out.splitlines()
        if line.startswith("fail")
    ]
    assert cause in failed
    submit = ("submit", "influence", "--task", "begun_here.py:MyTask", "--test", 0, "--local")
    refused = infl(*submit)
    assert refused.code == 2
    assert "--operator hessian" not in refused.err

    def words(said: str) -> str:  # other samples are looked at
        return re.sub(r", shape \(\d+,\)|\d+", "", said)

    assert words(refused.err.strip()) == f"error: {words(failed)}"
    assert not (tmp_path / "runs").exists()  # nothing was trained first


def test_what_fails_leaves_with_2(infl: Infl, tmp_path: Path) -> None:
    infl("init", "begun_here.py")
    file = tmp_path / "begun_here.py"
    file.write_text(file.read_text().replace(', reduction="none"', ""))
    checked = infl("check", "begun_here.py:MyTask", "--json")
    assert checked.code == 2
    assert checked.json["failed"] == ["losses"]
    assert (
        "\nfail  losses: losses() has shape (), and one number for each sample is needed, shape "
        "(15,): leave the mean over the batch out (reduction='none')\n"
    ) in checked.out
    assert checked.err == ""
    assert (
        "there is no option --wdth here" in infl("check", "begun_here.py:MyTask", "--wdth", 3).err
    )


@pytest.mark.parametrize(("hook", "named"), [("targets", "targets()"), ("outputs", "outputs()")])
def test_a_loss_of_outputs_that_are_not_there_is_refused_before_anything_is_computed(
    infl: Infl, tmp_path: Path, hook: str, named: str
) -> None:
    infl("init", "begun_here.py")
    file = tmp_path / "begun_here.py"
    text = file.read_text().replace("self.outputs(model, batch)", "model(batch[0])")
    text = text.replace("self.targets(batch)", "batch[1]")
    file.write_text(text.replace(f"def {hook}(", f"def other_{hook}("))
    said = f"MyTask sets output_loss, but defines no {named}: define what is missing, or leave "
    task = ("--task", "begun_here.py:MyTask", "--epochs", 1, "--local")
    for words in (("self-influence",), ("influence", "--test", 0), ("train",)):
        refused = infl("submit", *words, *task)
        assert (refused.code, refused.err) == (2, f"error: {said}output_loss out\n"), words
    assert not (tmp_path / "runs").exists()
    checked = infl("check", "begun_here.py:MyTask")
    assert f"\nfail  gauss-newton: {said}" in checked.out
    assert checked.out.count(said) == 3  # and of a training, and of the kinds of runs together
    assert "\nwarn  time: refused: train, grad-norms --layer all, " in checked.out


def test_a_loss_that_names_no_form_goes_the_ways_that_need_none(infl: Infl, tmp_path: Path) -> None:
    infl("init", "begun_here.py")
    file = tmp_path / "begun_here.py"
    text = file.read_text().replace('output_loss = "cross-entropy"', "output_loss = None")
    text = text.replace("self.outputs(model, batch)", "model(batch[0])")
    text = text.replace("self.targets(batch)", "batch[1]")
    for hook in ("outputs", "targets"):
        text = text.replace(f"def {hook}(", f"def other_{hook}(")
    file.write_text(text)
    task = ("--task", "begun_here.py:MyTask", "--epochs", 1, "--local", "--test", 0)
    few = ("--curvature-samples", 100)
    for solver in (("cg",), ("lissa", "--depth", 10)):
        found = infl(
            "submit", "influence", *task, *few, "--operator", "hessian", "--solver", *solver
        )
        assert found.code == 0, found.err
