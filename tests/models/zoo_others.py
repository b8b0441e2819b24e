"""Models of series and tables, and models that are built in unusual ways."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import TensorDataset
from zoo_base import Classifier, Zoo, normal


class _Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(4, 8, batch_first=True, **options)
        self.head = nn.Linear(16 if options.get("bidirectional") else 8, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class LSTM(Classifier):
    shape = (8, 4)

    def model(self):
        return _Recurrent(nn.LSTM)


class GRU(Classifier):
    """Two layers, in both directions."""

    shape = (8, 4)

    def model(self):
        return _Recurrent(nn.GRU, num_layers=2, bidirectional=True)


class _Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][0][-1])


class PackedLSTM(Classifier):
    shape = (8, 4)

    def data(self, rows, seed):
        x, labels = super().data(rows, seed).tensors
        return TensorDataset(x, labels, 3 + torch.arange(rows) % 6)

    def model(self):
        return _Packed()

    def outputs(self, model, batch):
        return model(batch[0], batch[2])


class _Loop(nn.Module):
    """A cell, called once for every step."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        state = x.new_zeros(len(x), 8)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


class CellLoop(Classifier):
    shape = (8, 4)

    def model(self):
        return _Loop()


class Audio(Classifier):
    """Conv1d with strides, dilation and groups."""

    shape = (1, 64)

    def model(self):
        return nn.Sequential(
            nn.Conv1d(1, 8, 9, stride=4),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Conv1d(8, 8, 3, dilation=2, groups=4),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        )


class BatchNormMLP(Classifier):
    shape = (10,)

    def model(self):
        hidden = [nn.Linear(10, 16, bias=False), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(0.2)]
        return nn.Sequential(*hidden, nn.Linear(16, 3))


class Regression(Zoo):
    """A table of numbers, and one number to predict: outputs (B,)."""

    output_loss = "mse"

    def data(self, rows, seed):
        x = normal(rows, (6,), seed)
        return TensorDataset(x, x[:, 0] - x[:, 1].abs())

    def model(self):
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))

    def outputs(self, model, batch):
        return model(batch[0]).squeeze(1)

    def losses(self, model, batch):
        return (self.outputs(model, batch) - batch[1]).square()


class LinearRegression(Regression):
    """Least squares, of which EK-FAC is exact."""

    def model(self):
        return nn.Linear(6, 1, bias=False)


class MultiLabel(Zoo):
    output_loss = "binary-cross-entropy"

    def data(self, rows, seed):
        x = normal(rows, (8,), seed)
        return TensorDataset(x, (x[:, :4] > 0).float())

    def model(self):
        return nn.Sequential(nn.Linear(8, 12), nn.ELU(), nn.Linear(12, 4))

    def losses(self, model, batch):
        logits = self.outputs(model, batch)
        return F.binary_cross_entropy_with_logits(logits, batch[1], reduction="none").mean(1)


class Huber(Zoo):
    """A loss of one's own as output_loss."""

    def data(self, rows, seed):
        x = normal(rows, (6,), seed)
        return TensorDataset(x, x[:, 0] - x[:, 1].abs())

    def model(self):
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(0))

    def output_loss(self, outputs, targets):
        return F.huber_loss(outputs, targets, reduction="none")

    def losses(self, model, batch):
        return self.output_loss(self.outputs(model, batch), batch[1])


class _TiedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(12, 5)
        self.bias = nn.Parameter(torch.zeros(12))

    def forward(self, x):
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t(), self.bias)


class TiedAutoencoder(Zoo):
    output_loss = "mse"

    def data(self, rows, seed):
        return TensorDataset(normal(rows, (12,), seed))

    def model(self):
        return _TiedAutoencoder()

    def targets(self, batch):
        return batch[0]

    def losses(self, model, batch):
        return (self.outputs(model, batch) - batch[0]).square().mean(1)


class _TwoTowers(nn.Module):
    """A recommender: users and things have embeddings, and their product is the rating."""

    def __init__(self):
        super().__init__()
        self.users, self.things = nn.Embedding(6, 4), nn.Embedding(9, 4)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return (self.users(x[:, 0]) * self.things(x[:, 1])).sum(1) + self.bias


