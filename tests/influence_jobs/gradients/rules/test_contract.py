"""What every rule promises: the registered rules, and two that this file defines."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.utils.parametrizations import weight_norm

from influence_jobs.curvature import EkFac, GaussNewton
from influence_jobs.errors import ModelError
from influence_jobs.gradients import (
    GradDots,
    GradNorms,
    GradProjections,
    GradQuadratics,
    LayerRule,
    MatrixRule,
    Metric,
    ParameterSpace,
    norm_shape,
    reduce_gradient,
    require_supported,
    supported,
)
from influence_jobs.gradients.layer_table import layers_page
from influence_jobs.gradients.projections import Projection, projected_size, projections
from influence_jobs.gradients.reference import gradients_one_by_one, per_sample_gradients
from influence_jobs.gradients.rules import base, blocks, conv, linear, registered, rule_of
from influence_jobs.jobs.norm_arrays import norm_layouts
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.layers import resolve_weights, weight_layers
from influence_jobs.terms import Reduction

LAMBDA = 0.1
DOCS = Path(__file__).parents[4] / "docs" / "layers.md"


class Conv1D(nn.Module):
    """As transformers defines it, under its name; its package need not be there."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def paired(layer: nn.Bilinear) -> nn.Bilinear:
    """A layer of two inputs that makes the second from the first."""
    layer.register_forward_pre_hook(
        lambda module, args: (args[0][..., : module.in1_features], args[0].sin())
    )
    return layer


# Layers of every type with a rule, and the shape of one sample; an int is a number of ids.
EXAMPLES: dict[type[nn.Module], list[tuple[nn.Module, tuple[int, ...]]]] = {
    nn.Linear: [
        (nn.Linear(5, 3), (5,)),
        (nn.Linear(3, 5, bias=False), (4, 3)),
        (nn.Linear(5, 3), (2, 3, 5)),
    ],
    nn.Conv1d: [
        (nn.Conv1d(3, 4, 3, padding=1, dilation=2, stride=2), (3, 8)),
        (nn.Conv1d(4, 6, 2, stride=2, dilation=2, groups=2, bias=False), (4, 9)),
    ],
    nn.Conv2d: [
        (nn.Conv2d(3, 4, (3, 2), padding=(2, 1), dilation=(2, 1), stride=(1, 2)), (3, 4, 5)),
        (nn.Conv2d(4, 6, 3, stride=(1, 2), groups=2, bias=False), (4, 5, 6)),
    ],
    nn.BatchNorm1d: [(nn.BatchNorm1d(4, eps=0.1), (4,)), (nn.BatchNorm1d(4), (4, 6))],
    nn.BatchNorm2d: [(nn.BatchNorm2d(3, eps=0.1), (3, 4, 2))],
    nn.Conv3d: [
        (nn.Conv3d(2, 3, (2, 1, 3), padding=(1, 0, 2), stride=(2, 1, 1)), (2, 4, 3, 4)),
        (nn.Conv3d(4, 2, 2, dilation=(1, 2, 1), groups=2, bias=False), (4, 3, 4, 3)),
    ],
    nn.ConvTranspose1d: [
        (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 5)),
    ],
    nn.ConvTranspose2d: [
        (nn.ConvTranspose2d(3, 2, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2)), (3, 4, 5)),
        (nn.ConvTranspose2d(4, 2, 2, stride=2, groups=2, bias=False), (4, 2, 3)),
    ],
    nn.ConvTranspose3d: [(nn.ConvTranspose3d(2, 3, (2, 1, 2), stride=2), (2, 2, 3, 2))],
    nn.BatchNorm3d: [(nn.BatchNorm3d(3, eps=0.1), (3, 2, 2, 3))],
    nn.InstanceNorm1d: [(nn.InstanceNorm1d(3, affine=True), (3, 6))],
    nn.InstanceNorm2d: [
        (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (3, 4, 2)),
        (nn.InstanceNorm2d(3, affine=True, eps=0.1), (3, 4, 2)),
    ],
    nn.InstanceNorm3d: [(nn.InstanceNorm3d(2, affine=True), (2, 3, 2, 2))],
    nn.RMSNorm: [(nn.RMSNorm(3), (4, 3)), (nn.RMSNorm((4, 3), eps=0.1), (2, 4, 3))],
    nn.PReLU: [(nn.PReLU(3), (3, 4)), (nn.PReLU(), (3, 4, 2)), (nn.PReLU(5), (5,))],
    nn.Bilinear: [
        (paired(nn.Bilinear(5, 5, 3)), (5,)),
        (paired(nn.Bilinear(2, 4, 3, bias=False)), (3, 4)),
    ],
    nn.EmbeddingBag: [
        (nn.EmbeddingBag(5, 3, mode="sum"), (4,)),
        (nn.EmbeddingBag(5, 3, mode="mean", padding_idx=1), (6,)),
    ],
    Conv1D: [(Conv1D(3, 5), (5,)), (Conv1D(3, 5), (4, 5))],
    nn.GroupNorm: [(nn.GroupNorm(2, 6), (6,)), (nn.GroupNorm(3, 6, eps=0.1), (6, 2, 3))],
    nn.LayerNorm: [(nn.LayerNorm(3), (4, 3)), (nn.LayerNorm((4, 3), bias=False), (2, 4, 3))],
    nn.Embedding: [(nn.Embedding(5, 3), ()), (nn.Embedding(5, 3, padding_idx=1), (4, 2))],
}
# Matrix layers that see one position: only then is a squared error's curvature a Kronecker product.
ONE_POSITION: dict[type[nn.Module], tuple[nn.Module, tuple[int, ...]]] = {
    nn.Linear: (nn.Linear(4, 2), (4,)),
    nn.Conv1d: (nn.Conv1d(2, 2, 3), (2, 3)),
    nn.Conv2d: (nn.Conv2d(1, 2, (2, 3)), (1, 2, 3)),
    nn.Conv3d: (nn.Conv3d(1, 2, (2, 1, 2)), (1, 2, 1, 2)),
    Conv1D: (Conv1D(2, 4), (4,)),
}
CASES = [(layer, shape) for examples in EXAMPLES.values() for layer, shape in examples]
MATRIX_CASES = [(layer, shape) for layer, shape in CASES if type(layer) in ONE_POSITION]


