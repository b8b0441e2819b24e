"""Gram matrices, patches and the gradient give the same norms; and which of them is chosen."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from influence_jobs.gradients import GradNorms, GradQuadratics, Metric, reduce_gradient
from influence_jobs.gradients.reference import per_sample_gradients
from influence_jobs.gradients.rules import base, blocks, conv
from influence_jobs.gradients.rules.blocks import SampleShape
from influence_jobs.terms import Reduction

CPU = torch.device("cpu")
triples = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


def weighted_sum(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, weights = batch
    return (model(x).sin() * weights).flatten(1).sum(1)


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A layer with positions and an input: Linear, or a convolution."""
    rows, inputs, outputs = (draw(st.integers(1, 4)) for _ in range(3))
    bias = draw(st.booleans())
    if draw(st.booleans()):
        positions = draw(st.sampled_from([(1,), (3,), (2, 3), (7,)]))
        return nn.Linear(inputs, outputs, bias), torch.randn(rows, *positions, inputs)
    axes = draw(st.integers(1, 3))
    kernel, stride, dilation, padding, more = (draw(triples)[:axes] for _ in range(5))
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    mode = draw(st.sampled_from(["zeros", "replicate"]))
    layer = kind(inputs, outputs, kernel, stride, padding, dilation, 1, bias, mode)
    size = [d * (k - 1) + m for d, k, m in zip(dilation, kernel, more, strict=True)]
    x = torch.randn(rows, inputs, *size)
    channels_last = axes == 2 and draw(st.booleans())
    return layer, x.to(memory_format=torch.channels_last) if channels_last else x


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("patches", [True, False])
@pytest.mark.parametrize("reduction", ["layer", "channel", "kernel"])
@settings(max_examples=40, deadline=None)
@given(made=layers())
def test_every_form_gives_the_norms(
    made: tuple[nn.Module, Tensor], gram: bool, patches: bool, reduction: Reduction
) -> None:
    layer, x = made[0].double(), made[1].double()
    model = nn.Sequential(layer).eval()
    batch = x, torch.randn_like(model(x))
    (gradient,) = per_sample_gradients(model, ["0"], weighted_sum, batch).values()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "through_gram", lambda *_, **__: gram)
        patch.setattr(conv, "through_patches", lambda *_, **__: patches)
        with GradNorms(
            model, ["0"], weighted_sum, reduction=reduction, precision="float64"
        ) as engine:
            found = engine(batch)["0"]
        with GradQuadratics(model, {"0": None}, weighted_sum, precision="float64") as squares:
            squared = squares(batch)["0"]
    expected = reduce_gradient(layer, gradient, reduction)
    # A norm that is zero but for rounding: its square is right to 1e-16 of what cancelled.
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-7 if gram else 1e-10)
    if layer.bias is None:
        whole = gradient.flatten(1).square().sum(1)
        torch.testing.assert_close(squared, whole, rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(made=layers())
def test_both_forms_give_the_quadratics(made: tuple[nn.Module, Tensor]) -> None:
    layer, x = made[0].double(), made[1].double()
    model = nn.Sequential(layer).eval()
    batch = x, torch.randn_like(model(x))
    outputs, inputs = layer.weight.flatten(1).shape
    inputs += layer.bias is not None
    metric = Metric(
        torch.linalg.qr(torch.randn(outputs, outputs, dtype=torch.float64)).Q,
        torch.linalg.qr(torch.randn(inputs, inputs, dtype=torch.float64)).Q,
        torch.rand(outputs, inputs, dtype=torch.float64),
    )
    found = []
    for rows_first in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base, "rows_rotated_first", lambda *_, choice=rows_first: choice)
            with GradQuadratics(model, {"0": metric}, weighted_sum, precision="float64") as engine:
                engine.check(batch)
                found.append(engine(batch)["0"])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


# -- numbers that a square loses -------------------------------------------------------------------


def norms_of(layer: nn.Module, x: Tensor, g: Tensor, reduction: Reduction) -> Tensor:
    """Norms for an input and a given gradient by the output."""

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) * g).flatten(1).sum(1)

    with GradNorms(nn.Sequential(layer).eval(), ["0"], losses, reduction=reduction) as engine:
        return engine(x)["0"]


