"""Norms and dot products of what has no rule, each form of the fallback against plain autograd."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import weight_norm as old_weight_norm
from torch.utils import _pytree as pytree

from influence_jobs.errors import ModelError
from influence_jobs.gradients import GradDots, GradNorms, GradProjections, ParameterSpace
from influence_jobs.gradients.fallback import slow_lines
from influence_jobs.gradients.projections import projections
from influence_jobs.gradients.reference import gradients_one_by_one
from influence_jobs.gradients.weights import weight_named

B = 5


class Case(NamedTuple):
    """A model, and by name of a weight without a rule the form that serves it."""

    model: nn.Module
    forms: dict[str, str]
    x: Any


def losses(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.rnn = kind(6, 4, **options)
        self.head = nn.Linear(8 if self.rnn.bidirectional else 4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.rnn.batch_first:
            return self.head(self.rnn(x)[0].mean(1))
        return self.head(self.rnn(x.transpose(0, 1))[0][-1])


class Vision(nn.Module):
    """Attention, and parameters of the model itself, one of them a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.heat = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.layer(x)[:, 0]) * self.heat


class Scaled(nn.Module):
    """A layer of one's own: keywords, two weights, and an output that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 5))
        self.scale = nn.Parameter(torch.randn(5))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, *, x: Tensor, by: float) -> dict[str, Any]:
        return {"y": by * (x @ self.matrix) * self.scale + self.bias, "unused": x * self.scale[0]}


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Scaled(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x=x, by=0.7)["y"].relu_())


class Shared(nn.Module):
    """Tied weights, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 9, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).mean(1)
        return self.out(torch.tanh(self.middle(torch.tanh(self.middle(x)))))


class Stored(nn.Module):
    """Uses weights through a list, which no mapping over the model reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.held = list(self.head.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.body(x)), *self.held)


class Packed(Recurrent):
    """Samples and steps lie on one axis."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        lengths = torch.full((len(ids),), ids.shape[1])
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(ids), lengths, batch_first=True)
        return self.head(self.rnn(packed)[1][0][-1])


def pruned() -> nn.Module:
    layer = nn.Linear(6, 5)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3))


def normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old form is still in use
        old = old_weight_norm(nn.Linear(5, 3))
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 5)),
        nn.Tanh(),
        parametrizations.spectral_norm(nn.Linear(5, 5)),
        old,
    )


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked() -> nn.Module:
    """A layer without a rule whose hooks change what goes in and out."""
    layer = Doubled(6, 3)
    layer.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    layer.register_forward_hook(lambda module, args, output: output * 3)
    return nn.Sequential(nn.Sequential(layer))