def names(value: Any) -> str:
    return type(value).__name__ if isinstance(value, nn.Module) else str(value)


def weighted_sum(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, weights = batch
    return (model(x).sin() * weights).flatten(1).sum(1)


def prepared(layer: nn.Module, shape: tuple[int, ...], rows: int = 4) -> tuple[nn.Module, Any]:
    """A model of one float64 copy of a layer, and a batch with random weights of its outputs."""
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    for name, buffer in layer.named_buffers():
        if name == "running_mean":
            nn.init.normal_(buffer)
        if name == "running_var":
            nn.init.uniform_(buffer, 0.5, 2)
    model = nn.Sequential(layer).eval()
    x = torch.randn(rows, *shape, dtype=torch.float64)
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        x = torch.randint(0, layer.num_embeddings, (rows, *shape))
    return model, (x, torch.randn_like(model(x)))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def seen(model: nn.Module, batch: Any) -> tuple[LayerRule[Any], Tensor, Tensor, Tensor]:
    """The rule of the model's one layer, what it records of a call, the output, its gradient."""
    x, weights = batch
    rule, recorded = rule_of(model[0]), []
    hook = model[0].register_forward_hook(
        lambda module, args, kwargs, y: recorded.append(rule.recorded(args, kwargs)),
        with_kwargs=True,
    )
    y = model(x)
    hook.remove()
    return rule, recorded[0], y, torch.autograd.grad((y.sin() * weights).sum(), y)[0]


def check_norms(model: nn.Module, batch: Any) -> None:
    (gradient,) = per_sample_gradients(model, ["0"], weighted_sum, batch).values()
    kernel = as_read(model[0], gradient).norm(dim=2)
    channel, layer = kernel.reshape(*kernel.shape[:2], -1).sum(2), gradient.flatten(1).norm(dim=1)
    expected_by: dict[Reduction, Tensor] = {"kernel": kernel, "channel": channel, "layer": layer}
    for reduction, expected in expected_by.items():
        with GradNorms(
            model, ["0"], weighted_sum, reduction=reduction, precision="float64"
        ) as engine:
            found = engine(batch)["0"]
            engine.check(batch)
        assert found.shape[1:] == norm_shape(model[0], reduction)
        close(found, expected)
        close(reduce_gradient(model[0], gradient, reduction), expected)


def as_read(layer: nn.Module, gradient: Tensor) -> Tensor:
    """A gradient (B, *weight shape) as (B, C, I, *kernel), written out for each family."""
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # (I, C / groups, *kernel)
        groups = gradient.chunk(layer.groups, dim=1)
        return torch.cat([group.transpose(1, 2) for group in groups], dim=1)
    if isinstance(layer, Conv1D):
        return gradient.transpose(1, 2)[..., None, None]
    return gradient.reshape(len(gradient), *rule_of(layer).kernel_shape)


def check_dots(model: nn.Module, batch: Any, queries: int) -> None:
    space = ParameterSpace(model)
    v_QP = torch.randn(queries, space.size, dtype=torch.float64)
    gradients = gradients_one_by_one(model, list(space.shapes), weighted_sum, batch)
    with GradDots(model, space, weighted_sum, v_QP, precision="float64") as engine:
        close(engine.total(batch), space.join(gradients) @ v_QP.t())
        assert list(engine._layers) == ["0"]  # computed by the rule


def check_quadratics(model: nn.Module, batch: Any) -> None:
    names = [f"0.{own}" for own, _ in model[0].named_parameters()]
    gradients = gradients_one_by_one(model, names, weighted_sum, batch)
    with GradQuadratics(model, {"0": None}, weighted_sum, precision="float64") as engine:
        close(
            engine(batch)["0"],
            torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0),
        )
    if not isinstance(rule_of(model[0]), MatrixRule):
        return
    columns = [as_read(model[0], gradients["0.weight"]).flatten(2)]
    columns += [gradients["0.bias"].unsqueeze(2)] if "0.bias" in gradients else []
    gradient_BCJ = torch.cat(columns, dim=2)
    _, outputs, inputs = gradient_BCJ.shape
    metric = Metric(
        torch.linalg.qr(torch.randn(outputs, outputs, dtype=torch.float64)).Q,
        torch.linalg.qr(torch.randn(inputs, inputs, dtype=torch.float64)).Q,
        torch.rand(outputs, inputs, dtype=torch.float64),
    )
    with GradQuadratics(model, {"0": metric}, weighted_sum, precision="float64") as engine:
        found = engine(batch)["0"]
        engine.check(batch)
    rotated = torch.einsum("ck,bcj,jl->bkl", metric.outputs_CC, gradient_BCJ, metric.inputs_JJ)
    close(found, torch.einsum("kl,bkl->b", metric.weights_CJ, rotated**2))


