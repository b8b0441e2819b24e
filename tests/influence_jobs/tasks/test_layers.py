"""What words for layers mean: numbers, names, patterns and `all`, for norms and for influence."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import TensorDataset

from influence_jobs.errors import ModelError, SpecError
from influence_jobs.gradients import ParameterSpace
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.layers import (
    by_type,
    layers_of_run,
    left_out,
    resolve_layers,
    resolve_weights,
    say_slow_layers,
    trained_modules,
    weight_layers,
)


class Net(nn.Module):
    """Registered in another order than called; with a token, tied weights and frozen parts."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(4))
        self.out = nn.Linear(4, 9, bias=False)
        self.embed = nn.Embedding(9, 4)
        self.out.weight = self.embed.weight
        self.rnn = nn.GRU(4, 4, batch_first=True)
        self.first = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.normed = weight_norm(nn.Linear(4, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.fitted = nn.Linear(4, 4)  # its bias alone is trained
        self.fitted.weight.requires_grad_(False)
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.first(self.embed(ids))) + self.token
        x = self.rnn(x)[0].mean(1)
        return self.out(self.blocks(self.fitted(self.frozen(self.normed(x)))))


class Tokens(Task):
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return Net()

    def train_data(self) -> TensorDataset:
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(9, (6, 3), generator=g)
        return TensorDataset(ids, ids[:, 0])

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


NUMBERED = ["first", "normed", "frozen", "fitted", "blocks.0", "blocks.2", "out"]
GRU = ("rnn.weight_ih_l0", "rnn.weight_hh_l0")
NORMED = tuple(f"normed.parametrizations.weight.original{i}" for i in "01")


@pytest.fixture
def said() -> list[str]:
    return []


def test_numbers_follow_the_data() -> None:
    task = Tokens()
    assert weight_layers(task, task.model()) == NUMBERED


@pytest.mark.parametrize(
    ("words", "weights", "modules"),
    [
        ([1], ("first",), ("first",)),
        (["7", "blocks.2"], ("blocks.2", "out"), ("blocks.2", "out")),
        (["rnn"], GRU, ("rnn",)),
        (["rnn.weight_hh_l0"], GRU[1:], GRU[1:]),
        (["token"], ("token",), ("token",)),
        (["first.weight"], ("first",), ("first.weight",)),
        (["first.bias"], ("first.bias",), ("first.bias",)),
        (["normed"], NORMED, ("normed", "normed.parametrizations.weight")),
        (["module:blocks.0", "norm"], ("blocks.0", "norm"), ("blocks.0", "norm")),
        (["blocks.*"], ("blocks.0", "blocks.2"), ("blocks.0", "blocks.2")),
        (["*weight_?h*"], GRU, GRU),
        (["embed", "out"], ("out",), ("out",)),
        (["embed"], ("embed",), ("embed",)),
        (["out.weight"], ("out",), ("out.weight",)),
    ],
    ids=str,
)
def test_words(
    words: list[str | int], weights: tuple[str, ...], modules: tuple[str, ...], said: list[str]
) -> None:
    task = Tokens()
    assert resolve_weights(words, task, said.append) == weights
    found = resolve_layers(words, task, said.append)
    assert found == modules
    space = ParameterSpace(task.model(), found)
    assert list(space.groups) == list(found)
    assert all(space.groups.values())  # each counts for something


class Bare(Tokens):
    def model(self) -> nn.Module:
        return nn.Linear(3, 2)

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0].float()), batch[1] % 2, reduction="none")


def test_a_model_that_is_one_layer_has_a_name(said: list[str]) -> None:
    assert resolve_layers(["all"], Bare(), said.append) == ("",)
    assert said == ["--layer all: 1 of 1 numbered layers: the model itself"]
    with pytest.raises(SpecError, match=r"the layers are 1 \(the model itself\)"):
        resolve_layers([2], Bare(), said.append)


def test_all_says_what_it_takes_and_what_it_leaves_out(said: list[str]) -> None:
    task = Tokens()
    assert resolve_weights(["all"], task, said.append) == (
        "first",
        "blocks.0",
        "blocks.2",
        "out",
        *NORMED,
    )
    assert said[0] == (
        "--layer all: 5 of 7 numbered layers: first, normed, blocks.0, blocks.2 and 1 more; "
        "these have no number and must be named: Net the model itself; GRU rnn; LayerNorm norm; "
        "frozen: frozen, fitted"
    )
    assert resolve_layers(["all"], task, said.append) == (
        "first",
        "normed",
        "fitted",
        "blocks.0",
        "blocks.2",
        "out",
        "normed.parametrizations.weight",
    )
    assert said[1].endswith("; frozen: frozen")  # of `fitted` the bias counts


