"""Every solver has all its pieces: what is forgotten fails here, not after the compute."""

import inspect
from collections.abc import Iterator
from functools import wraps
from importlib import import_module
from typing import Any, Literal

import pytest
import torch
from pydantic import Field

from influence_jobs.curvature import Solver, make_solver
from influence_jobs.kinds import kinds
from influence_jobs.requests import options
from influence_jobs.requests.options import SETTINGS, CurvatureBase, CurvatureOptions
from influence_jobs.specs.solvers import SolverSettings

from .conftest import Case, Classes, randoms

LAMBDA = 0.3
SOLVERS = {name: kind for name, kind in SolverSettings.by_name.items() if kind.inverts}
REQUIRED = {"solver", "summary", "passes"}


def class_of(settings: type[SolverSettings]) -> type[Solver]:
    module, _, name = settings.solver.partition(":")
    found: type[Solver] = getattr(import_module(f"influence_jobs.curvature.{module}"), name)
    return found


def with_lambda(name: str) -> SolverSettings:
    """Settings of a solver, with lambda and two repeats if it has them."""
    kind = SOLVERS[name]
    values = {"damping": LAMBDA, "repeats": 2}
    return kind(**{name: value for name, value in values.items() if name in kind.model_fields})


def solve(case: Case, name: str, v_QP: torch.Tensor, *, seed: int = 0) -> list[Any]:
    settings = with_lambda(name)
    if settings.needs_factors:
        pytest.skip("its layers are those of test_solvers")
    solver = make_solver(settings, seed=seed)
    return solver.solve_repeats(case.gauss_newton(), v_QP, range(settings.num_repeats))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_has_all_its_pieces(name: str) -> None:
    settings = SOLVERS[name]
    assert [piece for piece in REQUIRED if not hasattr(settings, piece)] == []
    assert "damping" in settings.model_fields or not settings.uses_curvature
    solver = class_of(settings)
    assert issubclass(solver, Solver)
    assert not inspect.isabstract(solver)
    assert (solver.__doc__ or "").strip()


@pytest.mark.parametrize("name", SOLVERS)
def test_settings_and_seed_reach_the_solver(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting is an argument of the constructor, and the other way round."""
    solver, given = class_of(SOLVERS[name]), dict[str, Any]()
    construct = solver.__init__

    @wraps(construct)
    def noting(self: Solver, **values: Any) -> None:
        given.update(values)
        construct(self, **values)

    monkeypatch.setattr(solver, "__init__", noting)
    settings = with_lambda(name)
    make_solver(settings, seed=7)
    expected = settings.model_dump(exclude={"name", "repeats"})
    if "seed" in inspect.signature(solver).parameters:
        expected["seed"] = 7
    assert given == expected
    assert given.keys() == inspect.signature(solver).parameters.keys()


def test_settings_are_options_with_help() -> None:
    others = {
        option
        for kind in kinds().values()
        for option in kind.request_type.model_fields
        if not issubclass(kind.request_type, CurvatureOptions)
    } | CurvatureBase.model_fields.keys()
    kinds_of: dict[str, set[Any]] = {}
    for name, settings in SolverSettings.by_name.items():
        for field_name, field in settings.model_fields.items():
            if field_name in ("name", "damping"):
                continue
            option = "batch" if field_name == "batch_size" else field_name
            assert field.description, f"{name}: {field_name} has no description, which is its help"
            assert option not in others, f"{name}: --{option} means something else already"
            said = CurvatureOptions.model_fields[option].description or ""
            assert f"{name}: " in said or f"{name}, " in said
            kinds_of.setdefault(option, set()).add(str(field.annotation))
    assert kinds_of.keys() == SETTINGS.keys()
    assert [option for option, found in kinds_of.items() if len(found) > 1] == []


@pytest.mark.parametrize("case", [Classes], indirect=True)
@pytest.mark.parametrize("name", SOLVERS)
def test_rows_are_solved_as_if_alone_and_again_the_same(case: Case, name: str) -> None:
    v_QP = randoms(3, case.space.size)
    together, again = solve(case, name, v_QP), solve(case, name, v_QP)
    alone = solve(case, name, v_QP[1:2])
    for repeat, same, single in zip(together, again, alone, strict=True):
        assert torch.equal(repeat.x_QP, same.x_QP)
        # LiSSA stops all rows at the step that the slowest needs.
        torch.testing.assert_close(repeat.x_QP[1], single.x_QP[0], rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("case", [Classes], indirect=True)
@pytest.mark.parametrize("name", SOLVERS)
def test_what_a_solution_says_of_itself_is_true(case: Case, name: str) -> None:
    if not SOLVERS[name].uses_curvature:
        pytest.skip("it solves nothing")
    v_QP = randoms(2, case.space.size)
    dense = case.dense_gauss_newton()
    for found in solve(case, name, v_QP):
        assert found.damping == LAMBDA
        left_QP = v_QP - found.x_QP @ dense - LAMBDA * found.x_QP
        torch.testing.assert_close(
            found.residual_Q, left_QP.norm(dim=1) / v_QP.norm(dim=1), rtol=1e-4, atol=1e-6
        )
        assert found.iterations_Q.shape == (2,)
        assert found.gradient_equivalents > 0


@pytest.mark.parametrize("case", [Classes], indirect=True)
@pytest.mark.parametrize("name", SOLVERS)
def test_repeats_are_independent(case: Case, name: str) -> None:
    solutions = solve(case, name, randoms(1, case.space.size))
    found = torch.stack([solution.x_QP for solution in solutions])
    assert len(torch.unique(found, dim=0)) == len(solutions)


@pytest.fixture
def own_settings() -> Iterator[None]:
    """Solvers of one's own, for the time of a test: they share a setting and have a choice."""

    class First(SolverSettings):
        name: Literal["first"] = "first"
        tolerance: float = Field(0.5, description="When to stop.")
        ordered: bool = Field(False, description="By size.")
        start: Literal["zero", "rhs"] = Field("zero", description="Where to begin.")

    First.solver, First.summary, First.passes = "cg:ConjugateGradient", "a toy", 1
    yield
    del SolverSettings.by_name["first"]


@pytest.mark.usefixtures("own_settings")
def test_settings_keep_their_type_and_share_an_option() -> None:
    found = options._solver_options()
    helps = {name: field.description for name, (_, field) in found.items()}
    assert helps["tolerance"] == (
        "cg: relative residual; 0.0001 by default. first: when to stop; 0.5 by default."
    )
    assert helps["ordered"] == "first: by size; no by default."
    assert helps["start"] == "first: where to begin; zero by default."
    assert "bool" in str(found["ordered"][0])
    assert "Literal" in str(found["start"][0])
