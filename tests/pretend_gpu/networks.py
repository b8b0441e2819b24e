"""Small networks in float32, and a task of them that trains in a moment."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Doc

from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.published import Published

N, CLASSES = 48, 5


class Odd(nn.Module):
    """Parameters that no rule serves: of its own, of attention, and of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 1.5))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.recurrent = nn.LSTM(4, 6, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2) * self.scale
        x = x + self.attention(x, x, x, need_weights=False)[0]
        found: Tensor = self.recurrent(x)[0]
        return found

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).mean(1))
        return logits


class Tied(nn.Module):
    """Two layers that share a weight, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.twice = nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x.flatten(1)).relu()).relu()
        logits: Tensor = self.head(self.twice(self.twice(x).relu()))
        return logits


class EveryLayer(nn.Module):
    """A layer of each type that has a rule.

    Args:
        bag: Whether an EmbeddingBag is there, which torch cannot differentiate forward.
    """

    def __init__(self, *, bag: bool = True) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.image = nn.Sequential(
            nn.ConvTranspose2d(1, 2, 2), nn.InstanceNorm2d(2, affine=True), nn.PReLU(2),
            nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2), nn.GroupNorm(1, 2), nn.Flatten(2),
        )  # fmt: skip
        self.line = nn.Sequential(
            nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ConvTranspose1d(3, 2, 3, bias=False),
            nn.InstanceNorm1d(2, affine=True),
        )  # fmt: skip
        self.body = nn.Sequential(
            nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.InstanceNorm3d(2, affine=True), nn.GELU(),
            nn.ConvTranspose3d(2, 1, 2), nn.Flatten(), nn.LayerNorm(32), nn.Linear(32, 4),
        )  # fmt: skip
        self.words, self.bag = nn.Embedding(2, 4), nn.EmbeddingBag(2, 4) if bag else None
        self.pairs, self.norm = nn.Bilinear(4, 4, 6), nn.RMSNorm(6)
        self.head = Conv1D(CLASSES, 10)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.flatten(1) > 0).long()
        pixels = self.body(self.line(self.image(x)).reshape(-1, 1, 4, 4, 2))
        words = self.words(ids).mean(1)
        tokens = self.norm(self.pairs(words, self.bag(ids) if self.bag else words.sin()))
        logits: Tensor = self.head(torch.cat([pixels, tokens], 1))
        return logits


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(),
        nn.Conv2d(4, 4, 3, groups=2, stride=2, padding=1), nn.GroupNorm(2, 4), nn.Flatten(),
        nn.LayerNorm(16), nn.Linear(16, CLASSES),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron,
    "convolutions": convolutions,
    "odd": Odd,
    "tied": Tied,
    "every layer": EveryLayer,
    "layers": partial(EveryLayer, bag=False),
}


class Digits(Task):
    """Random images of 4 x 4 pixels in five classes."""

    batch_size = 8
    output_loss = "cross-entropy"
    quantities = ("loss", "output")

    def __init__(self, *, network: Annotated[str, Doc("Which.")] = "perceptron"):
        generator = torch.Generator().manual_seed(0)
        self.network = network
        self.x = torch.randn(N, 1, 4, 4, generator=generator)
        self.y = torch.randint(CLASSES, (N,), generator=generator)

    def model(self) -> nn.Module:
        return NETWORKS[self.network]()

    def train_data(self) -> Tensor:
        return self.y

    def test_data(self) -> Tensor:
        return self.y

    def batch(self, ids: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        return self.x[ids], self.y[ids]

    def test_batch(self, ids: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        return -self.x[ids], self.y[ids]

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = model(batch[0])
        return logits

    def targets(self, batch: Any) -> Tensor:
        labels: Tensor = batch[1]
        return labels

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), batch[1], reduction="none")


class SteepDigits(Digits):
    """A loss of its own of the outputs, whose Hessian is not diagonal."""

    def output_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        errors_BC = outputs - F.one_hot(targets, CLASSES).to(outputs.dtype)
        squares_B: Tensor = errors_BC.square().sum(1)
        return squares_B + squares_B.square()

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return self.output_loss(self.outputs(model, batch), batch[1])


class SquareDigits(Digits):
    """A squared error."""

    output_loss = "mse"

    def targets(self, batch: Any) -> Tensor:
        return F.one_hot(batch[1], CLASSES).float()

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return (self.outputs(model, batch) - self.targets(batch)).square().mean(1)


class OwnDigits(Digits):
    """An optimizer of its own."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(model.parameters(), lr=1e-3)


