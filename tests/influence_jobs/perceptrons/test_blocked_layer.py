"""The blocked layer compared with torch's SGD on the same gradients, in float64."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from influence_jobs.perceptrons import pending
from influence_jobs.perceptrons.blocked_layer import BlockedLayer, sgd_modes
from influence_jobs.training.recipe import Recipe


@given(
    lr=st.floats(1e-4, 0.3),
    momentum=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99]),
    weight_decay=st.sampled_from([0.0, 1e-4, 1e-3, 1e-2]),
    blocks=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=4),
    part=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_blocks_of_steps_are_sgd(
    lr: float, momentum: float, weight_decay: float, blocks: list[tuple[int, int]], part: int
) -> None:
    with mock.patch.object(pending, "PART_SAMPLES", part):
        check_blocks(lr, momentum, weight_decay, blocks)


def check_blocks(
    lr: float, momentum: float, weight_decay: float, blocks: list[tuple[int, int]]
) -> None:
    recipe = Recipe(1, 1, "sgd", lr, momentum, weight_decay)
    modes = sgd_modes(recipe)
    if modes is None:
        return
    generator = torch.Generator().manual_seed(len(blocks))
    weights = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    layer = BlockedLayer(weights, modes)
    plain = weights.clone().requires_grad_()
    sgd = torch.optim.SGD([plain], lr=lr, momentum=momentum, weight_decay=weight_decay)
    for steps, batch in blocks:
        x = torch.randn(2, steps * batch, 5, generator=generator, dtype=torch.float64)
        block = layer.block(slice(0, 2), x, steps)
        for step in range(steps):
            x_MBI = x[:, step * batch : (step + 1) * batch]
            z_MBC = x_MBI @ plain.transpose(1, 2)
            torch.testing.assert_close(block.outputs(step), z_MBC.detach(), rtol=1e-8, atol=1e-9)
            loss = torch.sin(z_MBC).sum() / batch
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            block.d_MSBC[:, step] = torch.cos(z_MBC.detach())
        block.finish()
        trained = torch.stack([layer.weights(0), layer.weights(1)])
        torch.testing.assert_close(trained, plain.detach(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(1, 8, "adam", 1e-3),
        Recipe(1, 8, "sgd", 0.1, momentum=0.9, weight_decay=0.1),  # complex rates
        Recipe(1, 8, "sgd", 0.1, momentum=1.0),  # equal rates
    ],
)
def test_no_modes_no_blocks(recipe: Recipe) -> None:
    assert sgd_modes(recipe) is None


def test_tiny_values_do_not_become_subnormal() -> None:
    """The momentum of units without gradient decays; subnormal numbers are slow."""
    modes = sgd_modes(Recipe(1, 8, "sgd", 0.003, momentum=0.9, weight_decay=0.001))
    assert modes is not None
    layer = BlockedLayer(torch.randn(1, 4, 6), modes)
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(60):
        block = layer.block(slice(0, 1), torch.ones(1, 32, 6), 16)
        block.d_MSBC.zero_()
        block.finish()
        assert not ((layer.modes_MCI != 0) & (layer.modes_MCI.abs() < tiny)).any()
    assert layer.weights(0).abs().min() > 0
