"""Batches of dicts, dataclasses and texts are cut into samples, and gradients follow."""

from collections import OrderedDict, UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_jobs.errors import ModelError
from influence_jobs.gradients import GradDots, GradNorms, ParameterSpace
from influence_jobs.gradients.batches import flattened, map_tensors, one_sample
from influence_jobs.gradients.reference import gradients_one_by_one

SIZE = 4


class Attributes(dict[str, Any]):
    """As many a batch of a library: a dict whose items are attributes too."""

    __getattr__ = dict.__getitem__


class Encoding(UserDict[str, Any]):
    """A mapping that is no dict, as transformers' BatchEncoding."""


@dataclass(frozen=True)
class Rows:
    x: Tensor
    texts: list[str]


def parts() -> dict[str, Any]:
    return {"x": torch.arange(8.0).view(SIZE, 2), "texts": ["a", "bc", "d", "e"]}


@pytest.mark.parametrize("kind", [dict, OrderedDict, Attributes, Encoding])
def test_a_mapping_is_cut_and_keeps_its_type(kind: type[Any]) -> None:
    one = one_sample(kind(parts()), 1, SIZE)
    assert type(one) is kind
    assert one["x"].tolist() == [[2.0, 3.0]]
    assert one["texts"] == ["bc"]


def test_a_dataclass_is_cut() -> None:
    one = one_sample([Rows(**parts()), Rows(**parts())], 2, SIZE)
    assert [(rows.x.tolist(), rows.texts) for rows in one] == 2 * [([[4.0, 5.0]], ["d"])]


def test_what_has_another_length_is_shared() -> None:
    batch = {
        **parts(),
        "classes": ["cat", "dog"],
        "weights": torch.ones(3),
        "count": 4,
        "files": ("1.png", "2.png", "3.png", "4.png"),
        "tags": {"first": [{"t": "u"}, {"t": "v"}, {"t": "w"}, {"t": "x"}]},
    }
    one = one_sample(batch, 3, SIZE)
    assert (one["classes"], one["count"], one["weights"].tolist()) == (["cat", "dog"], 4, [1, 1, 1])
    assert (one["files"], one["tags"]) == (("4.png",), {"first": [{"t": "x"}]})


def test_tensors_inside_are_mapped() -> None:
    found = map_tensors(lambda t: t + 1, {"inner": Encoding(parts()), "rows": Rows(**parts())})
    assert found["inner"]["x"][0].tolist() == found["rows"].x[0].tolist() == [1.0, 2.0]
    assert found["rows"].texts == parts()["texts"]


class Counted(Mapping[str, Any]):
    def __init__(self, first: int, second: int) -> None:
        self._items = {"first": first, "second": second}

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Any:
        return iter(self._items)

    def __len__(self) -> int:
        return 2


def test_a_mapping_that_cannot_be_made_anew_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"is a Counted, which Counted\(dict\) cannot make again: ret"
    ):
        flattened([Counted(1, 2)])


class Reader(nn.Module):
    """Reads texts itself: a length of words, and a bias that no rule serves."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 3)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 3))
        self.head = nn.Linear(3, 2)

    def forward(self, texts: list[str]) -> Tensor:
        means = [self.embed(torch.tensor([*map(len, text.split())])).mean(0) for text in texts]
        return self.head(torch.stack(means) * self.scale)


def losses(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["texts"]), batch["labels"], reduction="none")


def test_gradients_of_a_model_that_reads_texts() -> None:
    torch.manual_seed(0)
    model = Reader().eval()
    texts = ["a bc", "def g hijk", "l", "mn opqrs t"]
    batch = Encoding(texts=texts, labels=torch.tensor([0, 1, 1, 0]))
    names = ["embed.weight", "scale", "head.weight"]
    exact = gradients_one_by_one(model, names, losses, batch)
    with GradNorms(model, names, losses, reduction="layer") as norms:
        found = norms(batch)
        norms.check(batch)
        assert norms(one_sample(batch, 0, SIZE))["scale"].shape == (1,)  # a last, smaller batch
    for name in names:
        torch.testing.assert_close(
            found[name].double(), exact[name].flatten(1).norm(dim=1), rtol=1e-5, atol=1e-7
        )
    space = ParameterSpace(model)
    vectors_QP = torch.randn(2, space.size, generator=torch.Generator().manual_seed(1))
    flat = gradients_one_by_one(model, list(space.shapes), losses, batch)
    flat_BP = torch.cat([flat[name].flatten(1) for name in space.shapes], 1)
    with GradDots(model, space, losses, vectors_QP) as dots:
        torch.testing.assert_close(
            dots.total(batch).double(), flat_BP @ vectors_QP.double().T, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("names", [["head"], ["scale"]])
def test_a_list_of_tensors_is_refused_by_name(names: list[str]) -> None:
    """It cannot be told from a tuple of inputs and targets."""

    class Ragged(Reader):
        def forward(self, texts: Any) -> Tensor:
            means = [self.embed(text).mean(0) for text in texts]
            return self.head(torch.stack(means) * self.scale)

    texts = [torch.arange(1 + i) for i in range(5)]
    batch = {"texts": texts, "labels": torch.tensor([0, 1, 1, 0, 1])}
    with (
        pytest.raises(ModelError, match="a tuple, list, dict or dataclass of tensors, each with"),
        GradNorms(Ragged().eval(), names, losses, reduction="layer") as norms,
    ):
        norms.check(batch)