def check_projections(model: nn.Module, batch: Any, outputs: int, inputs: int) -> None:
    space = ParameterSpace(model)
    gradients = gradients_one_by_one(model, [*space.shapes], weighted_sum, batch)
    for whole in (False, True):
        maps = projections(
            model,
            space,
            outputs=outputs,
            inputs=inputs,
            distribution="gaussian",
            seed=1,
            whole=whole,
        )
        with GradProjections(model, space, weighted_sum, maps, precision="float64") as engine:
            found = engine(batch)
            close(engine.losses_B, weighted_sum(model, batch))
            assert engine.slow_layers(batch) == {}  # computed by the rule
        for group, of_group in maps.items():
            size = projected_size(of_group)
            assert found[group].shape == (len(batch[0]), size)
            assert size <= outputs * inputs
            close(found[group], by_matrix(model, of_group, gradients))


def by_matrix(
    model: nn.Module, of_group: Mapping[str, Projection], gradients: Mapping[str, Tensor]
) -> Tensor:
    """P g, with P written out from what the projection makes of every unit vector."""
    rows = []
    for name, projection in of_group.items():
        shape = model.get_parameter(name).shape
        unit = torch.eye(shape.numel(), dtype=torch.float64).view(-1, *shape)
        exact = projection.to(torch.device("cpu"), torch.float64)
        rows.append(gradients[name].flatten(1) @ exact(unit).flatten(1))
    return torch.stack(rows).sum(0)


def test_every_rule_has_examples() -> None:
    assert {layer.__name__ for layer in EXAMPLES} == {rule.type_name() for rule in registered()}
    assert {layer.__name__ for layer in ONE_POSITION} == set(base.matrix_layers().split(", "))