class Distances(nn.Module):
    """A bias by distance, which all samples share: (T, T), without an axis for them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20))

    def forward(self, steps: int) -> Tensor:
        at = torch.arange(steps)
        return self.weight[(at[:, None] - at).abs()] * self.weight[0]


class Positions(nn.Module):
    """Positions are embedded once, as (1, T, D), and broadcast after a layer with a rule.

    Args:
        axis: That a tensor which all samples share is normed along.
    """

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.words, self.places = nn.Embedding(9, 8), nn.Embedding(20, 8)
        self.distances, self.mixed, self.head = Distances(), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.mixed(self.places(torch.arange(ids.shape[1])[None]).sin())
        weights = self.distances(ids.shape[1]).softmax(self.axis)
        return self.head((weights @ x.tanh()).mean(1))


def gates(layers: int = 1, directions: int = 1) -> dict[str, str]:
    return {
        f"rnn.weight_{kind}_l{layer}{end}": "layer"
        for layer in range(layers)
        for end in ("", "_reverse")[:directions]
        for kind in ("ih", "hh")
    }


def ids() -> Tensor:
    return torch.randint(9, (B, B))  # as many steps as samples


CASES: dict[str, Callable[[], Case]] = {
    "lstm": lambda: Case(Recurrent(nn.LSTM, batch_first=True), gates(), ids()),
    "gru": lambda: Case(Recurrent(nn.GRU, batch_first=True), gates(), ids()),
    "rnn, steps first": lambda: Case(Recurrent(nn.RNN), gates(), ids()),
    "lstm, deep and both ways": lambda: Case(
        Recurrent(nn.LSTM, batch_first=True, num_layers=2, bidirectional=True), gates(2, 2), ids()
    ),
    "packed": lambda: Case(Packed(), dict.fromkeys(gates(), "sample"), ids()),
    "vision": lambda: Case(
        Vision(),
        {
            "cls_token": "model",
            "heat": "model",
            "attention": "layer",
            "attention.out_proj": "layer",
            "layer.self_attn": "layer",
            "layer.self_attn.out_proj": "layer",
        },
        torch.randn(B, B, 8),
    ),
    "custom": lambda: Case(
        Custom(), {"inner.matrix": "layer", "inner.scale": "layer"}, torch.randn(B, 6)
    ),
    "shared": lambda: Case(Shared(), {"embed": "rules", "middle": "rules"}, ids()),
    "stored": lambda: Case(Stored(), {"head": "sample"}, torch.randn(B, 6)),
    "pruned": lambda: Case(pruned(), {"0": "layer"}, torch.randn(B, 6)),
    "normed": lambda: Case(
        normed(),
        {
            "0.parametrizations.weight.original0": "layer",
            "0.parametrizations.weight.original1": "layer",
            "2.parametrizations.weight": "layer",
            "3.weight_g": "layer",
            "3.weight_v": "layer",
        },
        torch.randn(B, 6),
    ),
    "positions": lambda: Case(
        Positions(-1),
        {"words": "rules", "places": "layer", "distances": "layer", "mixed": "layer"},
        ids(),
    ),
    # With an axis for the samples, this axis is another.
    "positions, axes by number": lambda: Case(
        Positions(1),
        {"words": "rules", "places": "layer", "distances": "model", "mixed": "layer"},
        ids(),
    ),
    "hooked": lambda: Case(hooked(), {"0.0": "layer"}, torch.randn(B, 6)),
}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(1)
    made = CASES[request.param]()
    made.model.eval()
    return made


def batch_of(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    batch = {"x": case.x, "y": torch.tensor([0, 2, 1, 1, 0]), "name": "a batch"}
    return pytree.tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, batch
    )


def expected(case: Case, reduction: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    weights = {name: weight_named(case.model, name) for name in case.forms}
    parameters = [weight.parameter for weight in weights.values()]
    gradients = gradients_one_by_one(case.model, parameters, losses, batch_of(case, dtype))
    return {
        name: weight.norms(gradients[weight.parameter], reduction)
        for name, weight in weights.items()
    }


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    assert list(found) == list(wanted)
    for name, norms in wanted.items():
        assert (found[name] - norms).abs().max() <= bound * norms.max(), name


def cut(batch: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {**batch, "x": batch["x"][rows], "y": batch["y"][rows]}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("reduction", ["kernel", "layer"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_norms(case: Case, precision: Any, reduction: Any) -> None:
    dtype, bound = {"float32": (torch.float32, 1e-5), "float64": (torch.float64, 1e-10)}[precision]
    case.model.to(dtype)
    batch, wanted = batch_of(case, dtype), expected(case, reduction, dtype)
    with GradNorms(
        case.model, [*case.forms], losses, reduction=reduction, precision=precision
    ) as engine:
        alone = engine(cut(batch, slice(1, 2)))  # before any form is found
        assert_close(alone, {name: norms[1:2] for name, norms in wanted.items()}, bound)
        assert_close(engine(batch), wanted, bound)
        engine.check(batch)
        slow = {name: form for name, form in case.forms.items() if form != "rules"}
        assert {name: form for name, (form, _) in engine.slow_layers(batch).items()} == slow
        three = engine(cut(batch, slice(0, 3)))
        assert_close(three, {name: norms[:3] for name, norms in wanted.items()}, bound)
        assert not any(p.requires_grad for p in case.model.parameters())
    assert all(p.requires_grad for p in case.model.parameters() if p.is_floating_point())
    assert torch.backends.mkldnn.enabled
    assert torch.backends.cudnn.enabled


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_blocks_of_samples_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_by_one(samples: int, parameters: Any) -> Any:
        yield from (slice(i, i + 1) for i in range(samples))

    for module in ("fallback", "recorded_call"):
        monkeypatch.setattr(f"influence_jobs.gradients.{module}.sample_blocks", one_by_one)
    with GradNorms(case.model, [*case.forms], losses, reduction="layer") as engine:
        assert_close(engine(batch_of(case)), expected(case, "layer"), 1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_mixed_precision(case: Case) -> None:
    with GradNorms(
        case.model, [*case.forms], losses, reduction="layer", precision="bfloat16"
    ) as engine:
        try:
            found = engine(batch_of(case))
        except ModelError as error:
            if "does not run in bfloat16 on cpu" not in str(error):
                raise
            pytest.skip("this processor has no LSTM in bfloat16")
        engine.check(batch_of(case))
    assert all(norms.dtype == torch.float32 for norms in found.values())
    assert_close(found, expected(case, "layer"), 5e-2)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dot_products_of_all_parameters(case: Case) -> None:
    torch.manual_seed(2)
    space = ParameterSpace(case.model)
    v_QP = torch.randn(3, space.size)
    gradients = gradients_one_by_one(case.model, [*space.shapes], losses, batch_of(case))
    wanted = space.join(gradients) @ v_QP.double().t()
    with GradDots(case.model, space, losses, v_QP) as engine:
        found = engine.total(batch_of(case))
        assert ((found - wanted).abs() <= 1e-5 * wanted.abs().max()).all()
        parts = engine(batch_of(case))
        engine.check(batch_of(case))
    assert list(parts) == list(space.groups)
    torch.testing.assert_close(sum(parts.values()), found, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("whole", [False, True])
def test_projections_of_all_parameters(case: Case, whole: bool) -> None:
    case.model.double()
    batch, space = batch_of(case, torch.float64), ParameterSpace(case.model)
    gradients = gradients_one_by_one(case.model, [*space.shapes], losses, batch)
    maps = projections(
        case.model, space, outputs=3, inputs=2, distribution="rademacher", seed=0, whole=whole
    )
    with GradProjections(case.model, space, losses, maps, precision="float64") as engine:
        alone = engine(cut(batch, slice(1, 2)))  # before any form is found
        found = engine(batch)
        engine.check(batch)
    for group, of_group in maps.items():
        parts = [
            of_one.to(torch.device("cpu"), torch.float64)(gradients[name])
            for name, of_one in of_group.items()
        ]
        wanted = torch.stack(parts).sum(0).flatten(1)
        torch.testing.assert_close(found[group], wanted, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(alone[group], wanted[1:2], rtol=1e-9, atol=1e-11)


class NoForwardMode(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


class Backward(nn.Module):
    """Has no forward mode, and can be mapped."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.head = nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(NoForwardMode.apply(x * self.shift))


