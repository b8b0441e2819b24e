"""Solvers of (A + lambda I) x = v, compared with dense float64 inverses."""

import itertools
import math
import re

import pytest
import torch

from influence_jobs.curvature import ConjugateGradient, EkFac, GaussNewton, Identity, Lissa
from influence_jobs.curvature import lissa as lissa_module
from influence_jobs.curvature.halves import cosines_of_halves
from influence_jobs.errors import DataError, RuntimeFault, SpecError
from influence_jobs.gradients.parameters import ParameterSpace

from .conftest import Classes, N, randoms

LAMBDA = 0.1


def inverse(dense, v_QP, damping=LAMBDA):
    return torch.linalg.solve(dense + damping * torch.eye(len(dense)).to(dense), v_QP.T).T


def relative(found, expected):
    return (found - expected).norm(dim=1) / expected.norm(dim=1)


# -- conjugate gradients ---------------------------------------------------------------------------


def test_conjugate_gradients_invert_gauss_newton(case):
    v_QP = randoms(4, case.space.size)
    solution = ConjugateGradient(LAMBDA, tolerance=1e-9).solve(case.gauss_newton(), v_QP)
    expected = inverse(case.dense_gauss_newton(), v_QP)
    assert relative(solution.x_QP, expected).max() < 1e-7
    assert solution.residual_Q.max() < 1e-8
    assert solution.damping == LAMBDA
    assert (solution.iterations_Q > 0).all()


def test_conjugate_gradients_in_float32_are_within_1e_5(case):
    v_QP = randoms(4, case.space.size)
    expected = inverse(case.dense_gauss_newton(), v_QP)
    case.model.float()
    solution = ConjugateGradient(LAMBDA, tolerance=1e-6).solve(case.gauss_newton(), v_QP.float())
    assert relative(solution.x_QP, expected).max() < 1e-5


def test_each_right_hand_side_is_solved_as_if_alone_and_zero_is_zero(case):
    v_QP = randoms(3, case.space.size) * torch.tensor([[1e-6], [0.0], [1e3]])
    together = ConjugateGradient(LAMBDA, tolerance=1e-8).solve(case.gauss_newton(), v_QP)
    for row in (0, 2):
        alone = ConjugateGradient(LAMBDA, tolerance=1e-8).solve(
            case.gauss_newton(), v_QP[row : row + 1]
        )
        torch.testing.assert_close(together.x_QP[row], alone.x_QP[0], rtol=1e-6, atol=0)
    assert together.x_QP[1].abs().max() == 0
    assert together.residual_Q[1] == 0
    assert together.iterations_Q[1] == 0


def test_a_residual_that_is_not_reached_is_told(case):
    solution = ConjugateGradient(1e-3, tolerance=1e-9, max_iterations=2).solve(
        case.gauss_newton(), randoms(2, case.space.size)
    )
    assert solution.iterations_Q.tolist() == [2, 2]
    assert (
        "2 of 2 s_test vectors did not reach a residual of 1e-09 in 2"
        in solution.record["messages"][0]
    )
    assert solution.residual_Q.min() > 1e-9


def test_negative_curvature_is_refused_with_a_lambda_that_works_the_first_time(case):
    lowest = float(torch.linalg.eigvalsh(case.dense_hessian())[0])
    assert lowest < -1e-3
    v_QP = randoms(2, case.space.size)
    with pytest.raises(SpecError, match="use --operator gauss-newton, or --damping") as refused:
        ConjugateGradient(-lowest / 2, tolerance=1e-10).solve(case.hessian(), v_QP)
    assert f"smallest eigenvalue is {lowest:.3g}" in str(refused.value)
    named = float(re.search(r"--damping (\S+) or more", str(refused.value))[1])
    assert -lowest < named < -1.25 * lowest
    solution = ConjugateGradient(named, tolerance=1e-9).solve(case.hessian(), v_QP)
    assert relative(solution.x_QP, inverse(case.dense_hessian(), v_QP, named)).max() < 1e-6
    messages = Lissa(-lowest / 2, scale=20.0, batch_size=4, depth=2).solve(case.hessian(), v_QP)
    assert f"takes --damping {named:g} or more" in messages.record["messages"][0]


def test_a_loss_that_is_not_convex_is_named_as_the_cause(case):
    operator = case.gauss_newton()
    negative = case.dense_gauss_newton() - 0.5 * torch.eye(case.space.size, dtype=torch.float64)
    operator.__class__ = type("Bent", (GaussNewton,), {"unchecked": lambda _, v: v @ negative})
    with pytest.raises(
        SpecError, match=r"not convex in the outputs: mend it, or --damping 0\.5[5-7]"
    ):
        ConjugateGradient(0.1).solve(operator, randoms(1, case.space.size))


