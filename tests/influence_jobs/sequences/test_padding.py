"""Padding counts for nothing: another length or id of it, or another side, changes no number."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from influence_jobs.curvature import ConjugateGradient, EkFac, GaussNewton
from influence_jobs.gradients import (
    GradDots,
    GradNorms,
    GradProjections,
    GradQuadratics,
    ParameterSpace,
    TokenDots,
    TokenNorms,
)
from influence_jobs.gradients.projections import projections
from influence_jobs.tasks.base import Batch, Draw, Task
from influence_jobs.tasks.sequences import TokenLosses

WORDS, LONGEST, N = 7, 5, 4
IGNORED = -100


class Padded(Task):
    """Words from 3 on, padded by a word to a length, or to the longest of a batch."""

    output_loss = "cross-entropy"
    batch_size = 3

    def __init__(self, *, to: int = 0, pad: int = 0, front: bool = False) -> None:
        self.to, self.pad, self.front = to, pad, front
        generator = torch.Generator().manual_seed(0)
        lengths = [4, 3, LONGEST, 3]
        self.rows = [torch.randint(3, WORDS, (n,), generator=generator) for n in lengths]

    def train_data(self) -> list[Tensor]:
        return self.rows

    def test_data(self) -> list[Tensor]:
        return self.rows

    def collate(self, rows: list[Tensor]) -> Batch:
        longest = max(self.to, *map(len, rows))

        def padded(value: int, parts: list[Tensor]) -> Tensor:
            sides = [(longest - len(part), 0)[:: 1 if self.front else -1] for part in parts]
            return torch.stack(
                [F.pad(part, side, value=value) for part, side in zip(parts, sides, strict=True)]
            )

        return {
            "ids": padded(self.pad, rows),
            "mask": padded(0, [torch.ones_like(row) for row in rows]),
            "following": padded(IGNORED, [F.pad(row[1:], (0, 1), value=IGNORED) for row in rows]),
            "lengths": torch.tensor([len(row) for row in rows]),
            "labels": torch.stack([row.sum() % 2 for row in rows]),
        }

    def targets(self, batch: Batch) -> Tensor:
        found: Tensor = batch["labels"]
        return found

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), self.targets(batch), reduction="none")


class Language(Padded):
    """GPT-2 with tied embeddings; the loss of a sample is the mean over its tokens."""

    def model(self) -> nn.Module:
        torch.manual_seed(1)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=4, n_layer=1, n_head=2)
        )

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        mask = batch["mask"]
        places = (mask.cumsum(1) - 1).clamp(min=0)
        found: Tensor = model(
            input_ids=batch["ids"], attention_mask=mask, position_ids=places, use_cache=False
        ).logits
        return found

    def targets(self, batch: Batch) -> Tensor:
        found: Tensor = batch["following"]
        return found

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, following = self.outputs(model, batch), batch["following"]
        losses_BT = F.cross_entropy(logits.mT, following, reduction="none")
        return losses_BT.sum(1) / (following != IGNORED).sum(1)


class Summed(Language):
    """The loss is the sum over tokens, and the classes are the second axis."""

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().outputs(model, batch).mT

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = self.outputs(model, batch)
        return F.cross_entropy(logits, batch["following"], reduction="none").sum(1)


class Classifier(Padded):
    """BERT: every word sees all others, but no padding."""

    def model(self) -> nn.Module:
        torch.manual_seed(1)
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=WORDS,
                hidden_size=4,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=8,
                max_position_embeddings=16,
            )
        )

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = model(input_ids=batch["ids"], attention_mask=batch["mask"]).logits
        return found


class Reader(nn.Module):
    """An LSTM to the last word of each sample, found by its length or by packing."""

    def __init__(self, *, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.words, self.inner = nn.Embedding(WORDS, 5), nn.Linear(5, 5)
        self.rnn, self.head = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = torch.tanh(self.inner(self.words(ids)))
        if self.packed:
            inputs = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            last = self.rnn(inputs)[1][0][0]
        else:
            last = self.rnn(x)[0][torch.arange(len(ids)), lengths - 1]
        found: Tensor = self.head(last)
        return found


class Recurrent(Padded):
    packed = False

    def model(self) -> nn.Module:
        torch.manual_seed(1)
        return Reader(packed=self.packed)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = model(batch["ids"], batch["lengths"])
        return found


class Packed(Recurrent):
    packed = True


def numbers(task: Task) -> dict[str, Tensor]:
    """All that is computed of the training samples, in float64."""
    model = task.model().double().eval()
    space, ids, draw = ParameterSpace(model), torch.arange(N), Draw(0)
    layers = [
        name
        for name, m in model.named_modules()
        if isinstance(vars(m)["_parameters"].get("weight"), Tensor)
    ]
    vectors_QP = torch.randn(
        2, space.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    found: dict[str, Tensor] = {}

    def keep(what: str, results: Mapping[str, Tensor]) -> None:
        found.update({f"{what} of {name}": value for name, value in results.items()})

    def in_batches(engine: Any) -> dict[str, Tensor]:
        parts = [engine(task.batch(piece, draw)) for piece in ids.split(task.batch_size)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    for reduction in ("layer", "channel"):
        with GradNorms(
            model, layers, task.losses, reduction=reduction, precision="float64"
        ) as norms:  # type: ignore[arg-type]
            keep(f"{reduction} norms", in_batches(norms))
    with GradDots(model, space, task.losses, vectors_QP, precision="float64") as dots:
        keep("dots", in_batches(dots))
    random = projections(
        model, space, outputs=3, inputs=3, distribution="gaussian", seed=0, whole=False
    )
    with GradProjections(model, space, task.losses, random, precision="float64") as projected:
        keep("projections", in_batches(projected))

    operator = GaussNewton(model, space, task, ids, batch_size=task.batch_size)
    found["Gauss-Newton product"] = operator @ vectors_QP
    solved = ConjugateGradient(0.1, tolerance=1e-12).solve(operator, vectors_QP)
    found["s_test by cg"] = solved.x_QP
    for targets in ("sampled", "exact"):
        ek_fac = EkFac(0.1, targets=targets)  # type: ignore[arg-type]
        found[f"s_test by EK-FAC, {targets}"] = ek_fac.solve(operator, vectors_QP).x_QP
    linear = [n for n in layers if type(model.get_submodule(n)).__name__ in ("Linear", "Conv1D")]
    linear = [n for n in linear if n != "lm_head"]
    part = GaussNewton(model, ParameterSpace(model, linear), task, ids)
    metrics = EkFac(0.1, targets="sampled").metrics(part, power=2)
    with GradQuadratics(model, {**metrics}, task.losses, precision="float64") as quadratics:
        keep("EK-FAC sizes", in_batches(quadratics))
    if task.targets(task.batch(ids, draw)).ndim == 2:
        keep("tokens", of_tokens(task, model, space, layers, vectors_QP))
    return found


def of_tokens(
    task: Task, model: nn.Module, space: ParameterSpace, layers: list[str], vectors_QP: Tensor
) -> dict[str, Tensor]:
    batch, parts = task.batch(torch.arange(N), Draw(0)), TokenLosses(task)
    counts_B = parts.look(model, batch)
    with GradDots(model, space, task.losses, vectors_QP, precision="float64") as dots:
        products_BTQ = TokenDots(model, space, parts, vectors_QP)(batch, dots.total(batch))
    found = {"dots": products_BTQ[:, : int(counts_B.max())]}
    norms = TokenNorms(model, layers, parts, precision="float64")
    found |= norms(batch, int(counts_B.max()))
    norms.close()
    return found | {"counts": counts_B}


@cache
def plain(task: type[Padded]) -> dict[str, Tensor]:
    return numbers(task())


OTHERS: dict[str, Any] = {
    "longer": {"to": LONGEST + 2},
    "longer, another id": {"to": LONGEST + 1, "pad": 2},
    "a word as padding": {"pad": 5},
}
TASKS = [Language, Summed, Classifier, Recurrent, Packed]
SLOW = pytest.mark.slow
# "longer" is one difference alone, of the two of "longer, another id".
CASES: list[Any] = [pytest.param(Language, "longer", marks=SLOW), (Language, "a word as padding")]
CASES += [(task, "longer, another id") for task in TASKS]


@pytest.mark.parametrize("task,how", CASES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_other_padding_gives_the_same_numbers(task: type[Padded], how: str) -> None:
    _require_same(plain(task), numbers(task(**OTHERS[how])))


@pytest.mark.parametrize("task", [Language])
def test_padding_in_front_gives_the_same_numbers(task: type[Padded]) -> None:
    _require_same(plain(task), numbers(task(to=LONGEST + 1, front=True)))


@pytest.mark.parametrize("task", [Language, pytest.param(Summed, marks=SLOW), Recurrent])
def test_another_batch_has_other_padding_and_gives_the_same_numbers(task: type[Padded]) -> None:
    alone = task()
    alone.batch_size = 1  # type: ignore[misc]
    _require_same(plain(task), numbers(alone))


def _require_same(found: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert found.keys() == other.keys()
    different = {
        name: float((other[name] - value).norm() / value.norm())
        for name, value in found.items()
        if not (other[name] - value).double().norm() <= 1e-9 * value.double().norm()
    }
    assert different == {}


def test_padding_does_not_turn_exact_targets_into_sampled_ones() -> None:
    for task in (Language(), Language(to=12)):  # 28 outputs that count, of up to 84
        model = task.model().double().eval()
        space = ParameterSpace(model, ["transformer.h.0.mlp.c_fc"])
        operator = GaussNewton(model, space, task, torch.arange(N))
        rhs_QP = torch.randn(1, space.size, dtype=torch.float64)
        assert EkFac(0.1).solve(operator, rhs_QP).record["targets"] == "exact"


def test_a_text_whose_loss_is_nan_does_not_hide_how_losses_are_made() -> None:
    task = Language()
    model = task.model().eval()
    batch = task.batch(torch.arange(N), Draw(0))
    plain = task.losses

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        return plain(model, batch) * torch.tensor([1.0, float("nan"), 1.0, 1.0])

    parts = TokenLosses(task)
    expected = parts.look(model, batch)
    task.losses = losses  # type: ignore[method-assign]
    assert torch.equal(TokenLosses(task).look(model, batch), expected)