def test_dot_products_without_forward_mode_are_mapped() -> None:
    torch.manual_seed(0)
    case = Case(Backward().eval(), {}, torch.randn(B, 6))
    space = ParameterSpace(case.model)
    v_QP = torch.randn(3, space.size)
    gradients = gradients_one_by_one(case.model, [*space.shapes], losses, batch_of(case))
    with GradDots(case.model, space, losses, v_QP) as engine:
        with pytest.warns(UserWarning, match="'shift' .* all samples mapped, which is slow"):
            found = engine.total(batch_of(case))
        engine.check(batch_of(case))
    wanted = space.join(gradients) @ v_QP.double().t()
    assert ((found - wanted).abs() <= 1e-5 * wanted.abs().max()).all()


def test_what_is_told() -> None:
    case = CASES["vision"]()
    case.model.eval()
    with GradNorms(case.model, ["cls_token", "heat"], losses, reduction="layer") as engine:
        (line,) = slow_lines(engine.slow_layers(batch_of(case)))
    assert line.startswith(
        "gradients without a rule are computed mapped over the samples through the whole model"
    )
    assert line.endswith(
        ": cls_token (no rule for cls_token of Vision); heat (no rule for heat of Vision)"
    )


def test_both_names_of_a_shared_weight_are_accepted() -> None:
    case = CASES["shared"]()
    case.model.eval()
    with GradNorms(case.model, ["embed", "out"], losses, reduction="layer") as engine:
        found = engine(batch_of(case))
    assert torch.equal(found["embed"], found["out"])