@pytest.mark.parametrize("fraction", [0.3, 0.01])
def test_the_iterations_that_a_trial_tells_are_enough(case, fraction):
    largest = float(torch.linalg.eigvalsh(case.dense_gauss_newton())[-1])
    operator, v_QP = case.gauss_newton(), randoms(2, case.space.size)
    solver = ConjugateGradient(fraction * largest)
    trial = solver.trial(operator, v_QP, passes=1)
    told = int(re.match(r"up to (\d+) iterations over 24 samples", trial.said[0])[1])
    before, fraction_done = operator.work, 0.0
    while fraction_done < 1:
        fraction_done += next(trial.pieces)
    # A pass for each iteration and one for the residual, of two vectors.
    passes = (operator.work - before) / (operator.cost * 2 * N)
    assert passes == pytest.approx(told + 1, abs=1)
    assert solver.solve(operator, v_QP).iterations_Q.max() <= told
    hard = ConjugateGradient(1e-9).trial(operator, v_QP, passes=1).said[0]
    assert hard.startswith("up to 200 iterations")
    assert "raise --damping" in hard


# -- LiSSA -----------------------------------------------------------------------------------------


def test_the_mean_of_lissa_is_the_inverse_within_its_standard_error(case):
    v_QP, damping = randoms(3, case.space.size), 5 * LAMBDA
    repeats = Lissa(damping).solve_repeats(case.gauss_newton(), v_QP, range(4))
    x_RQP = torch.stack([repeat.x_QP for repeat in repeats])
    expected = inverse(case.dense_gauss_newton(), v_QP, damping)
    error_Q = (x_RQP.mean(0) - expected).norm(dim=1)
    standard_error_Q = (x_RQP.var(0).sum(1) / len(repeats)).sqrt()
    assert (error_Q < 2 * standard_error_Q).all()
    assert (error_Q / expected.norm(dim=1)).max() < 0.06
    assert (
        max(repeat.record["relative_standard_error"] for repeat in repeats)
        <= lissa_module.TOLERANCE
    )
    assert all(repeat.damping == damping for repeat in repeats)


@pytest.mark.parametrize("damping", [pytest.param(5 * LAMBDA, marks=pytest.mark.slow), LAMBDA])
def test_lissa_takes_the_steps_that_its_trial_tells_and_its_progress_is_true(case, damping):
    operator, v_QP = case.gauss_newton(), randoms(2, case.space.size)
    solver = Lissa(damping)
    trial = solver.trial(operator, v_QP, passes=1)
    told = int(re.match(r"([\d,]+) steps of 32 samples", trial.said[0])[1].replace(",", ""))
    assert sum(next(trial.pieces) for _ in range(4)) == pytest.approx(4 * 16 / told)
    fractions: list[float] = []
    solution = solver.solve(operator, v_QP, fractions.append)
    assert solution.record["depth"] == told
    assert fractions[-1] == 1.0
    for before, after in itertools.pairwise([0.0, *fractions]):  # 16 steps or fewer each
        assert 0 < after - before < 16.001 / told
    assert Lissa(damping, depth=70).trial(operator, v_QP, 1).said[0].startswith("70 steps of 32")


def test_a_recursion_of_too_many_steps_is_refused_before_it_starts(case):
    solver = Lissa(1e-7)
    with pytest.raises(SpecError, match="use --solver cg, a larger --damping, or give --depth"):
        solver.trial(case.gauss_newton(), randoms(1, case.space.size), 1)


@pytest.mark.slow
def test_progress_follows_the_scatter_that_is_measured(case, monkeypatch):
    monkeypatch.setattr(lissa_module, "TOLERANCE", 0.004)
    fractions: list[float] = []
    solution = Lissa(LAMBDA, batch_size=4).solve(
        case.gauss_newton(), randoms(1, case.space.size), fractions.append
    )
    relaxation = math.ceil(solution.record["scale"] / LAMBDA)
    assert solution.record["depth"] > 20 * relaxation
    # After the first blocks the rest is foreseen within a factor of two.
    first = next(i for i, (a, b) in enumerate(itertools.pairwise(fractions)) if b < a)
    foreseen = (lissa_module.BURN_IN + lissa_module.BLOCKS) * relaxation / fractions[first + 1]
    assert 0.5 < foreseen / solution.record["depth"] < 2