def test_the_default_is_all_that_is_trained() -> None:
    model = Net()
    found = trained_modules(model)
    assert "frozen" not in found
    assert "embed" not in found  # it is `out`, which is registered first
    space, whole = ParameterSpace(model, found), ParameterSpace(model)
    assert space.shapes == whole.shapes
    assert [*whole.shapes] == [n for n, p in model.named_parameters() if p.requires_grad]
    assert space.groups["fitted"] == ["fitted.bias"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("fitted", "layer 'fitted' is frozen (requires_grad=False)"),
        ("frozen.bias", "layer 'frozen.bias' is frozen"),
        ("froz*", "layer 'froz*' is frozen"),
        ("blocks", "layer 'blocks' (Sequential) has no weight of its own: name what is inside"),
        ("blocks.1", "layer 'blocks.1' (Tanh) has no weight of its own: leave it out"),
        ("8", "layer 8 does not exist: the layers are 1 (first), 2 (normed), "),
        ("x*", "layer 'x*' does not exist"),
        ("module:9", "layer 'module:9' does not exist"),
        ("", "layer '' does not exist"),
    ],
)
def test_refusals_for_norms(word: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        resolve_weights([word], Tokens(), print)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("frozen", "layer 'frozen' is frozen (requires_grad=False)"),
        ("fitted.weight", "layer 'fitted.weight' is frozen"),
        ("blocks", "layer 'blocks' (Sequential) has no parameters of its own: name what is inside"),
    ],
)
def test_refusals_for_influence(word: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        resolve_layers([word], Tokens(), print)
    assert str(caught.value).startswith(message)


class Digits(Tokens):
    """Modules that are named by digits, as those of every Sequential."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 9))


def test_digits_are_numbers_and_names_are_told(said: list[str]) -> None:
    assert resolve_weights(["2"], Digits(), said.append) == ("3",)
    assert said == ["layer 2 is 3; the module named 2 would be module:2"]
    assert resolve_weights(["module:2"], Digits(), said.append) == ("2",)
    assert resolve_weights(["1"], Digits(), said.append) == ("2",)
    with pytest.raises(
        SpecError, match=r"layer 3 does not exist: .*; the module named 3 is module:3"
    ):
        resolve_weights(["3"], Digits(), said.append)


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("1", ["first"]),
        ("7", ["out"]),
        ("embed", ["out"]),
        ("all", ["first", *GRU, "out"]),
        ("rnn", [*GRU]),
        ("rnn.weight_ih_l0", [GRU[0]]),
        ("*_hh_*", [GRU[1]]),
        ("first.weight", ["first"]),
        ("module:out", ["out"]),
        ("norm", []),
        ("9", []),
        ("nothing", []),
    ],
)
def test_words_for_the_layers_of_a_run(word: str, found: list[str]) -> None:
    assert layers_of_run(word, ["first", *GRU, "out"], Tokens()) == found


def test_slow_layers_are_told(said: list[str]) -> None:
    say_slow_layers(["first", "out", *GRU], Tokens(), said.append)
    (layer,) = said
    assert layer.endswith(
        ": rnn.weight_ih_l0 (no rule for weight_ih_l0 of GRU); "
        "rnn.weight_hh_l0 (no rule for weight_hh_l0 of GRU)"
    )
    say_slow_layers(["first", "out", "blocks.0"], Tokens(), said.append)  # `out` is shared
    assert len(said) == 1


def test_a_frozen_model_has_nothing_to_count() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
    with pytest.raises(ModelError, match="Sequential has no trained parameters"):
        ParameterSpace(model)
    with pytest.raises(ModelError, match=r"'0' is frozen \(requires_grad=False\)"):
        ParameterSpace(model, ["0"])


def test_what_some_modules_leave_out() -> None:
    model = Net()
    others = left_out(model, ["first", "embed"])
    # `out` has the weight of `embed`; `frozen` and `normed` have no trained parameters of their own
    normed = "normed.parametrizations.weight"
    assert others == ["", "rnn", "norm", "normed", normed, "fitted", "blocks.0", "blocks.2"]
    assert by_type(model, others) == (
        "Net the model itself; GRU rnn; LayerNorm norm; ParametrizedLinear normed; "
        f"ParametrizationList {normed}; Linear fitted, blocks.0, blocks.2"
    )
    assert left_out(model, [*others, "first", "embed"]) == []


class Doubled(nn.Module):
    """Built in float64, to which its forward turns what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4).double()
        self.out = weight_norm(nn.Linear(4, 2).double())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.first(x.double())))
        return out


def test_slow_layers_of_a_model_in_float64_are_told() -> None:
    class Points(Tokens):
        def model(self) -> nn.Module:
            return Doubled()

        def train_data(self) -> TensorDataset:
            return TensorDataset(torch.ones(4, 3), torch.arange(4) % 2)

    said: list[str] = []
    say_slow_layers(["first", "out.parametrizations.weight.original1"], Points(), said.append)
    assert "no rule for original1" in "".join(said)
