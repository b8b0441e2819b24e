"""A BERT-like classifier of texts, from transformers: docs/examples/bert.md.

Rows are dicts with a text in them; a tokenizer makes a batch of them.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
from typing_extensions import Doc

from influence_jobs import Batch, Task

GOOD = ("lovely", "bright", "warm", "funny", "clever")
BAD = ("dull", "cold", "slow", "noisy", "clumsy")
THINGS = ("film", "book", "play", "song", "story", "game")
WORDS = ("[PAD]", "[UNK]", "the", "was", "and", "not", *GOOD, *BAD, *THINGS)


def reviews(count: int, seed: int, *, wrong: int = 0) -> list[dict[str, Any]]:
    """Rows such as {"text": "the film was dull", "label": 0}; the first ones with wrong labels."""
    drawn = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        good = int(drawn.integers(2))
        words = drawn.choice((BAD, GOOD)[good], size=drawn.integers(1, 4), replace=False)
        negated = drawn.random() < 0.3
        said = f"{'not ' if negated else ''}{' and '.join(words)}"
        label = good ^ int(negated) ^ int(i < wrong)
        rows.append({"text": f"the {drawn.choice(THINGS)} was {said}", "label": label})
    return rows


class Bert(Task):
    """Is a review good (1) or bad (0)?"""

    output_loss = "cross-entropy"

    def __init__(
        self,
        *,
        samples: Annotated[int, Doc("Reviews to train on; one in twenty is mislabelled.")] = 400,
        hidden: Annotated[int, Doc("Hidden size.")] = 32,
    ) -> None:
        self.hidden = hidden
        self.train_set = reviews(samples, 0, wrong=samples // 20)
        self.test_set = reviews(40, 1)

    @cached_property
    def tokenizer(self) -> Any:
        """Yours comes from AutoTokenizer.from_pretrained."""
        words = {word: i for i, word in enumerate(WORDS)}
        found = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        found.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="[PAD]")

    def model(self) -> nn.Module:
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=len(WORDS),
                hidden_size=self.hidden,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=2 * self.hidden,
                max_position_embeddings=16,
            )
        )

    def train_data(self) -> Sequence[Mapping[str, Any]]:
        return self.train_set

    def test_data(self) -> Sequence[Mapping[str, Any]]:
        return self.test_set

    def collate(self, rows: list[Any]) -> Batch:
        batch = self.tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        batch["labels"] = torch.tensor([row["label"] for row in rows])
        return batch

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def targets(self, batch: Batch) -> Tensor:
        return batch["labels"]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:  # model(...).loss is an average
        return F.cross_entropy(self.outputs(model, batch), self.targets(batch), reduction="none")

    # Optional: accuracy after each epoch, and the texts beside the scores.

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        batch = self.collate(self.test_set)
        return {
            "accuracy": float(
                (self.outputs(model, batch).argmax(1) == batch["labels"]).float().mean()
            )
        }

    def describe(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return _columns([self.train_set[i] for i in ids])

    def describe_test(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return _columns([self.test_set[i] for i in ids])


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, npt.NDArray[Any]]:
    return {name: np.array([row[name] for row in rows]) for name in ("label", "text")}