@pytest.mark.parametrize("scale", [4.0, 9.0])
def test_the_fixed_point_of_the_recursion_has_damping_d_times_s(case, scale):
    # With every sample in every step there is no noise: the test sees the recursion alone.
    operator, v_QP = case.gauss_newton(), randoms(2, case.space.size)
    dense = case.dense_gauss_newton()
    operator.products_in_turn = lambda h_EQP, steps: (  # type: ignore[method-assign]
        case.space.split(h_EQP @ dense) for _ in steps
    )
    depth = math.ceil(25 * scale / LAMBDA)
    solution = Lissa(LAMBDA, scale=scale, depth=depth, batch_size=1).solve(operator, v_QP)
    assert solution.record["recursion_damping"] == LAMBDA / scale
    expected = inverse(case.dense_gauss_newton(), v_QP, damping=LAMBDA)
    assert relative(solution.x_QP, expected).max() < 1e-6
    wrong = inverse(case.dense_gauss_newton(), v_QP, damping=LAMBDA / scale)
    assert relative(solution.x_QP, wrong).min() > 0.1


def test_a_repeat_depends_on_seed_and_number_alone(case):
    v_QP = randoms(3, case.space.size)

    def solution(rows=slice(None), repeat=0, **options):
        solver = Lissa(LAMBDA, **{"scale": 5.0, "depth": 40, "batch_size": 4} | options)
        return solver.solve_repeats(case.gauss_newton(), v_QP[rows], (repeat,))[0].x_QP

    torch.testing.assert_close(solution()[:1], solution(slice(0, 1)))
    assert not torch.allclose(solution(), solution(repeat=1))
    assert not torch.allclose(solution(), solution(seed=1))


@pytest.mark.parametrize("case", [Classes], indirect=True)
@pytest.mark.parametrize("depth", [40, None])
def test_repeats_side_by_side_find_what_each_finds_alone(case, depth, monkeypatch):
    v_QP, repeats = randoms(2, case.space.size), (4, 0, 2)
    solver = Lissa(8 * LAMBDA, scale=12.0, depth=depth, batch_size=4)

    def solutions(*repeats):
        return solver.solve_repeats(case.gauss_newton(), v_QP, repeats)

    if depth is None:  # let them end at different steps
        errors = [each.record["relative_standard_error"] for each in solutions(*repeats)]
        monkeypatch.setattr(lissa_module, "TOLERANCE", sorted(errors)[1])
    together, alone = solutions(*repeats), [solutions(repeat)[0] for repeat in repeats]
    depths = [solution.record["depth"] for solution in alone]
    assert [solution.record["depth"] for solution in together] == depths
    assert depth is not None or len(set(depths)) > 1
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found.x_QP, expected.x_QP)
        torch.testing.assert_close(found.residual_Q, expected.residual_Q)
    torch.testing.assert_close(
        solver.solve(case.gauss_newton(), v_QP).x_QP, together[repeats.index(0)].x_QP
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", [Classes], indirect=True)
def test_of_repeats_side_by_side_only_the_diverging_ones_restart(case):
    v_QP, settings = randoms(2, case.space.size), {"depth": 150, "batch_size": 2}
    largest = float(torch.linalg.eigvalsh(case.dense_gauss_newton())[-1])
    for scale in torch.linspace(0.2, 1.5, 27).tolist():
        solver = Lissa(LAMBDA, scale=scale * largest, **settings)
        alone = [solver.solve_repeats(case.gauss_newton(), v_QP, (r,))[0] for r in range(3)]
        tries = [len(solution.record["messages"]) for solution in alone]
        if len(set(tries)) > 1:
            break
    assert len(set(tries)) > 1, "no scale at which some repeats diverge and others do not"
    together = solver.solve_repeats(case.gauss_newton(), v_QP, range(3))
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found.x_QP, expected.x_QP)
        assert found.record["messages"] == expected.record["messages"]
        assert found.record["scale"] == expected.record["scale"]


def test_a_diverging_repeat_restarts_with_a_larger_scale_and_says_so(case):
    v_QP = randoms(2, case.space.size)
    largest = float(torch.linalg.eigvalsh(case.dense_gauss_newton())[-1])
    scale = largest / 8
    solution = Lissa(LAMBDA, scale=scale, depth=300, batch_size=N).solve(case.gauss_newton(), v_QP)
    messages = solution.record["messages"]
    assert messages[0].startswith(f"diverged by step 16 at scale {scale:.4g}")
    assert solution.record["scale"] == scale * 2 ** len(messages)
    assert relative(solution.x_QP, inverse(case.dense_gauss_newton(), v_QP)).max() < 0.5


