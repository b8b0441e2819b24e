"""`influence_jobs.submit` takes what the command takes, and gives the same runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import DigitsTask

import influence_jobs
from influence_jobs import InflError, Results
from influence_jobs.errors import SpecError
from influence_jobs.kinds import kinds
from influence_jobs.store.run import Run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "runs")


def submit(kind: str, runs: str, **options: Any) -> Results:
    return influence_jobs.submit(kind, runs=runs, quiet=True, device="cpu", **options)


@pytest.fixture
def trained(runs: str) -> Results:
    return submit("train", runs, task=DigitsTask(width=4), epochs=1, batch_size=64, lr=0.05)


def test_from_a_training_to_the_samples_of_a_query(runs: str, trained: Results) -> None:
    spec: Any = trained.spec
    assert spec.batch_size == 64
    assert trained.spec.task.options == {"width": 4}
    found = submit("influence", runs, checkpoint=trained, test=np.array([3, 7]), solver="identity")
    assert found.state == "done"
    asked: Any = found.spec
    assert asked.s_tests[0].checkpoint.train.run_id == trained.run.id
    assert found["scores"].shape == (2, 1500)
    # Against the gradients' dot product, one sample by hand.
    task = DigitsTask(width=4)
    model = task.model().eval()
    weights = Path(runs, trained.run.id, "checkpoints/epoch-0001.pt")
    model.load_state_dict(torch.load(weights, weights_only=True))
    images, labels = task.test_data().tensors
    mine = gradient(task, model, (images[7:8], labels[7:8]))
    sample = gradient(task, model, tuple(t[20:21] for t in task.train_data().tensors))
    assert float(found["scores"][1, 20]) == pytest.approx(float(mine @ sample), rel=1e-4)
    top = found.top_k(5, test=7, side="helpful")
    assert top.column("score").to_pylist() == sorted(found["scores"][1].values)[:-6:-1]


def gradient(task: DigitsTask, model: torch.nn.Module, batch: Any) -> torch.Tensor:
    found = torch.autograd.grad(task.losses(model, batch).sum(), list(model.parameters()))
    return torch.cat([part.flatten() for part in found])


@pytest.mark.parametrize("named", ["name", "class", "object"])
def test_a_task_may_be_named_or_given(runs: str, trained: Results, named: str) -> None:
    task = {"name": "digits:DigitsTask", "class": DigitsTask, "object": DigitsTask(width=4)}[named]
    options = {} if named == "object" else {"width": 4}
    again = submit("train", runs, task=task, epochs=1, batch_size=64, lr=0.05, **options)
    assert again.run.id == trained.run.id


def test_it_asks_for_the_same_run_as_the_command(runs: str, trained: Results, capfd: Any) -> None:
    from infl_cli.main import main

    words = ["grad-norms", "--layer", "conv2", "--layer", "head", "--reduce", "layer", "--local"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv", ["infl", "submit", *words, "--checkpoint", trained.run.id, "--json"]
        )
        with pytest.raises(SystemExit) as left:
            main()
    assert left.value.code == 0
    run_id = json.loads(capfd.readouterr().out.splitlines()[-1])["run"]
    asked = {"layer": ["conv2", "head"], "reduce": "layer", "checkpoint": trained}
    assert submit("grad-norms", runs, **asked).run.id == run_id


def test_an_error_names_the_argument(runs: str, trained: Results) -> None:
    with pytest.raises(
        SpecError, match=r"^name at least one layer: layer=11, layer=main.29, or layer=all$"
    ) as told:
        submit("grad-norms", runs, checkpoint=trained)
    assert "--" not in str(told.value)
    with pytest.raises(SpecError, match=r"no option layr= here.*did you mean layer=") as told:
        submit("grad-norms", runs, checkpoint=trained, layr=1, layer=1)
    with pytest.raises(SpecError, match=r"^workers=: input should be greater"):
        submit("grad-norms", runs, checkpoint=trained, layer=1, workers=0)
    with pytest.raises(SpecError, match=r"^there is no kind of run 'norms'; there are ablation"):
        submit("norms", runs)
    with pytest.raises(SpecError, match=r"^s-test at 2 checkpoints makes 2 runs"):
        both = submit("train", runs, task=DigitsTask, epochs=2, save_epoch=1, lr=0.05)
        submit("s-test", runs, checkpoint=f"{both.run.id}@all", test=1)
    any_kind: Any = ["train"]
    with pytest.raises(SpecError, match=r"^there is no kind of run \['train'\]"):
        submit(any_kind, runs)
    with pytest.raises(SpecError, match=r"^workers= is for Ray's workers, .*leave out workers="):
        submit("grad-norms", runs, checkpoint=trained, layer=1, workers=2)
    with pytest.raises(SpecError, match=r"^batch_size= has no meaning for lds"):
        submit("lds", runs, checkpoint=trained, batch_size=3)


def test_the_options_that_a_message_is_about_are_data() -> None:
    error = InflError("--keep-layers needs --layer: leave --keep-layers out (re-run)")
    assert error.options == ("keep_layers", "layer", "keep_layers")
    assert str(error.for_python()) == "keep_layers= needs layer=: leave keep_layers= out (re-run)"
    valued = InflError("--k 5000: --s-test RUN says what; --quantity is what --layer all")
    said = "k=5000: s_test=RUN says what; quantity= is what layer=all"
    assert str(valued.for_python()) == said


def test_a_task_of_this_process_cannot_travel(runs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's workers would look for it in a `__main__` of their own."""
    import __main__

    kind = type("Here", (DigitsTask,), {"__module__": "__main__"})
    monkeypatch.setattr(__main__, "Here", kind, raising=False)
    done = submit("train", runs, task=kind, epochs=1, lr=0.05)
    assert done.spec.task.name == "__main__:Here"
    with pytest.raises(SpecError, match=r"defined in this process"):
        submit("grad-norms", runs, checkpoint=done, layer="head", ray=True)


def test_every_option_of_how_to_run_is_an_argument() -> None:
    import inspect

    from infl_cluster.how import How

    taken = set(inspect.signature(influence_jobs.submit).parameters)
    assert {*How.model_fields} - {"local"} <= taken
    assert not taken & {
        name for kind in kinds().values() for name in kind.request_type.model_fields
    } - {"batch_size"}


def test_a_run_that_is_done_is_found_again(runs: str, trained: Results) -> None:
    before = Run.open(runs, trained.run.id).digest()
    again = submit("train", runs, task=DigitsTask(width=4), epochs=1, batch_size=64, lr=0.05)
    assert again.run.digest() == before
    options: Any = {"epochs": 1, "batch_size": 64, "lr": 0.05, "quiet": True, "device": "cpu"}
    by_path = influence_jobs.submit("train", runs=Path(runs), task=DigitsTask(width=4), **options)
    assert by_path.run.id == trained.run.id


@pytest.mark.slow
def test_the_notebook_of_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, influence, top five, figure: in ten lines."""
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2].joinpath("docs", "python.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 10
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102
    assert names["best"].column("test").to_pylist() == [3] * 5
    assert names["best"].column("score").to_pylist() == sorted(names["scores"].values)[:-6:-1]
    assert Path("helpful.png").stat().st_size > 10_000
    assert names["figure"].get_axes()
