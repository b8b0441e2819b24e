import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from influence_jobs.errors import ModelError
from influence_jobs.models.checkpoints import load_weights
from influence_jobs.models.ffdnet import FFDNet
from influence_jobs.models.mnist_mlp import MnistMLP


def refused(path: Path, model: nn.Module | None = None) -> str:
    """The one line of the refusal of a file; the model must be unchanged."""
    model = model or MnistMLP()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_weights(model, path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("zipped", [True, False])
def test_loads_what_training_scripts_save(
    tmp_path: Path, wrap: Any, prefix: str, zipped: bool
) -> None:
    saved, loaded = FFDNet(color=False), FFDNet(color=False)
    path = tmp_path / "weights.pth"
    state = {prefix + name: tensor for name, tensor in saved.state_dict().items()}
    torch.save(wrap(state), path, _use_new_zipfile_serialization=zipped)
    load_weights(loaded, path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name])


def test_a_stream_is_called_by_its_name(tmp_path: Path) -> None:
    saved, loaded = MnistMLP(), MnistMLP()
    stream = io.BytesIO()
    torch.save(saved.state_dict(), stream)
    content = stream.getvalue()
    load_weights(loaded, io.BytesIO(content), name="run@3")
    assert torch.equal(loaded.fc1.weight, saved.fc1.weight)
    with pytest.raises(ModelError, match="checkpoint run@3 is corrupted"):
        load_weights(loaded, io.BytesIO(content[:-50]), name="run@3")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.pth")
    assert "Is a directory" in refused(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.5, 0.9, 0.999])
def test_truncated(tmp_path: Path, zipped: bool, share: float) -> None:
    path = tmp_path / "weights.pth"
    torch.save(MnistMLP().state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "corrupted" in refused(path)


def test_flipped_bit_among_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(MnistMLP().state_dict(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "corrupted" in refused(path)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_text("<html>404 not found</html>")
    assert "corrupted" in refused(path)


class Planted:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_planted_code_is_not_run(tmp_path: Path) -> None:
    path, marker = tmp_path / "weights.pth", tmp_path / "marker"
    planted = {"fc1.weight": Planted(marker)}
    for zipped in (True, False):
        torch.save(planted, path, _use_new_zipfile_serialization=zipped)
        assert "more than tensors" in refused(path)
    path.write_bytes(pickle.dumps(planted, protocol=2))
    refused(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(3)], torch.zeros(3), {}, {"fc1.weight": 1.0}, {"model": {}}, {3: torch.zeros(3)}],
)
def test_no_state_dict(tmp_path: Path, content: object) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    assert "no state dict" in refused(path)


def test_other_architecture_names_the_first_few(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(MnistMLP().state_dict(), path)
    message = refused(path, FFDNet())
    assert "does not fit FFDNet" in message
    assert "main.0.weight is missing; main.0.bias is missing; main.2.weight is missing" in message
    assert "more" in message

    torch.save(MnistMLP().state_dict() | {"extra": torch.zeros(1)}, path)
    assert "MnistMLP: extra is unknown; name" in refused(path)

    torch.save(FFDNet(color=False).state_dict(), path)
    assert "is unknown" in refused(path, FFDNet())


def test_other_shape(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(MnistMLP().state_dict() | {"fc2.bias": torch.zeros(65)}, path)
    assert "fc2.bias has shape (65,), not (64,)" in refused(path)
