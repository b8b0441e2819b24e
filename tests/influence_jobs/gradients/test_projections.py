"""Random projections: they keep dot products, depend on names and seeds, and use weights' uses."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients import GradProjections, ParameterSpace
from influence_jobs.gradients.projections import projected_size, projections
from influence_jobs.gradients.reference import gradients_one_by_one


class Small(nn.Module):
    """A convolution, a norm, an embedding that is also the last layer, a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.mix = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.again = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.mix(self.table(ids).transpose(1, 2)).transpose(1, 2)
        h = self.again(torch.tanh(self.again(self.norm(h))))
        return self.head(h)


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    scores = model(ids)[:, :-1].transpose(1, 2)
    return F.cross_entropy(scores, ids[:, 1:], reduction="none").sum(1)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().double().eval()


def made(model: nn.Module, **options: Any) -> Any:
    chosen: dict[str, Any] = {
        "outputs": 3,
        "inputs": 2,
        "distribution": "gaussian",
        "seed": 0,
        "whole": False,
    }
    return projections(model, ParameterSpace(model), **(chosen | options))


def projected(model: nn.Module, maps: Any, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        group: torch.stack(
            [p.to(torch.device("cpu"), torch.float64)(gradients[n]) for n, p in of_group.items()]
        )
        .sum(0)
        .flatten(1)
        for group, of_group in maps.items()
    }


def test_uses_of_a_shared_weight_and_of_a_repeated_layer_add_up(model: nn.Module) -> None:
    ids, space = torch.randint(0, 11, (4, 7)), ParameterSpace(model)
    gradients = gradients_one_by_one(model, [*space.shapes], losses, ids)
    maps = made(model)
    with GradProjections(model, space, losses, maps, precision="float64") as engine:
        found = engine(ids)
        assert engine.slow_layers(ids) == {}
        engine.check(ids)
    wanted = projected(model, maps, gradients)
    for group, rows in wanted.items():
        torch.testing.assert_close(found[group], rows, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "sparse"])
@pytest.mark.parametrize("whole", [False, True])
def test_dot_products_are_kept_in_expectation(
    model: nn.Module, distribution: Any, whole: bool
) -> None:
    """The mean over seeds comes as near to <u, v> as its own standard error says."""
    space = ParameterSpace(model)
    u = {name: torch.randn(1, *shape).double() for name, shape in space.shapes.items()}
    v = {name: u[name] + torch.randn(1, *shape) for name, shape in space.shapes.items()}
    groups = {"all": [*space.shapes]} if whole else space.groups
    seeds = 400
    dots: dict[str, list[float]] = {group: [] for group in groups}
    for seed in range(seeds):
        maps = made(model, distribution=distribution, whole=whole, seed=seed)
        pu, pv = projected(model, maps, u), projected(model, maps, v)
        for group in groups:
            dots[group].append(float((pu[group] * pv[group]).sum()))
    for group, names in groups.items():
        exact = sum(float((u[name] * v[name]).sum()) for name in names)
        found = torch.tensor(dots[group]).double()
        error = float(found.std()) / seeds**0.5
        assert abs(float(found.mean()) - exact) < 4 * error + 1e-9, group
        assert error < 0.2 * exact  # the bound above says something


def test_small_layers_stay_as_they_are(model: nn.Module) -> None:
    """With room for the whole gradient, a layer of one parameter keeps dot products exactly."""
    maps = made(model, outputs=11, inputs=6)
    space = ParameterSpace(model)
    u = {name: torch.randn(2, *shape).double() for name, shape in space.shapes.items()}
    rows = projected(model, maps, u)["table"]
    torch.testing.assert_close(rows, u["table.weight"].flatten(1))


def test_a_group_that_has_room_is_kept_exactly(model: nn.Module) -> None:
    """Bias and weight lie side by side; a larger group is projected as before."""
    space, ids = ParameterSpace(model), torch.randint(0, 11, (4, 7))
    exact = gradients_one_by_one(model, [*space.shapes], losses, ids)
    sizes = {g: sum(space.shapes[n].numel() for n in names) for g, names in space.groups.items()}
    room = sorted(sizes.values())[-2]
    maps = made(model, outputs=room, inputs=1, keeps_small=True)
    before = projected(model, made(model, outputs=room, inputs=1), exact)
    with GradProjections(model, space, losses, maps, precision="float64") as engine:
        found = engine(ids)
        engine.check(ids)
    assert {size > room for size in sizes.values()} == {True, False}
    for group, names in space.groups.items():
        if sizes[group] > room:
            torch.testing.assert_close(found[group], before[group], rtol=1e-9, atol=1e-11)
            continue
        flat = torch.cat([exact[name].flatten(1) for name in names], dim=1)
        assert projected_size(maps[group]) == found[group].shape[1]
        torch.testing.assert_close(found[group] @ found[group].T, flat @ flat.T)


def test_they_depend_on_the_seed_and_the_parameter_alone(model: nn.Module) -> None:
    space = ParameterSpace(model)
    one = {name: torch.ones(1, *shape).double() for name, shape in space.shapes.items()}
    found = projected(model, made(model), one)
    part = projections(
        model,
        ParameterSpace(model, ["again"]),
        outputs=3,
        inputs=2,
        distribution="gaussian",
        seed=0,
        whole=False,
    )
    torch.testing.assert_close(projected(model, part, one)["again"], found["again"])
    other = projected(model, made(model, seed=1), one)
    assert all(not torch.allclose(found[group], other[group]) for group in found)
    # Written out, so that a later version cannot change what stores already hold.
    left = made(model)["again"]["again.weight"].left_CK
    assert left is not None
    torch.testing.assert_close(left[0], torch.tensor(FIRST_ROW), rtol=0, atol=1e-6)


FIRST_ROW = [-0.700688, 0.143994, 0.069135]


def test_a_model_of_another_dtype_is_refused(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="float"):
        GradProjections(model, ParameterSpace(model), losses, made(model))
