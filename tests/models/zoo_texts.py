"""Models of texts: from transformers by a configuration, with PEFT, and by hand."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from zoo_base import Tokens, Zoo

WORDS, LENGTH = 20, 8


class Texts(Dataset):
    """Padded texts as dicts, as tokenizers give them."""

    def __init__(self, rows, seed):
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for _ in range(rows):
            length = int(torch.randint(3, LENGTH + 1, (), generator=generator))
            words = torch.randint(1, WORDS, (length,), generator=generator)
            self.rows.append(
                {
                    "input_ids": F.pad(words, (0, LENGTH - length)),
                    "attention_mask": F.pad(torch.ones_like(words), (0, LENGTH - length)),
                    "labels": (words.float().mean() > WORDS / 2).long(),
                }
            )

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class TextClassifier(Zoo):
    output_loss = "cross-entropy"

    def data(self, rows, seed):
        return Texts(rows, seed)

    def outputs(self, model, batch):
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def targets(self, batch):
        return batch["labels"]

    def losses(self, model, batch):
        return F.cross_entropy(self.outputs(model, batch), batch["labels"], reduction="none")


def _bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            num_labels=2,
        )
    )


class Bert(TextClassifier):
    def model(self):
        return _bert()


class DistilBert(TextClassifier):
    def model(self):
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        return DistilBertForSequenceClassification(
            DistilBertConfig(
                vocab_size=WORDS, dim=16, n_layers=1, n_heads=2, hidden_dim=24, num_labels=2
            )
        )


class BitFit(TextClassifier):
    """Only biases and the head are trained."""

    def model(self):
        model = _bert()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias") or name.startswith("classifier"))
        return model


class PeftLora(TextClassifier):
    def model(self):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        config = LoraConfig(
            r=2,
            target_modules=["query", "value"],
            modules_to_save=["classifier"],
            init_lora_weights="gaussian",
            lora_dropout=0.05,
        )
        return get_peft_model(_bert(), config)


class _Lora(nn.Module):
    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.lora_b.weight, std=0.02)

    def forward(self, x):
        return self.base(x) + self.lora_b(self.lora_a(x))


class HandLora(TextClassifier):
    def model(self):
        torch.manual_seed(1)
        model = _bert().requires_grad_(False)
        model.classifier.requires_grad_(True)
        for layer in model.bert.encoder.layer:
            attention = layer.attention.self
            attention.query, attention.value = _Lora(attention.query), _Lora(attention.value)
        return model


class GPT2(Tokens):
    """With tied embeddings and transformers' Conv1D."""

    def model(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(
            GPT2Config(vocab_size=self.words, n_positions=8, n_embd=12, n_layer=1, n_head=2)
        )


class GPTNeoX(Tokens):
    def model(self):
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=self.words,
                hidden_size=12,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                max_position_embeddings=16,
            )
        )


class Llama(Tokens):
    """With grouped queries and RMSNorm; a sample's loss is the sum of its tokens'."""

    def model(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.words,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=16,
            )
        )

    def losses(self, model, batch):
        logits = self.outputs(model, batch)
        return F.cross_entropy(logits.mT, self.targets(batch), reduction="none").sum(1)


class T5(Zoo):
    """From a text to its last three words, with shared embeddings; padding does not count."""

    output_loss = "cross-entropy"
    words = 13

    def data(self, rows, seed):
        generator = torch.Generator().manual_seed(seed)
        source = torch.randint(2, self.words, (rows, 5), generator=generator)
        target = source[:, -3:].clone()
        target[::3, 2] = -100
        return TensorDataset(source, target)

    def model(self):
        from transformers import T5Config, T5ForConditionalGeneration

        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=self.words,
                d_model=12,
                d_kv=6,
                d_ff=16,
                num_layers=1,
                num_heads=2,
                decoder_start_token_id=0,
                pad_token_id=0,
            )
        )

    def outputs(self, model, batch):
        return model(input_ids=batch[0], labels=batch[1]).logits

    def losses(self, model, batch):
        losses = F.cross_entropy(self.outputs(model, batch).mT, batch[1], reduction="none")
        return losses.sum(1) / (batch[1] != -100).sum(1)


class _Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.EmbeddingBag(WORDS, 8, padding_idx=0)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.words(x))


class Bag(TextClassifier):
    def model(self):
        return _Bag()

    def outputs(self, model, batch):
        return model(batch["input_ids"])


class _Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, 12)
        self.places = nn.Parameter(torch.randn(LENGTH, 12) / 10)
        layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(12, 2)

    def forward(self, x, mask):
        x = self.encoder(self.words(x) + self.places, src_key_padding_mask=mask == 0)
        return self.head(x[:, 0])


class TransformerEncoder(TextClassifier):
    """Of torch, with a padding mask."""

    def model(self):
        return _Encoder()

    def outputs(self, model, batch):
        return model(batch["input_ids"], batch["attention_mask"])


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, 12)
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 2)

    def forward(self, x):
        x = self.words(x)
        query, key, value = self.qkv(x).unflatten(2, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = self.norm(x + self.out(attended.transpose(1, 2).flatten(2)))
        return self.head(x.mean(1))


class Attention(TextClassifier):
    """By hand, with F.scaled_dot_product_attention."""

    def model(self):
        return _Attention()

    def outputs(self, model, batch):
        return model(batch["input_ids"])
