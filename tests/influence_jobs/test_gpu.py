"""What a GPU is told, and what it is asked, on a machine without one."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from influence_jobs.contract.trial import Trial
from influence_jobs.gpu import in_tf32, may_round, tf32
from influence_jobs.gradients import GradNorms, transforms
from influence_jobs.gradients.kinks import lies_at_a_kink
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.taps import TOLERANCE
from influence_jobs.gradients.transforms import all_derivatives, mappable_kernels
from influence_jobs.jobs.queries import query_gradients
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.layout import in_fast_layout
from influence_jobs.tasks.placement import converted
from influence_jobs.training.train import seeded

BACKENDS: Any = torch.backends
SETTINGS = {
    "all": BACKENDS,
    "products": BACKENDS.cuda.matmul,
    "cudnn": BACKENDS.cudnn,
    "convolutions": BACKENDS.cudnn.conv,
    "recurrence": BACKENDS.cudnn.rnn,
}
OLDER = {"products": BACKENDS.cuda.matmul, "cudnn": BACKENDS.cudnn}


def settings() -> dict[str, Any]:
    found = {name: one.fp32_precision for name, one in SETTINGS.items()}
    for name, one in OLDER.items():
        try:
            found[f"older, {name}"] = one.allow_tf32
        except RuntimeError:  # the two are at odds
            found[f"older, {name}"] = "at odds"
    return found | {"cudnn": (BACKENDS.cudnn.deterministic, BACKENDS.cudnn.benchmark)}


@pytest.fixture
def as_before() -> Iterator[None]:
    with tf32(False):  # which itself restores what there was
        generic, cudnn = BACKENDS.fp32_precision, BACKENDS.cudnn.fp32_precision
        yield
        BACKENDS.fp32_precision, BACKENDS.cudnn.fp32_precision = generic, cudnn


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("chosen", [*SETTINGS, *(f"older, {name}" for name in OLDER), "nothing"])
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_tf32_is_as_a_run_asks_whatever_torch_was_told(
    chosen: str, precision: str, allowed: bool
) -> None:
    if chosen.startswith("older"):
        OLDER[chosen.removeprefix("older, ")].allow_tf32 = precision == "tf32"
    elif chosen != "nothing":
        SETTINGS[chosen].fp32_precision = precision
    BACKENDS.cudnn.deterministic, BACKENDS.cudnn.benchmark = False, True
    before = settings()
    with tf32(allowed):
        now = settings()
        wanted = "tf32" if allowed else "ieee"
        for name in ("products", "convolutions", "recurrence"):
            assert now[name] == wanted
        assert now["older, products"] == now["older, cudnn"] == in_tf32() == allowed
        assert now["cudnn"] == (True, False)
    assert settings() == before


def test_generators_of_gpus_are_there_before_they_are_seeded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    monkeypatch.setattr(torch.cuda, "default_generators", ())

    def init() -> None:
        monkeypatch.setattr(torch.cuda, "default_generators", tuple(generators))

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for index, used in ((None, 1), (0, 0), (1, 1)):
        before = [one.get_state() for one in generators]
        with seeded(7, torch.device("cuda", index)):
            assert [one.initial_seed() == 7 for one in generators] == [i == used for i in range(2)]
        for one, state in zip(generators, before, strict=True):
            assert torch.equal(one.get_state(), state)


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module, *, packs: bool = False) -> None:
        super().__init__()
        self.layer, self.packs = layer, packs

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.LSTMCell):
            return self.layer(x[0])[1]  # type: ignore[no-any-return]
        if isinstance(self.layer, nn.GRUCell):
            return self.layer(x[0])  # type: ignore[no-any-return]
        found = self.layer(pack_padded_sequence(x, [4, 2]) if self.packs else x)[0]
        return found.data if self.packs else found  # type: ignore[no-any-return]


LAYERS = {
    "LSTM": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "LSTM, projected": lambda: nn.LSTM(3, 4, proj_size=2, bias=False),
    "LSTM, dropout": lambda: nn.LSTM(3, 4, num_layers=2, dropout=0.5),
    "GRU": lambda: nn.GRU(3, 4, num_layers=2, bidirectional=True),
    "GRU, no bias": lambda: nn.GRU(3, 4, bias=False),
    "LSTMCell": lambda: nn.LSTMCell(3, 4),
    "GRUCell": lambda: nn.GRUCell(3, 4, bias=False),
}


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_plain_operations_are_what_recurrent_layers_compute(
    name: str, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Recurrent(LAYERS[name](), packs=packs).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    taken: list[str] = []

    def noted(kind: str, formula: Any) -> Any:
        def call(*args: Any) -> Any:
            taken.append(kind)
            return formula(*args)

        return call

    for kind, formula in transforms._CELLS.items():
        monkeypatch.setitem(transforms._CELLS, kind, noted(kind, formula))
    for kind, both in transforms._LAYERS.items():
        monkeypatch.setitem(transforms._LAYERS, kind, [noted(kind, of) for of in both])
    monkeypatch.setattr(transforms, "_has_fused_cells", lambda tensor: True)
    for training, context in itertools.product((False, True), (all_derivatives, mappable_kernels)):
        model.train(training)
        torch.manual_seed(1)
        wanted = model(x)
        taken.clear()
        torch.manual_seed(1)
        with context(model):
            found = model(x)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        assert bool(taken) != (training and "dropout" in name)  # which the formulas leave out


class Watched(nn.Module):
    """Notes whether cuDNN is on, in which recurrent layers have no backward in eval mode."""

    seen: ClassVar[set[bool]] = set()  # of copies, too

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn = nn.Conv2d(1, 2, 3, padding=1), nn.GRU(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(bool(torch.backends.cudnn.enabled))
        found: Tensor = self.rnn(self.conv(x).flatten(1, 2))[0].sum((1, 2))
        return found


class Rows(Task):
    """Samples of a network whose outputs are its losses."""

    def __init__(self, network: Callable[[], nn.Module], x: Tensor) -> None:
        self.network, self.x = network, x

    def model(self) -> nn.Module:
        return self.network()

    def train_data(self) -> Tensor:
        return self.x

    def test_data(self) -> Tensor:
        return self.x

    def losses(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)  # type: ignore[no-any-return]


def test_gradients_in_eval_mode_are_taken_without_cudnn_where_layers_are_recurrent() -> None:
    x = torch.randn(6, 1, 4, 4)
    task, model = Rows(Watched, x), Watched().eval()
    queries = Queries(items=(Query(test=1),))
    assert torch.backends.cudnn.enabled
    for take in (
        lambda: lies_at_a_kink(model, task.losses, [*model.parameters()], x, 0, 6),
        lambda: query_gradients(task, model, ParameterSpace(model), queries, 0, 1),
        lambda: in_fast_layout(task, model),
        lambda: Trial(task, torch.device("cpu")).losses_B,
    ):
        Watched.seen.clear()
        take()
        assert Watched.seen == {False}


class Large(nn.Module):
    """Does not fit into memory in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        last = self.conv.weight.is_contiguous(memory_format=torch.channels_last)
        if self.conv.weight.dtype == torch.float64 or last:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        found: Tensor = self.conv(x).flatten(1).sum(1)
        return found