def test_a_matrix_that_no_scale_helps_is_an_error(case):
    operator = case.hessian()
    operator.products_in_turn = lambda h_EQP, steps: (  # type: ignore[method-assign]
        case.space.split(-1e9 * h_EQP) for _ in steps
    )
    with pytest.raises(RuntimeFault, match="LiSSA diverges even at scale"):
        Lissa(LAMBDA, scale=1.0, depth=100, batch_size=2).solve(
            operator, randoms(1, case.space.size)
        )


def test_a_damping_that_would_take_for_ever_is_refused(case):
    with pytest.raises(SpecError, match="steps because lambda is so small: use --solver cg"):
        Lissa(1e-6).solve(case.gauss_newton(), randoms(1, case.space.size))


def test_a_hessian_that_lambda_does_not_cover_is_told(case):
    smallest = float(torch.linalg.eigvalsh(case.dense_hessian())[0])
    v_QP = randoms(1, case.space.size)
    uncovered = Lissa(-smallest / 2, scale=20.0, depth=5, batch_size=4)
    (message,) = uncovered.solve(case.hessian(), v_QP).record["messages"]
    assert "does not make the smallest eigenvalue -" in message
    covered = Lissa(-smallest * 2, scale=20.0, depth=5, batch_size=4)
    assert covered.solve(case.hessian(), v_QP).record["messages"] == []


# -- EK-FAC, identity ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [Classes], indirect=True)
def test_ek_fac_comes_closer_than_no_curvature(case):
    space = ParameterSpace(case.model, ["conv", "head"])
    operator = GaussNewton(case.model, space, case.task, torch.arange(N))
    v_QP = randoms(4, space.size)
    exact = ConjugateGradient(LAMBDA, tolerance=1e-9).solve(operator, v_QP).x_QP
    cosines = {
        solver: torch.cosine_similarity(solver.solve(operator, v_QP).x_QP, exact).min()
        for solver in (EkFac(LAMBDA), Identity())
    }
    ek_fac, identity = cosines.values()
    assert ek_fac > identity + 0.02
    assert all(p.requires_grad for p in case.model.parameters())


def test_ek_fac_takes_layers_without_bias(case):
    case.model.conv.bias = None
    space = ParameterSpace(case.model, ["conv", "head"])
    operator = GaussNewton(case.model, space, case.task, torch.arange(N))
    assert EkFac(LAMBDA).solve(operator, randoms(1, space.size)).x_QP.isfinite().all()
    metrics = EkFac(LAMBDA).metrics(operator, power=2)
    assert metrics["conv"].weights_CJ.shape == (3, 9)
    assert metrics["head"].weights_CJ.shape[1] == 13


def test_identity_gives_the_vectors_back(case):
    v_QP = randoms(2, case.space.size)
    assert torch.equal(Identity().solve(case.gauss_newton(), v_QP).x_QP, v_QP)


@pytest.mark.parametrize("solver", [ConjugateGradient(), Lissa(), EkFac(), Identity()])
def test_right_hand_sides_must_be_finite(case, solver):
    v_QP = randoms(2, case.space.size)
    v_QP[1, 0] = math.nan
    with pytest.raises(DataError, match="the gradient of query 1 is not finite"):
        solver.solve(case.gauss_newton(), v_QP)


@pytest.mark.parametrize("solver", [ConjugateGradient, Lissa, EkFac])
@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan])
def test_lambda_must_be_positive(solver, damping):
    with pytest.raises(SpecError, match="it must be larger than 0"):
        solver(damping)


def test_the_automatic_lambda_is_a_part_of_the_largest_eigenvalue(case):
    largest = float(torch.linalg.eigvalsh(case.dense_gauss_newton())[-1])
    solution = ConjugateGradient().solve(case.gauss_newton(), randoms(1, case.space.size))
    assert solution.damping == pytest.approx(0.04 * largest, rel=0.05)


@pytest.mark.parametrize("solver", [ConjugateGradient(LAMBDA), EkFac(LAMBDA), Lissa(LAMBDA)])
def test_cosines_of_halves_are_those_of_two_solutions(case, solver):
    v_QP = randoms(2, case.space.size)
    found = cosines_of_halves(solver, case.gauss_newton(), v_QP, LAMBDA)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    halves = order[: N // 2].sort().values, order[N // 2 :].sort().values
    if isinstance(solver, EkFac):
        x = [EkFac(LAMBDA).solve(case.gauss_newton(ids=ids), v_QP).x_QP for ids in halves]
    else:
        damping = LAMBDA * torch.eye(case.space.size, dtype=torch.float64)
        x = [torch.linalg.solve(case.dense_gauss_newton(i) + damping, v_QP.T).T for i in halves]
    expected = torch.cosine_similarity(x[0], x[1], dim=1)
    assert expected.max() < 0.999
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), expected, atol=1e-3, rtol=0
    )
