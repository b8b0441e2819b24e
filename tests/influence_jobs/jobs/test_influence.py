"""s-test and influence runs, compared with explicit gradients and dense solutions."""

import copy
import json
from collections import Counter

import numpy as np
import pytest
import torch

from influence_jobs.curvature import ConjugateGradient, EkFac, GaussNewton
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.reference import gradients_one_by_one
from influence_jobs.jobs.automatic import _key
from influence_jobs.jobs.queries import query_gradients
from influence_jobs.kinds import open_job, view_of
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.s_test.job import curvature_samples
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.kinds.train.spec import TrainedCheckpoint
from influence_jobs.specs.base import make_spec
from influence_jobs.specs.solvers import ConjugateGradientSettings as Cg
from influence_jobs.specs.solvers import (
    Curvature,
    EkFacSettings,
    IdentitySettings,
    LissaSettings,
)
from influence_jobs.store.checkpoints import load_checkpoint
from influence_jobs.store.layout import S_TEST, S_TEST_VARIANCE, SCORES, part_name, repeat_name
from influence_jobs.store.run import Run
from influence_jobs.store.verify import find_damage
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.placement import to_type

MODULES = ("conv1", "norm", "conv2", "head")
N = 1500


@pytest.fixture(scope="module")
def network(digits_task, checkpoint, scores_root):
    model = digits_task.model()
    load_checkpoint(model, str(scores_root), checkpoint)
    return model.eval()


@pytest.fixture(scope="module")
def make_s_test(grad_norms_spec, checkpoint, queries):
    def make(**fields):
        chosen = {
            "task": grad_norms_spec.task,
            "checkpoint": checkpoint,
            "modules": MODULES,
            "queries": queries,
            "curvature": Curvature(samples=200),
            "solver": Cg(damping=0.1),
        }
        return make_spec(STestSpec, **(chosen | fields))

    return make


def influence(*s_tests, **fields):
    return make_spec(InfluenceSpec, task=s_tests[0].task, s_tests=s_tests, **fields)