def test_what_does_not_fit_is_not_taken_for_another_fault() -> None:
    x = torch.randn(6, 2, 4, 4)
    task, model = Rows(Large, x), Large().eval()
    for take in (
        lambda: lies_at_a_kink(model, task.losses, [*model.parameters()], x, 0, 6),
        lambda: query_gradients(
            task, model, ParameterSpace(model), Queries(items=(Query(test=1),)), 0, 1
        ),
        lambda: in_fast_layout(task, model),
        lambda: converted(task, torch.device("cpu"), torch.float64),
    ):
        with pytest.raises(torch.OutOfMemoryError):
            take()


@pytest.mark.usefixtures("as_before")
def test_checks_bear_the_rounding_that_torch_does_by_itself() -> None:
    """By default convolutions of a GPU are rounded; those of runs are not."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not may_round(cuda)
    with tf32(True):
        assert may_round(cuda)
        assert not may_round(cpu)
    SETTINGS["convolutions"].fp32_precision = "tf32"
    assert may_round(cuda)
    assert not in_tf32()
    model = nn.Linear(2, 1).eval()
    with GradNorms(model, [""], lambda model, x: model(x)[:, 0], reduction="layer") as engine:
        assert engine._tolerance == TOLERANCE["float32"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GradNorms, "_device", cuda)
            assert engine._tolerance == TOLERANCE["tf32"]