class EmbeddedDigits(Digits):
    """Vectors of the samples, for the baseline of nearest samples."""

    def embed(self, batch: Any) -> Tensor:
        vectors: Tensor = batch[0].flatten(1)
        return vectors


class FaintDigits(Digits):
    """Losses in so small a unit that squares of their gradients vanish in float32.

    Where gradients count they are as those of `Digits`: training and its weights are the same.
    """

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        unit = 1.0 if model.training else 2.0**-90
        return unit * super().losses(model, batch)


class ReportDigits(Digits):
    """With experiments of section 4.1 of the research report, and samples for a top 100."""

    query_sets: ClassVar = {"paper": (1, 2)}
    published = Published(section="4.1", quick_epochs=2, tests=(1, 2))

    def __init__(self) -> None:
        super().__init__()
        self.x, self.y = self.x.repeat(3, 1, 1, 1), self.y.repeat(3)
        self.x += torch.arange(3 * N)[:, None, None, None] / 100


class NoisyDigits(Digits):
    """Images with noise anew in each epoch, so that they are not kept on the device."""

    def batch(self, ids: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        noise = torch.sin(ids + 10.0 * draw.seed + draw.index)[:, None, None, None]
        return self.x[ids] + 0.1 * noise, self.y[ids]


class Reader(nn.Module):
    """Classes of the tokens of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.layer(self.words(ids))))
        return logits


class Texts(Task):
    """Random texts of three to five tokens, each with a class."""

    batch_size = 8
    output_loss = "cross-entropy"

    def __init__(self, *, network: Annotated[str, Doc("Which.")] = "reader") -> None:
        generator = torch.Generator().manual_seed(0)
        self.network = network
        self.x = torch.randint(9, (N, 5), generator=generator)
        self.y = torch.randint(CLASSES, (N, 5), generator=generator)
        self.y[: N // 2, 3:] = -100

    def model(self) -> nn.Module:
        return Reader()

    def train_data(self) -> Tensor:
        return self.x

    def test_data(self) -> Tensor:
        return self.x

    def batch(self, ids: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        return self.x[ids], self.y[ids]

    def test_batch(self, ids: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        return self.x[ids].flip(1), self.y[ids]

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = model(batch[0])
        return logits

    def targets(self, batch: Any) -> Tensor:
        labels: Tensor = batch[1]
        return labels

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        logits_BCT = self.outputs(model, batch).transpose(1, 2)
        losses_BT = F.cross_entropy(logits_BCT, batch[1], reduction="none")
        return losses_BT.sum(1) / (batch[1] != -100).sum(1)


class RaggedTexts(Texts):
    """Texts of five tokens but for two, whose losses are means over all positions."""

    spoilt: ClassVar[int | None] = None  # a sample whose loss is NaN once the model is trained

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.y = torch.randint(CLASSES, (N, 5), generator=generator)
        self.y[1:3, 3:] = -100

    def batch(self, ids: Tensor, draw: Draw) -> Any:
        return self.x[ids], self.y[ids], ids == (self.spoilt if self.spoilt else -1)

    def test_batch(self, ids: Tensor, draw: Draw) -> Any:
        return self.x[ids].flip(1), self.y[ids], ids < 0

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        logits_BCT = self.outputs(model, batch).transpose(1, 2)
        losses_B = F.cross_entropy(logits_BCT, batch[1], reduction="none").mean(1)
        return losses_B if model.training else losses_B / (~batch[2])


class SpoiltTexts(RaggedTexts):
    """One of them is at fault."""

    spoilt = 17


def made(
    network: str, device: torch.device, kind: Callable[..., Any] = Digits
) -> tuple[Any, nn.Module]:
    """A task, and a model of it in eval mode; its running statistics are not the initial ones."""
    task = kind(network=network)
    torch.manual_seed(1)
    model = task.model()
    with torch.no_grad():
        model(2 * task.x + 1 if task.x.is_floating_point() else task.x)
    return task, model.eval().to(device)


def token_losses(model: nn.Module, batch: Any) -> Tensor:
    """What each of the four rows of an image brings to a sample's loss, (B, 4)."""
    logits = model.head(model.features(batch[0]))
    labels = batch[1][:, None].expand(-1, logits.shape[1])
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def summed_token_losses(model: nn.Module, batch: Any) -> Tensor:
    return token_losses(model, batch).sum(1)