def test_s_test_is_the_solution_of_its_queries_gradients(
    carry_out, make_s_test, network, digits_task, queries
):
    spec = make_s_test()
    run = carry_out(spec)
    space, double = ParameterSpace(network), copy.deepcopy(network).double()
    rows = []
    for query in queries.items:
        batch = to_type(digits_task.test_batch(torch.tensor([query.test]), Draw(0)), torch.float64)
        loss = digits_task.losses(double, batch).sum()
        rows.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, double.parameters())])
        )
    rhs_QP = torch.stack(rows).float()
    found = query_gradients(digits_task, network, space, queries, 0, 3)
    torch.testing.assert_close(found, rhs_QP, rtol=1e-6, atol=1e-9)
    ids = curvature_samples(digits_task, spec.curvature)
    assert len(set(ids.tolist())) == 200
    operator = GaussNewton(network, space, digits_task, ids)
    expected = ConjugateGradient(0.1, tolerance=1e-6).solve(operator, rhs_QP).x_QP
    stored = torch.from_numpy(run.read_rows(S_TEST, 0, 3))
    assert torch.cosine_similarity(stored, expected).min() > 0.99999
    assert ((stored - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-3
    table = run.read_table("solutions").to_pylist()
    assert [row["query"] for row in table] == [0, 1, 2]
    assert all(row["damping"] == 0.1 and row["residual"] <= 1.1e-4 for row in table)
    named = run.array(S_TEST).attrs["parameters"]
    assert [name for name, _ in named] == list(space.shapes)
    assert find_damage(run).damaged == {}


def test_repeats_share_shards_and_their_mean_and_variance_are_stored(carry_out, make_s_test):
    solver = LissaSettings(damping=0.5, scale=30.0, depth=60, batch_size=16, repeats=5)
    run = carry_out(make_s_test(solver=solver))
    repeats = np.stack([run.read_rows(repeat_name(r), 0, 3) for r in range(5)])
    assert not np.allclose(repeats[0], repeats[1])
    np.testing.assert_allclose(run.read_rows(S_TEST, 0, 3), repeats.mean(0), rtol=1e-4, atol=1e-7)
    variance = run.read_rows(S_TEST_VARIANCE, 0, 3)
    np.testing.assert_allclose(variance, repeats.var(0, ddof=1), rtol=1e-3, atol=1e-10)
    plan = run.plan()
    assert [(s["part"], s["parts"], s["start"], s["stop"]) for s in plan["shards"]] == [
        (0, 3, 0, 3),
        (3, 2, 0, 3),
    ]
    rows = run.read_table("solutions").to_pylist()
    assert [(row["query"], row["repeat"]) for row in rows] == [
        (q, r) for q in range(3) for r in range(5)
    ]
    assert json.loads(rows[0]["record"])["recursion_damping"] == pytest.approx(0.5 / 30)
    assert find_damage(run).damaged == {}


def test_a_plan_of_one_repeat_a_shard_is_kept(carry_out, make_s_test, fresh_root):
    # Runs that began before repeats shared shards have such a plan.
    spec = make_s_test(
        solver=LissaSettings(damping=0.5, scale=30.0, depth=60, batch_size=16, repeats=5)
    )
    run = carry_out(spec)
    plan = run.plan()
    plan["shards"] = [
        {"id": f"{r:03d}-000000-000003", "start": 0, "stop": 3, "part": r} for r in range(5)
    ]
    root = fresh_root()
    Run.create(str(root), spec).write_json("plan.json", plan)
    again = carry_out(spec, root=root)
    assert set(again.manifest.done()) == {"finish", *(shard["id"] for shard in plan["shards"])}
    for name in (S_TEST, *map(repeat_name, range(5))):
        np.testing.assert_allclose(
            again.read_rows(name, 0, 3), run.read_rows(name, 0, 3), rtol=1e-3, atol=1e-6
        )


def test_scores_are_the_dot_products_with_explicit_gradients(
    carry_out, make_s_test, network, digits_task
):
    spec = make_s_test()
    run = carry_out(influence(spec, keep_modules=True))
    s_test_QP = type(run)(run.root, spec).read_rows(S_TEST, 0, 3)
    ids = torch.arange(0, N, 97)
    space = ParameterSpace(network)
    batch = digits_task.batch(ids, Draw(0))
    gradients = gradients_one_by_one(network, list(space.shapes), digits_task.losses, batch)
    g_BP = space.join(gradients).numpy()
    expected = s_test_QP.astype(np.float64) @ g_BP.T
    scores = run.read_rows(SCORES, 0, N)
    # A well-fitted sample's gradient is a small difference: rounding is relative to the large ones.
    assert np.abs(scores[:, ids] - expected).max() < 1e-5 * np.abs(expected).max()
    parts = [run.read_rows(part_name(module), 0, N) for module in MODULES]
    np.testing.assert_allclose(np.sum(parts, axis=0), scores, rtol=1e-4, atol=1e-5)
    attributes = run.array(SCORES).attrs
    assert attributes["sign"] == "positive = helpful, negative = harmful"
    assert find_damage(run).damaged == {}


def test_the_bytes_do_not_depend_on_shards(carry_out, make_s_test, fresh_root):
    spec = influence(make_s_test())
    whole = carry_out(spec).read_rows(SCORES, 0, N)
    cut = carry_out(spec, shard_rows=256, root=fresh_root()).read_rows(SCORES, 0, N)
    assert np.array_equal(whole, cut)


def test_checkpoints_add_up_and_seeds_are_averaged(carry_out, make_s_test, checkpoint):
    first = TrainedCheckpoint(train=checkpoint.train, epoch=1)
    both = [make_s_test(checkpoint=at, solver=IdentitySettings()) for at in (first, checkpoint)]
    alone = [carry_out(influence(s_test)).read_rows(SCORES, 0, N) for s_test in both]
    total = carry_out(influence(*both)).read_rows(SCORES, 0, N)
    np.testing.assert_allclose(total, alone[0] + alone[1], rtol=1e-4, atol=1e-5)
    mean = carry_out(influence(*both, combine="mean")).read_rows(SCORES, 0, N)
    np.testing.assert_allclose(mean, total / 2, rtol=1e-5, atol=1e-6)


def test_relative_to_the_identity_is_the_gradients_length(
    carry_out, make_s_test, network, digits_task
):
    spec = make_s_test(solver=IdentitySettings(), modules=("conv2", "head"))
    plain = carry_out(influence(spec)).read_rows(SCORES, 0, N)
    divided = carry_out(influence(spec, relative="theta")).read_rows(SCORES, 0, N)
    ids = torch.arange(0, N, 31)
    space = ParameterSpace(network, ["conv2", "head"])
    batch = digits_task.batch(ids, Draw(0))
    gradients = gradients_one_by_one(network, list(space.shapes), digits_task.losses, batch)
    length_B = space.join(gradients).norm(dim=1).numpy()
    clear = (
        length_B > 0.01 * length_B.max()
    )  # smaller gradients have less than two digits left in float32
    assert clear.sum() > 5
    expected = plain[:, ids] / length_B
    np.testing.assert_allclose(divided[:, ids][:, clear], expected[:, clear], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("relative", ["theta", "loss"])
def test_relative_scores_are_divided_by_the_sizes_that_solutions_have(
    carry_out, make_s_test, network, digits_task, relative
):
    """Of x = (G + lambda I)^-1 g, solved for: |x| on the parameters, sqrt(g . x) on the losses."""
    layers = ("conv2", "head")
    spec = make_s_test(modules=layers, solver=EkFacSettings(damping=0.05))
    plain = carry_out(influence(spec)).read_rows(SCORES, 0, N)
    divided = carry_out(influence(spec, relative=relative)).read_rows(SCORES, 0, N)
    ids = torch.arange(0, N, 31)
    space = ParameterSpace(network, layers)
    batch = digits_task.batch(ids, Draw(0))
    gradients = gradients_one_by_one(network, list(space.shapes), digits_task.losses, batch)
    g_BP = space.join(gradients).float()
    samples = curvature_samples(digits_task, spec.curvature)
    x_BP = (
        EkFac(0.05, targets="sampled")
        .solve(GaussNewton(network, space, digits_task, samples), g_BP)
        .x_QP
    )
    size_B = x_BP.norm(dim=1) if relative == "theta" else (g_BP * x_BP).sum(dim=1).sqrt()
    clear = g_BP.norm(dim=1) > 0.01 * g_BP.norm(dim=1).max()  # others are rounding
    assert clear.sum() > 5
    expected = (plain[:, ids] / size_B.numpy())[:, clear]
    np.testing.assert_allclose(divided[:, ids][:, clear], expected, rtol=1e-2)


def test_the_curvature_subset_shares_no_random_stream_with_the_solver(
    carry_out, make_s_test, digits_task, fresh_root, monkeypatch
):
    keys: Counter[tuple[int, ...]] = Counter()
    philox = np.random.Philox

    def noted(*, key, **more):
        keys[tuple(key)] += 1
        return philox(key=key, **more)

    monkeypatch.setattr(np.random, "Philox", noted)
    spec = make_s_test(solver=LissaSettings(damping=0.5, scale=30.0, depth=5, repeats=3))
    root = fresh_root()
    carry_out(spec, root=root)
    of_the_run = set(keys)
    keys.clear()
    curvature_samples(digits_task, spec.curvature)
    assert len(keys) == 1
    assert len(of_the_run) == 3 + 1  # one a repeat, and the subset's
    assert of_the_run > set(keys)


def test_a_view_says_how_well_its_vectors_solve_the_equation(carry_out, make_s_test):
    said, samples, halves = view_of(carry_out(make_s_test())).certainty()
    solutions = carry_out(make_s_test()).read_table("solutions")
    residual, steps = (max(solutions.column(n).to_pylist()) for n in ("residual", "iterations"))
    assert said == f"lambda = 0.1; residual up to {residual:.2g}, {steps} steps"
    assert samples.startswith("curvature of 200 of 1,500 samples")
    cosines = json.loads(solutions.column("record")[0].as_py())["cosines_of_halves"]
    assert len(cosines) == 3
    assert f"have cosines from {min(cosines):.2f}" in halves
    assert min(solutions.column("iterations").to_pylist()) < steps
    lissa = LissaSettings(damping=0.5, scale=30.0, depth=60, batch_size=16, repeats=5)
    first, *messages = view_of(carry_out(make_s_test(solver=lissa))).certainty()
    assert first.startswith("lambda = 0.5; ")
    assert f"the recursion's own damping {0.5 / 30:.4g} x scale 30, batches of 16" in first
    assert len(set(messages)) == len(messages)


def test_the_two_relative_forms_divide_by_two_sizes(carry_out, make_s_test):
    spec = make_s_test(modules=("conv2", "head"), solver=EkFacSettings(damping=0.1))
    plain = carry_out(influence(spec)).read_rows(SCORES, 0, N)
    theta = plain / carry_out(influence(spec, relative="theta")).read_rows(SCORES, 0, N)
    loss = plain / carry_out(influence(spec, relative="loss")).read_rows(SCORES, 0, N)
    # A sample's size is the same for all queries; and g^T H^-2 g <= g^T H^-1 g / lambda.
    np.testing.assert_allclose(theta[0], theta[1], rtol=1e-2)
    assert (theta[0] <= loss[0] / np.sqrt(0.1) * 1.001).all()
    assert not np.allclose(theta[0] / loss[0], (theta[0] / loss[0])[0], rtol=1e-2)


def test_a_size_that_was_found_in_bfloat16_is_for_that_alone(make_s_test, scores_root):
    keys = {
        _key(open_job(Run.create(str(scores_root), make_spec(InfluenceSpec, **fields))))
        for s_test in [make_s_test()]
        for fields in [
            {"task": s_test.task, "s_tests": (s_test,), "sample_precision": precision}
            for precision in (None, "bfloat16")
        ]
    }
    assert len(keys) == 2