@pytest.mark.parametrize(("layer", "shape"), CASES, ids=names)
def test_gradients_and_shapes(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model, batch = prepared(layer, shape)
    rule, x, y, g = seen(model, batch)
    parameters = [f"0.{own}" for own, _ in model[0].named_parameters()]
    expected = gradients_one_by_one(model, parameters, weighted_sum, batch)
    close(rule.weight_gradient(x, g), expected["0.weight"])
    if "0.bias" in expected:
        close(rule.bias_gradient(g), expected["0.bias"])
    assert rule.has_batch_axis(y)
    assert len(rule.read_as.split(",")) == len(rule.kernel_shape)
    assert torch.Size(rule.kernel_shape).numel() == rule.weight.numel()


@pytest.mark.parametrize(("layer", "shape"), CASES, ids=names)
def test_rows_of_the_weight_are_channels_of_the_output(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    """Attribution multiplies the norm of a row with the channel of the same number."""
    model, (x, _) = prepared(layer, shape)
    rule = rule_of(model[0])
    if rule.channel_axis is None:
        return
    output = rule.channels_first(model(x))
    for channel in range(output.shape[1]):
        wanted = output[:, channel].square().sum()
        (gradient,) = torch.autograd.grad(wanted, [model[0].weight], retain_graph=True)
        moved_C = as_read(model[0], gradient[None])[0].flatten(1).abs().sum(1) > 0
        assert moved_C.nonzero().flatten().tolist() == [channel]


@pytest.mark.parametrize("block", [1, 2**21])
@pytest.mark.parametrize(("layer", "shape"), CASES, ids=names)
def test_every_engine(
    layer: nn.Module, shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_CPU", block)
    monkeypatch.setattr(blocks, "_FEWEST_SAMPLES", 3)
    model, batch = prepared(layer, shape)
    check_norms(model, batch)
    check_dots(model, batch, queries=1)
    check_dots(model, batch, queries=9)
    check_quadratics(model, batch)
    check_projections(model, batch, 2, 3)
    check_projections(model, batch, 9, 2)  # the outputs stay as they are


@pytest.mark.parametrize(("layer", "shape"), CASES, ids=names)
def test_derived_forms_equal_special_ones(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """The general forms that every rule has, compared with those that a rule overrides."""
    model, batch = prepared(layer, shape)
    rule, x, _, g = seen(model, batch)
    close(LayerRule.kernel_norms(rule, x, g), rule.kernel_norms(x, g))
    close(LayerRule.weight_squares(rule, x, g), rule.weight_squares(x, g))
    v_Q = torch.randn(3, *rule.weight.shape, dtype=torch.float64)
    special = rule.weight_dots(rule.arrange_weight(v_Q).contiguous(), x, g)
    close(LayerRule.weight_dots(rule, v_Q, x, g), special)
    if rule.one_matrix:
        x_rows, g_rows = rule.rows(x, g)
        close(rule.from_matrix(base.product_of_rows(x_rows, g_rows)), rule.weight_gradient(x, g))
        close(rule.from_matrix(rule.as_matrix(v_Q)), v_Q)
        if rule.bias is not None and isinstance(rule, MatrixRule):
            close(MatrixRule.bias_gradient(rule, g), rule.bias_gradient(g))


# -- Conv1d ----------------------------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Conv1d, Tensor]:
    groups, kernel = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 4))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    padding: Any = draw(st.sampled_from([0, 1, 2, "same", "valid"]))
    conv = nn.Conv1d(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=1 if padding == "same" else stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    # Large enough for the kernel, and for `reflect` and `circular`, which may not pad by more.
    length = max(dilation * (kernel - 1) + 1 + draw(st.integers(0, 6)), 3)
    x = torch.randn(draw(st.integers(1, 3)), conv.in_channels, length, dtype=torch.float64)
    return conv.double(), x


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=100, deadline=None)
@given(made=convolutions(), large=st.booleans(), through=st.booleans())
def test_conv1d_geometry(made: tuple[nn.Conv1d, Tensor], large: bool, through: bool) -> None:
    layer, x = made
    model = nn.Sequential(layer).eval()
    batch = x, torch.randn_like(model(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "_LARGE_CONVOLUTION", 0 if large else 2**22)
        patch.setattr(conv, "through_gradient", lambda positions, vectors: through)
        patch.setattr(conv, "through_patches", lambda *_, **__: False)
        patch.setattr(base, "through_gram", lambda *_, **__: False)
        check_norms(model, batch)
        check_dots(model, batch, queries=3)
        check_quadratics(model, batch)


def test_conv1d_without_a_batch_axis_is_detected() -> None:
    layer = nn.Conv1d(3, 2, 1)
    assert not rule_of(layer).has_batch_axis(layer(torch.randn(3, 5)))


# -- EK-FAC ----------------------------------------------------------------------------------------


class OneLayer(Task):
    """The mean squared error of one layer's outputs."""

    output_loss = "mse"

    def __init__(self, layer: nn.Module, shape: tuple[int, ...], rows: int = 20) -> None:
        torch.manual_seed(1)
        self.layer = copy.deepcopy(layer).double()
        self.x = torch.randn(rows, *shape, dtype=torch.float64)
        self.y = torch.randn_like(self.layer(self.x).flatten(1))

    def model(self) -> nn.Module:
        return nn.Sequential(self.layer)

    def train_data(self) -> Tensor:
        return self.y

    def batch(self, ids, draw):
        return self.x[ids], self.y[ids]

    def outputs(self, model, batch):
        return model(batch[0]).flatten(1)

    def targets(self, batch):
        return batch[1]

    def losses(self, model, batch):
        return (self.outputs(model, batch) - batch[1]).square().mean(1)


def fitted(task: OneLayer) -> tuple[GaussNewton, Tensor]:
    """The operator, and the Gauss-Newton matrix as a dense one."""
    model = task.model().eval()
    space = ParameterSpace(model)

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (task.x,)).flatten(1)

    parts_BD = jacrev(outputs)({name: p.detach() for name, p in model.named_parameters()})
    jacobian_BDP = space.join(parts_BD)
    _, d, _ = jacobian_BDP.shape
    dense = 2 / d * torch.einsum("bdp,bdq->pq", jacobian_BDP, jacobian_BDP) / len(task.x)
    return GaussNewton(model, space, task, torch.arange(len(task.x))), dense


def check_ek_fac_is_exact(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """With one position and a squared error G is E[a a^T] x 2/d I, a Kronecker product."""
    operator, dense = fitted(OneLayer(layer, shape))
    v_QP = torch.randn(3, len(dense), dtype=torch.float64)
    damped = dense + LAMBDA * torch.eye(len(dense), dtype=torch.float64)
    found = EkFac(LAMBDA, targets="exact").solve(operator, v_QP).x_QP
    close(found, torch.linalg.solve(damped, v_QP.T).T)


def check_ek_fac_has_the_trace(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """The corrected eigenvalues are mean squares of gradients, whatever the positions."""
    operator, dense = fitted(OneLayer(layer, shape))
    (metric,) = EkFac(LAMBDA, targets="exact").metrics(operator, power=-1).values()
    assert float((metric.weights_CJ - LAMBDA).sum()) == pytest.approx(float(dense.trace()))


@pytest.mark.parametrize(("layer", "shape"), ONE_POSITION.values(), ids=names)
def test_ek_fac_is_exact_where_it_must_be(layer: nn.Module, shape: tuple[int, ...]) -> None:
    check_ek_fac_is_exact(layer, shape)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [case for case in MATRIX_CASES if getattr(case[0], "groups", 1) == 1],
    ids=names,
)
def test_ek_fac_has_the_trace_of_gauss_newton(layer: nn.Module, shape: tuple[int, ...]) -> None:
    check_ek_fac_has_the_trace(layer, shape)


# -- one class is enough ---------------------------------------------------------------------------


class Doubled(nn.Module):
    """y = 2 W x + b; only the rule below knows this type."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x @ self.weight.t() + self.bias


class Scaled(nn.Module):
    """y = w * x, with one weight a feature."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.fixture
def own_rules() -> Iterator[None]:
    """A minimal rule of each kind, registered for the time of a test."""

    class DoubledRule(MatrixRule[Doubled]):
        """The rule of `Doubled`."""

        layer = Doubled

        def input_rows(self, a: Tensor) -> Tensor:
            return 2 * a.reshape(len(a), -1, 4)

        def output_rows(self, g: Tensor) -> Tensor:
            return g.reshape(len(g), -1, 3)

    class ScaledRule(LayerRule[Scaled]):
        """The rule of `Scaled`."""

        layer = Scaled

        def weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
            return (a * g).flatten(1, -2).sum(1) if a.ndim > 2 else a * g

    yield
    for layer in (Doubled, Scaled):
        del base._RULES[layer]


@pytest.mark.usefixtures("own_rules")
@pytest.mark.parametrize("shape", [(4,), (5, 4)])
@pytest.mark.parametrize("layer", [Doubled(), Scaled()], ids=names)
def test_a_rule_of_ones_own_works_in_every_engine(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model, batch = prepared(layer, shape)
    check_norms(model, batch)
    check_dots(model, batch, queries=3)
    check_quadratics(model, batch)


@pytest.mark.usefixtures("own_rules")
def test_a_rule_of_ones_own_works_in_ek_fac() -> None:
    check_ek_fac_is_exact(Doubled(), (4,))
    check_ek_fac_has_the_trace(Doubled(), (5, 4))


@pytest.mark.usefixtures("own_rules")
def test_a_rule_of_ones_own_is_numbered_stored_and_in_the_docs() -> None:
    task = OneLayer(nn.Sequential(Scaled(), Doubled(), nn.Tanh(), nn.Linear(3, 2)), (4,))
    assert weight_layers(task, task.model()) == ["0.1", "0.3"]
    assert resolve_weights(["all", "0.0"], task, print) == ("0.1", "0.3", "0.0")
    (doubled, scaled) = norm_layouts(
        task.model(),
        ("0.1", "0.0"),
        num_samples=20,
        reduction="kernel",
        checkpoints=None,
        source="a test",
    )
    assert (doubled.shape, scaled.shape) == ((20, 3, 1, 1), (20, 4, 1, 1))
    rows = [line for line in layers_page().splitlines() if line.startswith("| ")]
    (doubled_row,) = [row for row in rows if row.startswith("| Doubled ")]
    assert doubled_row.startswith(
        "| Doubled | (C, I, 1, 1) | yes | derived | derived | derived | factors"
    )
    assert any(row.startswith("| Scaled ") and "| block |" in row for row in rows)


def test_a_type_has_one_rule() -> None:
    with pytest.raises(TypeError, match="Linear already has a rule: LinearRule"):

        class Second(linear.LinearRule):
            layer = nn.Linear


class SubLinear(nn.Linear):
    """Computes as Linear does, which is not to be known."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class NamedLinear(nn.Linear):
    """Is made in another way, and computes what it inherits."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)


class Padded(nn.Conv2d):
    """Overrides a part of what a convolution computes."""

    def _conv_forward(self, input: Tensor, *more: Any) -> Tensor:
        return super()._conv_forward(input.flip(-1), *more)


def test_a_subclass_that_changes_nothing_goes_by_the_rule() -> None:
    assert supported(NamedLinear(3))
    assert supported(nn.MultiheadAttention(4, 1).out_proj)
    for layer in (SubLinear(3, 3), Padded(1, 1, 1), weight_norm(nn.Linear(3, 3))):
        assert not supported(layer)


class SubEmbedding(nn.Embedding):
    pass


def test_a_subclass_is_numbered_and_factored_as_what_it_inherits_from() -> None:
    """`--layer all` must say that it has no rule, and not leave it out."""
    task = OneLayer(SubLinear(4, 2), (4,))
    assert weight_layers(task, task.model()) == ["0"]
    with pytest.raises(ModelError, match=r"layer '0' \(SubLinear\) has no gradient rule"):
        require_supported("0", task.layer)
    check_ek_fac_is_exact(SubLinear(4, 2), (4,))


def test_a_subclass_may_not_use_options_that_are_refused() -> None:
    model = nn.Sequential(SubEmbedding(5, 3, max_norm=1.0)).eval()
    space = ParameterSpace(model)
    with pytest.raises(ModelError, match=r"layer '0' \(SubEmbedding\) uses max_norm"):
        GradDots(model, space, weighted_sum, torch.zeros(1, space.size))


# -- what follows from the table -------------------------------------------------------------------


def test_kernel_axes_of_stored_norms_are_named() -> None:
    model = nn.ModuleList([nn.Conv1d(2, 3, 5), nn.Conv2d(2, 3, (1, 5)), nn.Linear(2, 3)])

    def dims(reduction: Any, checkpoints: int | None = None) -> list[tuple[str, ...]]:
        layouts = norm_layouts(
            model,
            ("0", "1", "2"),
            num_samples=7,
            reduction=reduction,
            checkpoints=checkpoints,
            source="a test",
        )
        assert all(len(layout.dims) == len(layout.shape) for layout in layouts)
        return [layout.dims for layout in layouts]

    image = "sample", "channel", "kernel_y", "kernel_x"
    assert dims("kernel") == [("sample", "channel", "kernel_x"), image, image]
    assert dims("channel") == [("sample", "channel")] * 3
    assert dims("layer", checkpoints=2) == [("checkpoint", "sample")] * 3


def test_the_docs_show_the_current_rules() -> None:
    assert DOCS.read_text() == layers_page(), "run the command that the page names"
