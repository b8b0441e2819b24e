"""In-training norms recorded in loops of others: those that our own training records."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from influence_jobs.errors import DataError, ModelError
from influence_jobs.models.checkpoints import load_weights
from influence_jobs.tasks.base import Draw
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.recorded_norms import RecordedNorms
from influence_jobs.training.recorder import Recorder
from influence_jobs.training.train import Trainer, epoch_order

from .ensembles import CPU, N, Points, convnet, recipe

LAYERS = ("0", "4")
TASK = Points(convnet)
SGD = recipe("sgd", 6, lr=0.1, clip_norm=0.5)  # 15 batches in an epoch


class InOrder(torch.utils.data.Sampler[int]):
    """The samples in the order of our own training."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1  # before: not everyone asks for what follows the last sample
        yield from epoch_order(N, 0, self.epoch - 1).tolist()

    def __len__(self) -> int:
        return N


DATA = TensorDataset(torch.arange(N), *TASK.batch(torch.arange(N), Draw(0)))


def loader(batch_size: int = 6) -> DataLoader[Any]:
    return DataLoader(DATA, batch_size, sampler=InOrder())


def first_model() -> nn.Module:
    torch.manual_seed(0)
    return TASK.model().train()


def ours(how: Recipe, skip_epochs: int = 1, reduction: Any = "channel") -> Trainer:
    norms = RecordedNorms(TASK.model(), LAYERS, N, reduction=reduction, skip_epochs=skip_epochs)
    trainer = Trainer(TASK, how, seed=0, device=CPU, norms=norms)
    while not trainer.finished:
        trainer.step()
    return trainer


def assert_recorded(recorder: Recorder, folder: Path, trainer: Trainer, epochs: int = 3) -> None:
    """Norms in memory and on disk, and the weights after every epoch."""
    assert trainer.norms is not None
    stored = np.load(folder / "norms.npz")
    assert set(stored) == set(LAYERS)
    for layer, expected in trainer.norms.sums.items():
        assert expected.any()
        torch.testing.assert_close(recorder.norms.sums[layer], expected, rtol=1e-5, atol=1e-7)
        assert np.array_equal(stored[layer], recorder.norms.sums[layer])
    names = [f"epoch-{epoch:04d}.pt" for epoch in range(1, epochs + 1)]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "norms.npz", "recorded.json"]
    model = TASK.model()
    load_weights(model, folder / names[-1])
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-7, atol=1e-9)


def plain_loop(recorder: Recorder, model: nn.Module, batches: Any, epochs: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(epochs):
        for ids, x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            recorder.step(ids)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        recorder.end_epoch()


@pytest.mark.parametrize("reduction", ["kernel", "channel", "layer"])
@pytest.mark.parametrize("skip_epochs", [0, 1])
def test_in_a_plain_loop(tmp_path: Path, skip_epochs: int, reduction: Any) -> None:
    model = first_model()
    recorder = Recorder(
        model, N, layers=LAYERS, folder=tmp_path / "a" / "b", reduction=reduction,
        skip_epochs=skip_epochs,
    )  # fmt: skip
    plain_loop(recorder, model, loader())
    assert_recorded(recorder, tmp_path / "a" / "b", ours(SGD, skip_epochs, reduction))


def test_it_goes_on_where_a_training_was_stopped(tmp_path: Path) -> None:
    model, batches = first_model(), loader()
    first = Recorder(model, N, layers=LAYERS, folder=tmp_path, save_epochs=(1, 3))
    plain_loop(first, model, batches, epochs=2)
    torch.save(first.state_dict(), tmp_path / "state")
    second = Recorder(model, N, layers=LAYERS, folder=tmp_path, save_epochs=(1, 3))
    second.load_state_dict(torch.load(tmp_path / "state"))
    (tmp_path / "state").unlink()
    plain_loop(second, model, batches, epochs=1)
    assert second.steps == 45
    (tmp_path / "epoch-0002.pt").touch()  # which is not kept
    assert_recorded(second, tmp_path, ours(SGD))
    assert (tmp_path / "epoch-0002.pt").stat().st_size == 0


def test_a_sample_that_a_batch_has_twice_counts_twice(tmp_path: Path) -> None:
    model = first_model()
    recorder = Recorder(model, N, layers=["4"], folder=tmp_path, skip_epochs=0)
    TASK.losses(model, TASK.batch(torch.tensor([3, 5, 3]), Draw(0))).mean().backward()
    recorder.step([3, 5, 3])
    sums = recorder.norms.sums["4"]
    assert torch.equal(sums[3], 2 * sums[5])
    assert int(sums.any(1).sum()) == 2


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        (torch.tensor([0, N]), "from 0 to 90: positions in the training set are from 0 to 89"),
        ([-1, 3], "from -1 to 3: positions"),
        (torch.tensor([[1, 2]]), r"have shape \(1, 2\) and are torch.int64: give one whole number"),
        (np.array([0.5]), r"have shape \(1,\) and are torch.float64: give"),
        (torch.ones(90, dtype=torch.bool), "are torch.bool: give"),
    ],
)
def test_ids_that_are_none_are_refused(tmp_path: Path, ids: Any, told: str) -> None:
    recorder = Recorder(first_model(), N, layers=LAYERS, folder=tmp_path)
    with pytest.raises(DataError, match=told):
        recorder.step(ids)


