"""GPT-2 of 124 million parameters from a config, on random tokens: for gradients.py."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_jobs import Batch, Task

VOCABULARY = 50257


class RandomGpt2(Task):
    """The next token of random sequences.

    Args:
        sequences: To train on.
        tokens: Of a sequence.
    """

    output_loss = "cross-entropy"

    def __init__(self, *, sequences: int = 200, tokens: int = 128):
        drawn = torch.Generator().manual_seed(0)
        self.train_set = torch.randint(VOCABULARY, (sequences, tokens), generator=drawn)
        self.test_set = torch.randint(VOCABULARY, (20, tokens), generator=drawn)

    def model(self) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        made: nn.Module = GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa"))
        return made

    def train_data(self) -> Tensor:
        return self.train_set

    def test_data(self) -> Tensor:
        return self.test_set

    def collate(self, rows: list[Tensor]) -> Batch:
        return torch.stack(rows)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(input_ids=batch, use_cache=False).logits
        return logits[:, :-1]

    def targets(self, batch: Batch) -> Tensor:
        following: Tensor = batch[:, 1:]
        return following

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        scores = self.outputs(model, batch).transpose(1, 2)
        return F.cross_entropy(scores, self.targets(batch), reduction="none").mean(1)