class Weighted(nn.Module):
    """A scale of the model's own, and losses with a tensor that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.scale)


@pytest.mark.parametrize(("samples", "steps"), [(3, B), (B, 2), (1, 9), (B + 2, 1)])
@pytest.mark.parametrize("name", ["positions", "positions, axes by number"])
def test_what_all_samples_share_in_other_batches(name: str, samples: int, steps: int) -> None:
    torch.manual_seed(1)
    case = CASES[name]()
    case.model.double().eval()
    space = ParameterSpace(case.model)
    other = {"x": torch.randint(9, (samples, steps)), "y": torch.arange(samples) % 3, "name": ""}
    maps = projections(
        case.model, space, outputs=3, inputs=2, distribution="gaussian", seed=0, whole=True
    )
    with GradProjections(case.model, space, losses, maps, precision="float64") as engine:
        engine(batch_of(case, torch.float64))
        (found,) = engine(other).values()
    wanted = gradients_one_by_one(case.model, [*space.shapes], losses, other)
    ((_, group),) = maps.items()
    parts = [p.to(torch.device("cpu"), torch.float64)(wanted[n]) for n, p in group.items()]
    torch.testing.assert_close(found, torch.stack(parts).sum(0).flatten(1))


def test_a_shared_tensor_as_long_as_a_batch() -> None:
    """Three class weights are no samples in a later batch of three, and refused in the first."""

    def weighted(model: nn.Module, batch: Any) -> Tensor:
        x, y, weight = batch
        return F.cross_entropy(model(x), y, weight=weight, reduction="none")

    torch.manual_seed(0)
    model, weight = Weighted().eval(), torch.tensor([1.0, 4.0, 0.5])
    x, y = torch.randn(B, 6), torch.tensor([0, 2, 1, 1, 0])
    with GradNorms(model, ["scale"], weighted, reduction="layer") as engine:
        whole = engine((x, y, weight))["scale"]
        torch.testing.assert_close(engine((x[:3], y[:3], weight))["scale"], whole[:3])
    with (
        GradNorms(model, ["scale"], weighted, reduction="layer") as engine,
        pytest.raises((ModelError, RuntimeError)),
    ):
        engine((x[:3], y[:3], weight))


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        return x - x.mean(0)


@pytest.mark.parametrize("divided", [False, True])
def test_losses_that_depend_on_the_batch_are_refused(divided: bool) -> None:
    def divide(model: nn.Module, x: Tensor) -> Tensor:
        return (x * model.scale).sum(1) / len(x)

    def mix(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum(1)

    with (
        GradNorms(Mixing().eval(), ["scale"], divide if divided else mix, reduction="layer") as e,
        pytest.raises(
            ModelError, match="losses.. divides by" if divided else "a sample's loss is 0"
        ),
    ):
        e(torch.randn(B, 6))


class Changing(nn.Module):
    """Calls its layer twice for longer inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Doubled(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x[:, 0])
        return self.layer(y) if x.shape[1] > 1 else y


def test_a_layer_that_is_called_otherwise_later_is_refused() -> None:
    def sums(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum(1)

    with GradNorms(Changing().eval(), ["layer"], sums, reduction="layer") as engine:
        engine(torch.randn(B, 1, 6))
        with pytest.raises(ModelError, match="layer 'layer' is called 2 times in a forward"):
            engine(torch.randn(B, 2, 6))


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), Doubled(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.second(h)
        h.relu_()  # what `second` saw
        return y


def test_an_overwritten_input_goes_another_way() -> None:
    """Plain autograd refuses it as well, where the weight is trained; nothing wrong comes out."""
    with (
        GradNorms(
            Overwriting().eval(), ["second"], lambda m, x: m(x).sum(1), reduction="layer"
        ) as e,
        pytest.raises((ModelError, RuntimeError), match=r"overwritten|inplace operation"),
    ):
        e(torch.randn(B, 6))