def test_what_cannot_be_recorded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(first_model(), N, layers=LAYERS, folder=tmp_path, skip_epochs=0)
    with pytest.raises(ModelError, match=r"layer '0' has no gradient to record.* backward\(\) and"):
        recorder.step([1])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(ModelError, match="has 4 processes or devices, each with samples of its"):
        Recorder(first_model(), N, layers=LAYERS, folder=tmp_path)


class Classifier(nn.Module):
    """As transformers has them: keyword arguments, and a dict with the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = first_model()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, column: str = "sample"):
        self._column = column

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids, x, y = DATA[i]
        return {self._column: ids, "x": x, "labels": y}


@pytest.fixture
def hugging_face(tmp_path: Path) -> Callable[..., Any]:
    """Makes a Trainer of transformers, with our order of samples, on one CPU."""
    transformers: Any = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class OurOrder(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return InOrder()

        def create_optimizer(self, *_: Any) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
            return self.optimizer

    def make(callback: Any, model: Any, data: Any = None, **options: Any) -> Any:
        chosen = {
            "per_device_train_batch_size": 6, "num_train_epochs": 3, "max_grad_norm": 0.5,
            "lr_scheduler_type": "constant", "remove_unused_columns": False, "use_cpu": True,
            "report_to": [], "save_strategy": "no", "disable_tqdm": True,
            "dataloader_drop_last": False,
        }  # fmt: skip
        args = transformers.TrainingArguments(tmp_path / "out", **(chosen | options))
        return OurOrder(model, args, train_dataset=data or Rows(), callbacks=[callback])

    return make


@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_the_trainer_of_transformers(tmp_path: Path, hugging_face: Any, accumulate: int) -> None:
    from influence_jobs.training.hugging_face import HuggingFaceRecorder

    model, folder = Classifier(), tmp_path / "recorded"
    recorder = Recorder(model.net, N, layers=LAYERS, folder=folder)
    whole = Recorder(model, N, layers=["net.0", "net.4"], folder=tmp_path / "whole")
    trainer = hugging_face(
        HuggingFaceRecorder(whole), model, per_device_train_batch_size=6 // accumulate,
        gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    trainer.train()
    assert whole.steps == 45
    for layer in LAYERS:  # as if the network alone had been recorded
        recorder.norms.sums[layer].copy_(whole.norms.sums[f"net.{layer}"])
    recorder.epoch = 2
    recorder.end_epoch()
    for epoch in (1, 2):
        (folder / f"epoch-000{epoch}.pt").touch()
    if accumulate == 1:
        assert_recorded(recorder, folder, ours(SGD))
    else:  # BatchNorm sees half batches
        assert all(sums.all(0).any() for sums in recorder.norms.sums.values())
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("column", "options", "told"),
    [
        ("number", {}, "a batch has no 'sample': give every row of the training set its position"),
        ("sample", {"fp16": True}, "fp16 training scales"),
    ],
)
def test_transformers_without_ids_or_with_scaled_gradients(
    tmp_path: Path, hugging_face: Any, monkeypatch: Any, column: str, options: Any, told: str
) -> None:
    from influence_jobs.training.hugging_face import HuggingFaceRecorder

    model = Classifier()
    recorder = Recorder(model, N, layers=["net.0"], folder=tmp_path)
    trainer = hugging_face(HuggingFaceRecorder(recorder), model, Rows(column))
    for name, value in options.items():
        monkeypatch.setattr(trainer.args, name, value)
    with pytest.raises((DataError, ModelError), match=told):
        trainer.train()


def test_transformers_with_another_model_or_a_resumed_training(
    tmp_path: Path, hugging_face: Any
) -> None:
    from influence_jobs.training.hugging_face import HuggingFaceRecorder

    recorder = Recorder(Classifier(), N, layers=["net.0"], folder=tmp_path, skip_epochs=0)
    inner: Any = Classifier()
    inner.forward = lambda x, labels, sample: Classifier.forward(inner, x, labels)
    with pytest.raises(ModelError, match="that the Trainer trains is not the recorder's"):
        hugging_face(HuggingFaceRecorder(recorder), inner).train()
    recorder.steps = 7
    with pytest.raises(ModelError, match="goes on after step 0, but the recorder has seen 7"):
        hugging_face(HuggingFaceRecorder(recorder), recorder.model).train()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_lightning(tmp_path: Path, accumulate: int) -> None:
    lightning: Any = pytest.importorskip("lightning")
    from influence_jobs.training.lightning import LightningRecorder

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = first_model()

        def training_step(self, batch: Any, _: int) -> Tensor:
            _, x, y = batch
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    module, folder = Module(), tmp_path / "recorded"
    recorder = Recorder(module.net, N, layers=LAYERS, folder=folder)
    options: Any = {
        "max_epochs": 3, "accelerator": "cpu", "gradient_clip_val": 0.5, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False,
        "default_root_dir": tmp_path, "accumulate_grad_batches": accumulate,
    }  # fmt: skip
    callback = LightningRecorder(recorder, ids=lambda batch: batch[0])
    trainer = lightning.Trainer(**options, callbacks=[callback], enable_checkpointing=False)
    trainer.fit(module, loader(6 // accumulate))
    assert recorder.steps == 45
    if accumulate == 1:
        assert_recorded(recorder, folder, ours(SGD))
    trainer.save_checkpoint(tmp_path / "at.ckpt")
    again = Recorder(module.net, N, layers=LAYERS, folder=folder)
    state = torch.load(tmp_path / "at.ckpt", weights_only=False)["callbacks"]["LightningRecorder"]
    LightningRecorder(again, ids=lambda batch: batch[0]).load_state_dict(state)
    assert torch.equal(again.norms.sums["0"], recorder.norms.sums["0"])
    assert (again.epoch, again.steps) == (3, 45)


def test_the_library_imports_neither_of_them() -> None:
    code = (
        "import sys, influence_jobs; influence_jobs.Recorder; "
        "print({'lightning', 'transformers'} & sys.modules.keys())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "set()\n"


def test_lightning_with_several_optimizers_or_steps(tmp_path: Path) -> None:
    lightning: Any = pytest.importorskip("lightning")
    from influence_jobs.training.lightning import LightningRecorder

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self, optimizers: int) -> None:
            super().__init__()
            self.net, self._count = first_model(), optimizers
            self.automatic_optimization = False

        def training_step(self, batch: Any, _: int) -> None:
            _, x, y = batch
            for _ in range(2):
                self.manual_backward(F.cross_entropy(self.net(x), y))
                self.optimizers().step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(self._count)]

    for optimizers, told in ((2, "has 2 optimizers"), (1, "several steps on one batch")):
        module = Module(optimizers)
        recorder = Recorder(module.net, N, layers=LAYERS, folder=tmp_path)
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
            callbacks=[LightningRecorder(recorder, ids=lambda batch: batch[0])],
        )  # fmt: skip
        with pytest.raises(ModelError, match=told):
            trainer.fit(module, loader())
