"""A language model with a frozen body and LoRA adapters, by PEFT: docs/examples/lora.md."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification
from typing_extensions import Doc

from influence_jobs import Batch, Task

VOCABULARY, LENGTH = 30, 8


def numbers(count: int, seed: int) -> list[tuple[Tensor, int]]:
    """Sequences of numbers, and whether more than half of them are below 15."""
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (count, LENGTH), generator=drawn)
    return [(row, int((row < VOCABULARY // 2).sum() > LENGTH // 2)) for row in ids]


class Lora(Task):
    """Which samples shaped the adapters? The frozen body has no part in it."""

    output_loss = "cross-entropy"

    def __init__(
        self,
        *,
        samples: Annotated[int, Doc("Sequences to train on.")] = 300,
        hidden: Annotated[int, Doc("Hidden size.")] = 32,
        rank: Annotated[int, Doc("Rank of the adapters.")] = 2,
    ) -> None:
        self.hidden, self.rank = hidden, rank
        self.train_set, self.test_set = numbers(samples, 0), numbers(40, 1)

    def body(self) -> nn.Module:
        """Yours comes from AutoModel....from_pretrained; here it is random, always the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return BertForSequenceClassification(
                BertConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=self.hidden,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    intermediate_size=2 * self.hidden,
                    max_position_embeddings=LENGTH,
                )
            )

    def model(self) -> nn.Module:
        adapters = LoraConfig(
            task_type="SEQ_CLS",  # the head is trained too
            r=self.rank,
            lora_alpha=2 * self.rank,
            target_modules=["query", "value"],
        )
        return get_peft_model(self.body(), adapters)

    def train_data(self) -> Sequence[tuple[Tensor, int]]:
        return self.train_set

    def test_data(self) -> Sequence[tuple[Tensor, int]]:
        return self.test_set

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(input_ids=batch[0]).logits

    def targets(self, batch: Batch) -> Tensor:
        return batch[1]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), self.targets(batch), reduction="none")

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        batch = self.collate([*self.test_set])
        right = self.outputs(model, batch).argmax(1) == batch[1]
        return {"accuracy": float(right.float().mean())}

    def describe(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return _columns([self.train_set[i] for i in ids])

    def describe_test(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return _columns([self.test_set[i] for i in ids])


def _columns(rows: Sequence[tuple[Tensor, int]]) -> dict[str, npt.NDArray[Any]]:
    texts = [" ".join(map(str, row.tolist())) for row, _ in rows]
    return {"label": np.array([label for _, label in rows]), "numbers": np.array(texts)}
