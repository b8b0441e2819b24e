"""A GPT-2-like language model with tied embeddings, from transformers: docs/examples/gpt.md.

A sample is a sentence; its loss is the mean over its tokens. A query is a whole sentence, or a
span of its tokens: `--tokens 2:4`.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel
from typing_extensions import Doc

from influence_jobs import Batch, Task, Text

ANIMALS = {"cat": "milk", "dog": "bones", "cow": "grass", "bee": "nectar"}
WORDS = (".", "the", "likes", "and", "never", *ANIMALS, *ANIMALS.values())
IGNORED = -100  # what cross_entropy leaves out: here the padding


def sentences(count: int, seed: int) -> list[str]:
    """Sentences of 5 or 9 words, such as "the cat likes milk ."; the cow's are rare."""
    drawn = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        named = drawn.choice([*ANIMALS], size=drawn.integers(1, 3), p=(0.4, 0.3, 0.1, 0.2))
        found.append(" and ".join(f"the {name} likes {ANIMALS[name]}" for name in named) + " .")
    return found


class Gpt(Task):
    """What does the next word depend on?"""

    output_loss = "cross-entropy"

    def __init__(
        self,
        *,
        samples: Annotated[int, Doc("Sentences to train on.")] = 300,
        hidden: Annotated[int, Doc("Hidden size.")] = 32,
    ) -> None:
        self.hidden = hidden
        self.train_set, self.test_set = sentences(samples, 0), sentences(20, 1)

    def model(self) -> nn.Module:
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(WORDS),
                n_positions=16,
                n_embd=self.hidden,
                n_layer=2,
                n_head=2,
                bos_token_id=0,
                eos_token_id=0,
            )
        )

    def train_data(self) -> Sequence[str]:
        return self.train_set

    def test_data(self) -> Sequence[str]:
        return self.test_set

    def collate(self, rows: list[str]) -> Batch:
        """Ids, padded, and what follows each of them; the padding is masked and not counted."""
        texts = [torch.tensor([WORDS.index(word) for word in row.split()]) for row in rows]
        ids = pad_sequence(texts, batch_first=True)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        following = ids.masked_fill(mask == 0, IGNORED)[:, 1:]
        return {"ids": ids, "mask": mask, "following": following}

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(input_ids=batch["ids"], attention_mask=batch["mask"], use_cache=False).logits[
            :, :-1
        ]

    def targets(self, batch: Batch) -> Tensor:
        return batch["following"]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, following = self.outputs(model, batch).transpose(1, 2), batch["following"]
        losses = F.cross_entropy(logits, following, ignore_index=IGNORED, reduction="none")
        return losses.sum(1) / (following != IGNORED).sum(1)

    def describe(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return {"text": np.array([self.train_set[i] for i in ids])}

    def describe_test(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return {"text": np.array([self.test_set[i] for i in ids])}

    # What people see: the words. The first is no token: nothing says what it should be.

    def show(self, sample: int) -> Text:
        return _words(self.train_set[sample])

    def show_test(self, test: int) -> Text:
        return _words(self.test_set[test])


def _words(sentence: str) -> Text:
    first, *others = sentence.split()
    return Text([first, *(f" {word}" for word in others)], range(1, 1 + len(others)))