@pytest.mark.parametrize("reduction", ["layer", "channel"])
def test_what_cancels_between_positions_keeps_its_digits(reduction: Reduction) -> None:
    """g x^T - g (x + d)^T = -g d^T with d of a thousandth: in float32 its square would be noise."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 128)
    assert blocks.through_gram(SampleShape(2, 128, 256, 1), whole=True, device=CPU)
    g, x = torch.randn(3, 1, 128), torch.randn(3, 1, 256)
    near = x + 1e-3 * torch.randn_like(x)
    exact = g.double().transpose(1, 2) @ (x.double() - near.double())
    found = norms_of(layer, torch.cat([x, near], 1), torch.cat([g, -g], 1), reduction)
    expected = reduce_gradient(layer, exact, reduction).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("reduction", ["layer", "channel", "kernel"])
def test_tiny_gradients_do_not_underflow(reduction: Reduction) -> None:
    layer, x = nn.Linear(64, 64), torch.ones(1, 2, 64)
    found = norms_of(layer, x, torch.full((1, 2, 64), 1e-25), reduction)
    one = 2e-25 * math.sqrt(64)
    expected = torch.full_like(found, one * math.sqrt(64) if reduction == "layer" else one)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


# -- the choice ------------------------------------------------------------------------------------

LARGE = SampleShape(positions=4, outputs=512, inputs=512, offsets=9)  # the last of a ResNet-18
MIDDLE = SampleShape(64, 128, 128, 9)
IMAGE = SampleShape(625, 96, 96, 9)  # the eleventh of FFDNet
SEQUENCE = SampleShape(128, 128, 512, 1)


@pytest.mark.parametrize("whole", [True, False])
def test_gram_matrices_are_for_few_positions(whole: bool) -> None:
    assert blocks.through_gram(LARGE, whole=whole, device=CPU)
    for shape in (MIDDLE, IMAGE, SEQUENCE):
        assert not blocks.through_gram(shape, whole=whole, device=CPU)


@pytest.mark.parametrize("positions", [2, 13, 14, 40])
def test_a_sequence_takes_the_way_of_fewer_multiplications(
    positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 64 inputs and outputs, by a count written out: T^2 (I + O) in float64, or T I O."""
    moved = 32  # multiplications in the time of a number written and read again
    ghost = 2 * positions**2 * 128 + moved * 2 * (positions * 128 + 2 * positions**2)
    direct = positions * 64 * 64 + moved * 64 * 64
    ghosts: list[int] = []
    taken = base.MatrixRule.gram_squares

    def counted(rule: Any, a: Tensor, g: Tensor) -> Tensor:
        ghosts.append(len(a))
        return taken(rule, a, g)

    monkeypatch.setattr(base.MatrixRule, "gram_squares", counted)
    layer, x = nn.Linear(64, 64), torch.randn(3, positions, 64)
    model, batch = nn.Sequential(layer).eval(), (x, torch.randn(3, positions, 64))
    with GradNorms(model, ["0"], weighted_sum, reduction="layer") as engine:
        found = engine(batch)["0"]
    assert bool(ghosts) == (ghost < direct) == (positions < 14)
    (gradient,) = per_sample_gradients(model, ["0"], weighted_sum, batch).values()
    torch.testing.assert_close(found, gradient.flatten(1).norm(dim=1).float(), rtol=1e-5, atol=0)


def test_gram_matrices_are_not_for_devices_without_float64() -> None:
    assert not blocks.through_gram(LARGE, whole=True, device=torch.device("mps"))


def test_patches_are_for_middling_images() -> None:
    assert blocks.through_patches(MIDDLE, own=True)
    assert not blocks.through_patches(IMAGE, own=True)
    assert blocks.through_patches(SampleShape(100, 16, 6, 25), own=False)
    assert not blocks.through_patches(SampleShape(4096, 8, 8, 9), own=False)


def test_rows_are_rotated_where_they_are_few() -> None:
    assert blocks.rows_rotated_first(LARGE)
    assert not blocks.rows_rotated_first(IMAGE)


def test_one_position_of_a_linear_layer_stays_in_closed_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base, "through_gram", lambda *_, **__: pytest.fail("no positions"))
    norms_of(nn.Linear(64, 64), torch.randn(2, 64), torch.randn(2, 64), "layer")