class Recommender(Regression):
    def data(self, rows, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.stack([torch.randint(n, (rows,), generator=generator) for n in (6, 9)], 1)
        return TensorDataset(x, (x.sum(1) % 5).float() - 2)

    def model(self):
        return _TwoTowers()

    def outputs(self, model, batch):
        return model(batch[0])


class Parametrized(Classifier):
    """Weights that are computed: weight_norm, and spectral norm in eval mode."""

    shape = (10,)

    def model(self):
        return nn.Sequential(
            parametrizations.weight_norm(nn.Linear(10, 16)),
            nn.ReLU(),
            parametrizations.spectral_norm(nn.Linear(16, 16)),
            nn.ReLU(),
            nn.Linear(16, 3),
        )


class OldWeightNorm(Classifier):
    """weight_norm as it was before parametrizations."""

    shape = (10,)

    def model(self):
        from torch.nn.utils import weight_norm

        return nn.Sequential(weight_norm(nn.Linear(10, 16)), nn.ReLU(), nn.Linear(16, 3))


class _Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(10) / 3)
        self.w = nn.Parameter(torch.randn(10, 3) / 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * torch.tanh(x + self.shift) @ self.w


class BareParameters(Classifier):
    shape = (10,)

    def model(self):
        return _Bare()


class _ListedRight(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = ((10, 12), (12, 3))
        self.weights = nn.ParameterList(torch.randn(a, b) / a**0.5 for a, b in sizes)

    def forward(self, x):
        for weight in self.weights[:-1]:
            x = torch.tanh(x @ weight)
        return x @ self.weights[-1]


class ParameterList(Classifier):
    shape = (10,)

    def model(self):
        return _ListedRight()


class _Listed(nn.Module):
    """Uses its weights by a list of its own, past its modules."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(10, 12), nn.Linear(12, 3)
        self.weights = [self.first.weight, self.second.weight]

    def forward(self, x):
        return torch.tanh(x @ self.weights[0].t()) @ self.weights[1].t()


class ListedWeights(Classifier):
    shape = (10,)

    def model(self):
        return _Listed()


class BFloat16(Classifier):
    shape = (10,)
    dtype = torch.bfloat16

    def model(self):
        layers = [nn.Linear(10, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3)]
        return nn.Sequential(*layers).bfloat16()


class Float64(Classifier):
    shape = (10,)
    dtype = torch.float64

    def model(self):
        return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3)).double()


class _Uncertain(nn.Module):
    """Predicts, and learns how sure it is, in its loss."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))
        self.log_variance = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.net(x).squeeze(1)


class LossWithParameters(Regression):
    """The loss has a parameter that outputs do not have."""

    output_loss = None

    def model(self):
        return _Uncertain()

    def outputs(self, model, batch):
        return model(batch[0])

    def losses(self, model, batch):
        error = (self.outputs(model, batch) - batch[1]).square()
        return error * torch.exp(-model.log_variance) + model.log_variance


class _Cosine(nn.Module):
    """Logits are cosines, times a learnt temperature."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(10, 8)
        self.centres = nn.Parameter(torch.randn(3, 8))
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        x = F.normalize(torch.tanh(self.body(x)), dim=1)
        return self.log_scale.exp() * x @ F.normalize(self.centres, dim=1).t()


class Cosine(Classifier):
    shape = (10,)

    def model(self):
        return _Cosine()


class _Experts(nn.Module):
    """Two experts; each sample goes to the one that a gate chooses, in Python."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(10, 2)
        self.experts = nn.ModuleList(nn.Linear(10, 3) for _ in range(2))

    def forward(self, x):
        weights = self.gate(x).softmax(1)
        out = x.new_zeros(len(x), 3)
        for i, expert in enumerate(self.experts):
            chosen = (weights.argmax(1) == i).nonzero()[:, 0]
            if len(chosen):
                out = out.index_add(0, chosen, weights[chosen, i, None] * expert(x[chosen]))
        return out


class Experts(Classifier):
    """A mixture of experts, whose path depends on values."""

    shape = (10,)

    def model(self):
        return _Experts()


class Contrastive(Zoo):
    """A loss that mixes the batch, which has no samples of its own to blame."""

    def data(self, rows, seed):
        return TensorDataset(normal(rows, (10,), seed))

    def model(self):
        return nn.Linear(10, 4)

    def losses(self, model, batch):
        features = F.normalize(model(batch[0]), dim=1)
        return -(features @ features.t()).log_softmax(0).diagonal()
