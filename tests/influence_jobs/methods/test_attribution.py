from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from influence_jobs.errors import DataError, ModelError, SpecError
from influence_jobs.methods.attribution import attribution_scores, query_activations
from influence_jobs.tasks.base import Batch, Draw, Task
from influence_jobs.tasks.ffdnet import FFDNetTask
from influence_jobs.tasks.mnist import MnistTask

ONE_DRAW = [Draw(0)]


def test_mnist_activations_written_out(mnist_dir: Path) -> None:
    task = MnistTask(data_dir=str(mnist_dir), limit=4)
    torch.manual_seed(0)
    model = task.model().eval()
    found = query_activations(task, model, ["fc1", "fc2"], [(597, None), (3, None)], ONE_DRAW)
    assert found["fc1"].dtype == np.float32
    for row, test in enumerate((597, 3)):
        pixels = torch.from_numpy(task.test_picture(test)).flatten() / 127.5 - 1
        with torch.no_grad():
            first = (model.fc1.weight @ pixels + model.fc1.bias).clamp(min=0)
            second = (model.fc2.weight @ first + model.fc2.bias).clamp(min=0)
        np.testing.assert_allclose(found["fc1"][row], first, atol=1e-5)
        np.testing.assert_allclose(found["fc2"][row], second, atol=1e-5)


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> FFDNetTask:
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(1).integers(0, 256, (31, 28, 3), dtype=np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(folder / name)
        pixels = pixels[::-1]
    return FFDNetTask(images=str(folder), test_images=str(folder), patch_size=20)


def first_map(model: Any, batch: Batch) -> Tensor:
    """FFDNet's first convolution, (96, h, w), of the folded image, written out by hand."""
    noisy, sigma, _ = batch
    padded = F.pad(noisy, (0, 0, 0, 1), mode="replicate")[0]
    folded = torch.stack(
        [padded[c, i::2, j::2] for c in range(3) for i in range(2) for j in range(2)]
    )
    noise_map = torch.full((1, *folded.shape[1:]), float(sigma))
    with torch.no_grad():
        output: Tensor = model.main[0](torch.cat((folded, noise_map))[None])[0]
    return output.clamp(min=0)


def test_ffdnet_activations_at_points_and_regions_averaged_over_draws(denoiser: FFDNetTask) -> None:
    torch.manual_seed(0)
    model = denoiser.model().eval()
    queries = [
        (1, (0, 0, 1, 1)),
        (0, (30, 27, 1, 1)),
        (1, (7, 12, 1, 1)),
        (0, (3, 5, 6, 2)),
        (1, None),
    ]
    draws = [Draw(5, index) for index in range(3)]
    found = query_activations(denoiser, model, ["main.0", "main.2"], queries, draws)
    assert found["main.2"].shape == (5, 96)
    for row, (test, region) in enumerate(queries):
        total = torch.zeros(96)
        for draw in draws:
            a_CHW = first_map(model, denoiser.test_batch(torch.tensor([test]), draw))
            y, x, height, width = region or (0, 0, 31, 28)
            cells = {(i // 2, j // 2) for i in range(y, y + height) for j in range(x, x + width)}
            total += torch.stack([a_CHW[:, i, j] for i, j in cells]).mean(dim=0)
        np.testing.assert_allclose(found["main.0"][row], total / 3, atol=1e-5)
    # A query's activations do not depend on the queries beside it.
    alone = query_activations(denoiser, model, ["main.2"], queries[2:3], draws)
    np.testing.assert_array_equal(alone["main.2"][0], found["main.2"][2])


class Odd(nn.Module):
    """Layers that attribution cannot use, and one whose output is changed in place later."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.pair = nn.GRU(4, 4)
        self.tokens = nn.Embedding(3, 4)
        self.fine = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x)) + self.pair(x)[0]
        x = x + self.tokens(torch.zeros(1, 2, dtype=torch.long)).sum(dim=1)
        x = self.fine(x)
        return x.mul_(0)


class OddTask(Task):
    def model(self) -> nn.Module:
        return Odd()

    def train_data(self) -> Tensor:
        return torch.ones(2, 4)

    def test_data(self) -> Tensor:
        return torch.ones(2, 4)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        losses_B: Tensor = model(batch).sum(dim=1)
        return losses_B


@pytest.mark.parametrize(
    ("layer", "complaint"),
    [
        ("twice", "is called 2 times"),
        ("unused", "is called 0 times"),
        ("pair", "has 2 weights, and their rows may not be its outputs"),
        ("tokens", "has norms of its weight's rows"),  # which may be as many as the outputs
    ],
)
def test_layers_without_one_activation_a_channel_are_refused(layer: str, complaint: str) -> None:
    task = OddTask()
    model = task.model()
    with pytest.raises(ModelError, match=f"layer {layer} {complaint}"):
        query_activations(task, model, [layer], [(0, None)], ONE_DRAW)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_channels_of_a_sequence_are_its_last_axis_and_those_of_an_image_its_first() -> None:
    """Compared with the mean over positions by hand, for layers with channels on other axes."""

    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.tokens = nn.Linear(5, 3)  # (B, T, C)
            self.wide = nn.Conv1d(4, 6, 2)  # (B, C, T)
            self.normed = nn.LayerNorm((6, 2))  # C over both axes

        def forward(self, x: Tensor) -> Tensor:
            self.seen = {"tokens": self.tokens(x)}
            self.seen["wide"] = self.wide(self.seen["tokens"])
            self.seen["normed"] = self.normed(self.seen["wide"])
            return self.seen["normed"].flatten(1)

    class PlacesTask(OddTask):
        def test_data(self) -> Tensor:
            return torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))

    task = PlacesTask()
    model = task.model = Places()
    found = query_activations(task, model, ["tokens", "wide", "normed"], [(1, None)], ONE_DRAW)
    seen = {layer: output.detach().relu()[0] for layer, output in model.seen.items()}
    np.testing.assert_allclose(found["tokens"][0], seen["tokens"].mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["wide"][0], seen["wide"].mean(1), rtol=1e-6)
    np.testing.assert_allclose(found["normed"][0], seen["normed"].flatten(), rtol=1e-6)


class Own(nn.Module):
    """A layer of one's own: a matrix over the second axis, and a state beside the output."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.einsum("ci,bit->bct", self.matrix, x), x


def test_channels_of_volumes_and_of_layers_of_ones_own_and_regions_of_their_maps() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.volume = nn.Conv3d(1, 3, 2)  # (B, C, D, H, W)
            self.own = Own(2, 4)
            self.unclear = Own(2, 5)  # as many channels as positions
            self.attention = nn.MultiheadAttention(5, 1, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            self.seen = {"volume": self.volume(x.view(1, 1, 2, 5, 1).expand(-1, -1, -1, -1, 3))}
            self.seen["own"] = self.own(x)[0]
            mixed = self.attention(x, x, x)[0]
            parts = (*self.seen.values(), self.unclear(x)[0], mixed)
            return torch.cat([part.flatten(1) for part in parts], 1)

    class NetTask(OddTask):
        def test_data(self) -> Tensor:
            return torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(1))

    task = NetTask()
    model = task.model = Net()
    found = query_activations(task, model, ["volume", "own"], [(1, None)], ONE_DRAW)
    seen = {layer: output.detach().relu()[0] for layer, output in model.seen.items()}
    np.testing.assert_allclose(found["volume"][0], seen["volume"].mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found["own"][0], seen["own"].mean(1), rtol=1e-5)
    for layer, complaint in {
        "unclear": r"returns shape \(1, 5, 5\), where several axes are as long as its",
        "attention": r"returns shape \(1, 2, 5\), where no axis is as long as its",
    }.items():
        with pytest.raises(ModelError, match=f"layer {layer} {complaint}"):
            query_activations(task, model, [layer], [(0, None)], ONE_DRAW)


def test_regions_of_vectors_and_bad_numbers_are_refused() -> None:
    task = OddTask()
    model = task.model()
    with pytest.raises(ModelError, match="has no positions"):
        query_activations(task, model, ["fine"], [(0, (0, 0, 1, 1))], ONE_DRAW)
    nn.init.constant_(model.get_parameter("fine.bias"), np.inf)
    with pytest.raises(DataError, match="activations of layer fine are not finite for test 1"):
        query_activations(task, model, ["fine"], [(1, None)], ONE_DRAW)


def test_activations_are_taken_before_operations_in_place() -> None:
    task = OddTask()
    model = task.model()
    nn.init.constant_(model.get_parameter("fine.bias"), 100)
    assert query_activations(task, model, ["fine"], [(0, None)], ONE_DRAW)["fine"].min() > 50


Arrays = tuple[dict[str, npt.NDArray[np.float32]], dict[str, npt.NDArray[np.float32]]]


@pytest.fixture
def arrays() -> Arrays:
    generator = np.random.default_rng(0)
    activations = {"a": generator.random((3, 5)), "b": generator.random((3, 4))}
    norms = {"a": generator.random((7, 5)), "b": generator.random((7, 4, 3, 2))}
    norms["a"][4] = 0
    norms["b"][4] = 0
    return _floats(activations), _floats(norms)


def _floats(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[np.float32]]:
    return {name: values.astype(np.float32) for name, values in arrays.items()}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("limit", [None, 14.0])
def test_scores_in_loops(arrays: Arrays, normalize: bool, limit: float | None) -> None:
    activations, norms = arrays
    found = attribution_scores(activations, norms, exclude_norm_above=limit, normalize=normalize)
    left_out = 0
    for i in range(7):
        total = float(norms["a"][i].sum()) + float(norms["b"][i].sum())
        for layer, a_QC in activations.items():
            for query in range(3):
                score = sum(
                    float(a_QC[query, c]) * float(norms[layer][i, c].sum())
                    for c in range(a_QC.shape[1])
                )
                if normalize and total:
                    score /= total
                if limit is not None and total > limit:
                    score = np.nan
                    left_out += 1
                assert float(found[layer][query, i]) == pytest.approx(score, rel=1e-5, nan_ok=True)
        if i == 4:
            assert found["a"][0, i] == 0
    assert (0 < left_out < 7 * 6) == (limit is not None)
    assert found["a"].dtype == np.float32


def test_a_samples_scores_do_not_depend_on_the_samples_beside_it(arrays: Arrays) -> None:
    activations, norms = arrays
    options: dict[str, Any] = {"exclude_norm_above": 14.0, "normalize": True}
    order = np.array([5, 0, 6, 2])
    some = attribution_scores(activations, {k: v[order] for k, v in norms.items()}, **options)
    for layer, scores in attribution_scores(activations, norms, **options).items():
        np.testing.assert_allclose(some[layer], scores[:, order], rtol=1e-6)


def test_norms_that_do_not_fit_are_refused(arrays: Arrays) -> None:
    activations, norms = arrays
    one = {"a": activations["a"]}
    with pytest.raises(SpecError, match="norms of layer a are of the whole layer"):
        attribution_scores(one, {"a": norms["a"].sum(axis=1)})
    with pytest.raises(SpecError, match="layer a has 5 activations but norms of 4 channels"):
        attribution_scores(one, {"a": norms["b"]})
    norms["a"][2, 1] = np.nan
    with pytest.raises(DataError, match="norms of layer a are not finite"):
        attribution_scores(one, norms)


def test_a_sample_at_the_limit_is_kept() -> None:
    norms = np.array([[2.0], [np.nextafter(2.0, 3)]])
    found = attribution_scores({"a": np.ones((1, 1))}, {"a": norms}, exclude_norm_above=2.0)
    assert found["a"][0, 0] == 2
    assert np.isnan(found["a"][0, 1])
