import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from influence_jobs.errors import ModelError
from influence_jobs.models.checkpoints import load_weights, weight_files
from influence_jobs.models.ffdnet import FFDNet
from influence_jobs.models.mnist_mlp import MnistMLP
from influence_jobs.store.checkpoints import file_checkpoint


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


LIGHTNING = {"epoch": 3, "hyper_parameters": {"lr": 0.1}, "callbacks": {"best": torch.ones(1)}}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}},
        lambda s: {"state_dict": s, **LIGHTNING},
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
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
    assert "No such file" in refused(tmp_path / "none.safetensors")
    assert "holds no weights; looked for model.safetensors, model.safe" in refused(tmp_path)


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
        assert "holds more than tensors (posix.mkdir), which may run code" in refused(path)
    path.write_bytes(pickle.dumps(planted, protocol=2))
    refused(path)
    assert not marker.exists()


def deflate(path: Path) -> None:
    """Write an archive anew, compressed."""
    old = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))


def test_an_archive_that_unpacks_to_much_more_than_its_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"fc1.weight": torch.zeros(1 << 25)}, path)
    deflate(path)
    assert path.stat().st_size < 1 << 20
    assert "made to do harm (its" in refused(path)


def test_numbers_marked_as_a_folder_are_refused(tmp_path: Path) -> None:
    """torch would load whatever was in the memory."""
    path = tmp_path / "weights.pth"
    torch.save(MnistMLP().state_dict(), path)
    old = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data/1"):
                entry.external_attr |= 0x10
            new.writestr(entry, content)
    assert "data/1 is marked as a folder" in refused(path)


class Huge:
    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (1 << 40,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bytearray_of_any_size_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"fc1.weight": Huge()}, path, _use_new_zipfile_serialization=zipped)
    assert "holds a bytearray" in refused(path)


def test_another_case_of_a_name_hides_no_bytearray(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"fc1.weight": Huge()}, path)
    old = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename.replace("data.pkl", "data.PKL"), old.read(entry))
    assert "holds a bytearray" in refused(path)


def test_the_word_bytearray_is_no_bytearray(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    model = MnistMLP().state_dict()
    torch.save({"model": model, "vocabulary": {"bytearray": 3}, "note": "str to bytearray"}, path)
    load_weights(MnistMLP(), path)


def test_a_model_may_be_compressed(tmp_path: Path) -> None:
    """torch reads such files, which other programs write."""
    path, model = tmp_path / "weights.pth", MnistMLP()
    torch.save(MnistMLP().state_dict(), path)
    before = torch.load(path, weights_only=True)
    deflate(path)
    load_weights(model, path)
    assert torch.equal(model.fc1.weight, before["fc1.weight"])


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
    assert "it lacks main.0.weight, main.0.bias, main.2.weight and " in message
    assert "; it has besides fc1.weight, fc1.bias, fc2.weight and 3 more: name a" in message

    torch.save(MnistMLP().state_dict() | {"extra": torch.zeros(1)}, path)
    assert "MnistMLP: it has besides extra: name" in refused(path)


def test_other_shape(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(MnistMLP().state_dict() | {"fc2.bias": torch.zeros(65)}, path)
    assert "fc2.bias has shape (65,), not (64,)" in refused(path)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors(tmp_path: Path, prefix: str) -> None:
    saved, loaded, path = MnistMLP(), MnistMLP(), tmp_path / "weights.safetensors"
    save_file({prefix + k: v for k, v in saved.state_dict().items()}, path)
    load_weights(loaded, path)
    assert torch.equal(loaded.fc3.weight, saved.fc3.weight)
    path.write_bytes(path.read_bytes()[:-50])
    assert "corrupted or truncated" in refused(path)


def folder(path: Path, form: str, state: dict[str, torch.Tensor]) -> None:
    """Write weights as transformers does."""
    if form in ("model.safetensors", "pytorch_model.bin"):
        save = save_file if form == "model.safetensors" else torch.save
        save(state, path / form)
        return
    kind = form.removesuffix(".index.json")
    save = save_file if kind == "model.safetensors" else torch.save
    stem, _, end = kind.partition(".")
    names = [f"{stem}-0000{i}-of-00002.{end}" for i in (1, 2)]
    parts = [dict([*state.items()][::2]), dict([*state.items()][1::2])]
    for name, part in zip(names, parts, strict=True):
        save(part, path / name)
    where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (path / form).write_text(json.dumps({"weight_map": where}))


FORMS = [
    f"{kind}{index}"
    for kind in ("model.safetensors", "pytorch_model.bin")
    for index in ("", ".index.json")
]


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_of_hugging_face_weights(tmp_path: Path, form: str) -> None:
    saved, loaded = MnistMLP(), MnistMLP()
    folder(tmp_path, form, saved.state_dict())
    load_weights(loaded, tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name])
    # What is hashed is what is loaded.
    before = file_checkpoint(str(tmp_path)).sha256
    part = weight_files(tmp_path)[-1]
    content = bytearray(part.read_bytes())
    content[-100] ^= 1
    part.write_bytes(content)
    assert file_checkpoint(str(tmp_path)).sha256 != before


def test_one_file_alone_is_the_folder_that_holds_it(tmp_path: Path) -> None:
    folder(tmp_path, "model.safetensors", MnistMLP().state_dict())
    inside = file_checkpoint(str(tmp_path / "model.safetensors"))
    assert file_checkpoint(str(tmp_path)).identity() == inside.identity()


@pytest.mark.parametrize("name", ["../weights.bin", "gone.bin"])
def test_an_index_leads_to_files_beside_it_only(tmp_path: Path, name: str) -> None:
    torch.save(MnistMLP().state_dict(), tmp_path / "weights.bin")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert f"lacks {name}, which pytorch_model.bin.index.json names" in refused(inner)
    (inner / "pytorch_model.bin.index.json").write_text("{")
    assert "has no weight_map" in refused(inner)


class Tied(nn.Module):
    """The name of each parameter begins with "model.", and one weight has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
        self.model["head"].weight = self.model["embed"].weight


def test_own_names_stay_and_a_tied_weight_needs_one_name(tmp_path: Path) -> None:
    saved, loaded, path = Tied(), Tied(), tmp_path / "weights.pt"
    state = saved.state_dict()
    del state["model.head.weight"]
    for prefix in ("", "model.", "module."):
        torch.save({prefix + name: tensor for name, tensor in state.items()}, path)
        nn.init.zeros_(loaded.model["embed"].weight)
        load_weights(loaded, path)
        assert torch.equal(loaded.model["embed"].weight, saved.model["embed"].weight)
    del state["model.embed.weight"]
    torch.save(state, path)
    assert "it lacks model.embed.weight, model.head.weight: name" in refused(path, loaded)


def sparse(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_sparse()


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (lambda t: t.to("meta"), "fc1.weight as a tensor without numbers (meta)"),
        (sparse, "fc1.weight as a sparse tensor"),
        (lambda t: t.to_sparse_csr(), "fc1.weight as a sparse tensor"),
        (quantized, "fc1.weight as a quantized tensor"),
        (lambda t: t + 1j, "complex numbers for real ones: fc1.weight"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_plain_numbers_are_refused(
    tmp_path: Path, other: Any, told: str
) -> None:
    state = MnistMLP().state_dict()
    state["fc1.weight"] = other(state["fc1.weight"])
    torch.save(state, tmp_path / "odd.pt")
    message = refused(tmp_path / "odd.pt")
    assert told in message or "is corrupted, truncated or holds more than tensors" in message


def test_an_index_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="has no weight_map: get it again"):
        weight_files(tmp_path)
