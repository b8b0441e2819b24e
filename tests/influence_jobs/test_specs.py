"""Specs with equal results have equal ids; specs with other results have other ids."""

import json

import pytest
from pydantic import TypeAdapter

from influence_jobs.errors import SpecError, StoreError
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.kinds.train.spec import FileCheckpoint, TrainedCheckpoint, TrainSpec
from influence_jobs.specs.base import TaskSpec, make_spec, parse_spec
from influence_jobs.specs.solvers import AnySolver

TASK = TaskSpec(name="mnist", options={"limit": None}, paths={"data_dir": "/here"}, data="MNIST")
TRAIN = make_spec(TrainSpec, task=TASK, epochs=5, save_epochs=(1, 5))
FIRST, LAST = (TrainedCheckpoint(train=TRAIN, epoch=epoch) for epoch in (1, 5))


def norms(**fields: object) -> GradNormsSpec:
    return make_spec(
        GradNormsSpec, **{"task": TASK, "checkpoints": (LAST,), "layers": ("fc1",), **fields}
    )


@pytest.mark.parametrize(
    "spec", [TRAIN, norms(), norms(checkpoints=(FileCheckpoint(path="a", sha256="b"),))]
)
def test_specs_survive_json(spec: TrainSpec | GradNormsSpec) -> None:
    again = parse_spec(spec.model_dump_json(), "test")
    assert again == spec
    assert again.run_id == spec.run_id


def test_where_inputs_lie_does_not_name_the_run_but_their_content_does() -> None:
    moved = TASK.model_copy(update={"paths": {"data_dir": "/there"}})
    assert make_spec(TrainSpec, task=moved, epochs=5, save_epochs=(1,)).run_id == TRAIN.run_id
    other = TASK.model_copy(update={"data": "other"})
    assert make_spec(TrainSpec, task=other, epochs=5, save_epochs=(1,)).run_id != TRAIN.run_id
    a, b, c = (
        norms(checkpoints=(FileCheckpoint(path=path, sha256=sha),)).run_id
        for path, sha in (("x.pt", "1"), ("y.pt", "1"), ("x.pt", "2"))
    )
    assert a == b != c


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 1},
        {"epochs": 6},
        {"batch_size": 16},
        {"optimizer": "adam"},
        {"lr": 0.1},
        {"momentum": 0.5},
        {"weight_decay": 0.1},
        {"save_epochs": (2,)},
        {"norm_layers": ("fc1",)},
        {"task": TASK.model_copy(update={"options": {"limit": 7}})},
    ],
)
def test_whatever_changes_a_training_names_another_run(fields: dict[str, object]) -> None:
    values = {"task": TASK, "epochs": 5, "save_epochs": (1, 5), **fields}
    assert make_spec(TrainSpec, **values).run_id != TRAIN.run_id


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 1},
        {"layers": ("fc2",)},
        {"layers": ("fc1", "fc2")},
        {"reduction": "layer"},
        {"precision": "bfloat16"},
        {"checkpoints": (FIRST,)},
        {"checkpoints": (FIRST, LAST)},
    ],
)
def test_whatever_changes_the_norms_names_another_run(fields: dict[str, object]) -> None:
    assert norms(**fields).run_id != norms().run_id


def test_two_ways_to_say_the_same_are_one_run() -> None:
    assert make_spec(TrainSpec, task=TASK, epochs=5, save_epochs=(5, 1, 1)).run_id == TRAIN.run_id
    adam = [
        make_spec(TrainSpec, task=TASK, optimizer="adam", momentum=m).run_id for m in (0.1, 0.9)
    ]
    assert adam[0] == adam[1]
    assert norms(checkpoints=(FIRST, LAST)).run_id == norms(checkpoints=(LAST, FIRST)).run_id
    kept = [norms(checkpoints=c, combine="keep").run_id for c in ((FIRST, LAST), (LAST, FIRST))]
    assert kept[0] != kept[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs: "),
        ({"seed": -1}, "seed: "),
        ({"lr": float("inf")}, "lr: "),
        ({"lr": float("nan")}, "lr: "),
        ({"optimizer": "lbfgs"}, "optimizer: "),
        ({"save_epochs": (9,)}, "epoch 9 cannot be saved: training ends after 5"),
        ({"norm_layers": ("fc1",), "norm_skip_epochs": 5}, "none would be recorded"),
        ({"colour": "red"}, "colour: "),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        make_spec(TrainSpec, **{"task": TASK, "epochs": 5, **fields})
    assert "\n" not in str(caught.value)


def test_damaged_specs_are_refused() -> None:
    text = json.loads(TRAIN.model_dump_json())
    for damaged in (
        "",
        "{}",
        json.dumps({**text, "kind": "other"}),
        json.dumps({**text, "lr": None}),
    ):
        with pytest.raises(StoreError, match=r"x/spec\.json is not a readable spec"):
            parse_spec(damaged, "x/spec.json")


@pytest.mark.parametrize("name", [[], {}, ["train"], {"a": 1}, 3, None])
def test_names_that_are_no_words_are_refused(name: object) -> None:
    """One such run hid all others from `infl runs`."""
    with pytest.raises(StoreError, match="x is not a readable spec: there is no kind of run"):
        parse_spec(json.dumps({**json.loads(TRAIN.model_dump_json()), "kind": name}), "x")
    with pytest.raises(ValueError, match="there is no solver"):
        TypeAdapter(AnySolver).validate_python({"name": name})
