"""Stores of projected gradients and scores from them, compared with explicit gradients."""

import shutil

import numpy as np
import pytest
import torch

from influence_jobs.errors import RuntimeFault, SpecError
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.projections import projections
from influence_jobs.gradients.reference import gradients_one_by_one
from influence_jobs.kinds import view_of
from influence_jobs.kinds.gradient_index.job import nearest, new_index
from influence_jobs.kinds.gradient_scores.spec import GradientScoresSpec
from influence_jobs.kinds.gradients.spec import GradientsSpec
from influence_jobs.kinds.gradients.store import GradientStore
from influence_jobs.kinds.gram.spec import GramSpec
from influence_jobs.specs.base import make_spec
from influence_jobs.store.checkpoints import load_checkpoint
from influence_jobs.store.layout import GRAM, SCORES, gradients_name, part_name
from influence_jobs.store.run import Run
from influence_jobs.store.verify import find_damage
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.placement import to_type

MODULES = ("conv2", "head")
N = 1500


@pytest.fixture(scope="module")
def store_of(grad_norms_spec, checkpoint):
    def make(**fields) -> GradientsSpec:
        chosen = {
            "task": grad_norms_spec.task,
            "checkpoint": checkpoint,
            "modules": MODULES,
            "outputs": 4,
            "inputs": 5,
            "stored": "float32",
            "precision": "float64",
        }
        return make_spec(GradientsSpec, **(chosen | fields))

    return make


@pytest.fixture(scope="module")
def scores_of(grad_norms_spec, queries):
    def make(*stores: GradientsSpec, **fields) -> GradientScoresSpec:
        chosen = {"task": grad_norms_spec.task, "gradients": stores, "queries": queries}
        return make_spec(GradientScoresSpec, **(chosen | fields))

    return make


@pytest.fixture(scope="module")
def explicit(digits_task, checkpoint, scores_root, queries):
    """P g of all samples and of the queries, and their losses, in float64: {group: (N + Q, D)}."""
    model = digits_task.model()
    load_checkpoint(model, str(scores_root), checkpoint)
    model = model.double().eval()
    space = ParameterSpace(model, MODULES)
    maps = projections(
        model, space, outputs=4, inputs=5, distribution="gaussian", seed=0, whole=False
    )
    tests = torch.tensor([query.test for query in queries.items])
    rows: dict[str, list] = {group: [] for group in maps}
    losses = []
    for batch in (
        digits_task.batch(torch.arange(N), Draw(0)),
        digits_task.test_batch(tests, Draw(0)),
    ):
        batch = to_type(batch, torch.float64)
        found = gradients_one_by_one(model, [*space.shapes], digits_task.losses, batch)
        for group, of_group in maps.items():
            parts = [
                one.to(torch.device("cpu"), torch.float64)(found[name])
                for name, one in of_group.items()
            ]
            rows[group].append(torch.stack(parts).sum(0).flatten(1).numpy())
        with torch.no_grad():
            losses.append(digits_task.losses(model, batch).numpy())
    return {g: np.concatenate(parts) for g, parts in rows.items()}, np.concatenate(losses)


def test_the_store_holds_the_projections(carry_out, store_of, explicit, fresh_root):
    spec, (expected, losses) = store_of(), explicit
    run = carry_out(spec)
    for group in MODULES:
        found = run.read_rows(gradients_name(group), 0, N)
        scale = np.abs(expected[group]).max()
        np.testing.assert_allclose(found, expected[group][:N], rtol=1e-5, atol=1e-7 * scale)
    np.testing.assert_allclose(run.read_rows("losses", 0, N), losses[:N], rtol=1e-5, atol=1e-9)
    # Other shards, in a folder of its own: the same bytes.
    again = carry_out(spec, shard_rows=300, root=fresh_root())
    assert [s["id"] for s in run.plan()["shards"]] != [s["id"] for s in again.plan()["shards"]]
    for name in run.array_names():
        assert np.array_equal(run.read_rows(name, 0, N), again.read_rows(name, 0, N)), name
    assert view_of(run).certainty()


@pytest.mark.parametrize("stored", ["float16", "int8", "1-bit"])
def test_rounded_stores_say_how_they_are_read(carry_out, store_of, explicit, stored):
    spec, (expected, _) = store_of(stored=stored), explicit
    run = carry_out(spec)
    store = GradientStore(run.root, spec)
    assert store.sizes == {"conv2": 20, "head": 20}
    for group in MODULES:
        rows = store.rows(group, 0, N)
        queries = rows[:3] + 1
        dots = store.dots(queries, group, 0, N)
        np.testing.assert_allclose(dots, queries @ rows.T, rtol=1e-4, atol=1e-6 * dots.max())
        cosines = (rows * expected[group][:N]).sum(1) / (
            np.linalg.norm(rows, axis=1) * np.linalg.norm(expected[group][:N], axis=1)
        )
        assert np.median(cosines) > (0.7 if stored == "1-bit" else 0.999)


def missed(losses):
    """1 - p, of which less than 1e-6 is taken for rounding."""
    return np.maximum(1 - np.exp(-losses), 1e-6)


def dense(expected, losses, method: str, damping: float) -> np.ndarray:
    """The scores by their formulas, layer by layer, (Q, N)."""
    margin = method == "trak"
    # Of the margin: - gradient of the loss / (1 - p).
    factors = -1 / missed(losses) if margin else np.ones_like(losses)
    total = np.zeros((len(losses) - N, N))
    for rows in expected.values():
        rows = rows * factors[:, None]
        samples, queries = rows[:N], rows[N:]
        if method in ("influence", "trak"):
            gram = samples.T @ samples / N
            gram += damping * np.trace(gram) / len(gram) * np.eye(len(gram))
            queries = np.linalg.solve(gram, queries.T).T
        part = queries @ samples.T
        total += part * missed(losses[:N]) if margin else part
    if method == "cosine":
        whole = np.concatenate([*expected.values()], axis=1)
        sizes = np.linalg.norm(whole, axis=1)
        total /= sizes[N:, None] * sizes[:N]
    return total


@pytest.mark.parametrize("method", ["influence", "trak", "dot", "cosine"])
def test_scores_are_those_of_their_formulas(carry_out, store_of, scores_of, explicit, method):
    rows, losses = explicit
    expected = dense(rows, losses, method, 0.3)
    run = carry_out(scores_of(store_of(), method=method, damping=0.3))
    found = run.read_rows(SCORES, 0, N)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4 * np.abs(expected).max())
    assert find_damage(run).damaged == {}
    assert "positive = helpful" in run.array(SCORES).attrs["sign"]


def test_scores_need_neither_the_model_nor_the_data(
    carry_out, store_of, scores_of, queries, monkeypatch, digits_task
):
    store = store_of()
    spec = scores_of(store, method="dot")
    for needed in (store, *spec.of_queries):
        carry_out(needed)

    def gone(self):
        raise AssertionError("the task was asked")

    for name in ("train_data", "test_data", "model"):
        monkeypatch.setattr(type(digits_task), name, gone)
    run = carry_out(spec, shard_rows=600)
    assert np.isfinite(run.read_rows(SCORES, 0, N)).all()
    assert run.read_table("samples").num_rows == N
    assert run.read_table("queries").num_rows == 3


def test_layers_add_up_and_stores_are_combined(carry_out, store_of, scores_of):
    first, second = store_of(), store_of(seed=1)
    kept = carry_out(scores_of(first, method="dot", keep_modules=True))
    parts = [kept.read_rows(part_name(layer), 0, N) for layer in MODULES]
    scores = kept.read_rows(SCORES, 0, N)
    np.testing.assert_allclose(scores, np.sum(parts, axis=0), rtol=1e-4, atol=1e-6)
    other = carry_out(scores_of(second, method="dot")).read_rows(SCORES, 0, N)
    assert np.abs(other - scores).max() > 0.01 * np.abs(scores).max()  # another projection
    for combine, factor in (("sum", 1.0), ("mean", 0.5)):
        both = carry_out(scores_of(first, second, method="dot", combine=combine))
        found = both.read_rows(SCORES, 0, N)
        np.testing.assert_allclose(found, factor * (scores + other), rtol=1e-4, atol=1e-5)


def test_second_moments(carry_out, store_of, explicit):
    expected, losses = explicit
    for quantity in ("loss", "margin"):
        spec = make_spec(GramSpec, task=store_of().task, gradients=store_of(), quantity=quantity)
        run = carry_out(spec)
        for i, group in enumerate(run.array(GRAM).attrs["layers"]):
            rows = expected[group][:N]
            if quantity == "margin":
                rows = rows / missed(losses[:N])[:, None]
            gram = rows.T @ rows / N
            found = run.read_rows(GRAM, i, i + 1)[0]
            np.testing.assert_allclose(found, gram, rtol=1e-3, atol=1e-5 * np.abs(gram).max())


def test_a_lost_chunk_is_told(carry_out, store_of, scores_of, fresh_root, queries):
    root = fresh_root()
    store = store_of(stored="int8")
    run = carry_out(store, root=root)
    shutil.rmtree(root / run.id / "data.zarr" / gradients_name("head") / "c")
    with pytest.raises(RuntimeFault, match="missing"):
        carry_out(scores_of(store, method="dot"), root=root)


def test_stores_that_do_not_go_together_are_refused(store_of, scores_of):
    for other, said in (
        (store_of(modules=("head",)), "other layers"),
        (store_of(), "named twice"),
    ):
        with pytest.raises(SpecError, match=said):
            scores_of(store_of(), other)
    with pytest.raises(SpecError, match="not a sum over layers"):
        scores_of(store_of(), method="cosine", keep_modules=True)


@pytest.mark.parametrize("method", ["influence", "trak", "dot", "cosine"])
def test_an_index_finds_the_top_samples(carry_out, store_of, scores_of, method):
    store, k = store_of(), 100
    exact = carry_out(scores_of(store, method=method)).read_rows(SCORES, 0, N)
    spec = scores_of(store, method=method, approximate=k)
    run = carry_out(spec, shard_rows=600)
    found = run.read_rows(SCORES, 0, N)
    there = ~np.isnan(found)
    assert (there.sum(axis=1) <= 2 * k).all()
    scale = np.abs(exact).max(axis=1, keepdims=True)
    assert (np.abs(found - exact) / scale)[there].max() < 5e-3  # bfloat16
    shared = [
        len({*np.argsort(side * e)[:k]} & {*np.flatnonzero(~np.isnan(f))}) / k
        for e, f in zip(exact, found, strict=True)
        for side in (1, -1)
    ]
    assert np.mean(shared) > 0.85
    index = Run(run.root, spec.index)
    recall = index.read_table("recall").column("recall").to_numpy()
    assert len(recall) == 32
    assert np.mean(recall) > 0.85
    assert find_damage(index).damaged == {}
    assert f"finds {100 * np.mean(recall):.1f} % of the 100" in " ".join(view_of(run).certainty())
    assert (
        f"the {k} largest and smallest that an index finds" in run.array(SCORES).attrs["quantity"]
    )


def test_an_index_of_long_vectors(tmp_path):
    generator = np.random.default_rng(0)
    few = generator.standard_normal((4000, 60)) * generator.exponential(size=(4000, 1))
    rows = (few @ generator.standard_normal((60, 700))).astype(np.float32)
    rows *= np.float32(1e-9)  # as small as gradients may be
    index = new_index(700)
    index.train(rows)
    index.add(rows)
    ids, values = nearest(index, rows[:20], 50)
    dots = rows[:20] @ rows.T
    shared = [len({*a} & {*np.argsort(-e)[:50]}) / 50 for a, e in zip(ids, dots, strict=True)]
    assert np.mean(shared) > 0.9
    exact = np.take_along_axis(dots, ids, axis=1)
    assert np.abs(values - exact).max() < 5e-3 * np.abs(exact).max()


def test_what_an_index_cannot_do_is_refused(store_of, scores_of):
    with pytest.raises(SpecError, match="an index is of one store"):
        scores_of(store_of(), store_of(seed=1), approximate=5)
    with pytest.raises(SpecError, match="no scores of single layers"):
        scores_of(store_of(), approximate=5, keep_modules=True)


def test_a_store_that_is_cut_off_ends_with_the_same_bytes(
    carry_out, store_of, fresh_root, monkeypatch
):
    spec, root = store_of(stored="float16"), fresh_root()
    whole = carry_out(spec)
    real, written = Run.write_rows, []

    def write_rows(run, name, start, values):
        if run.spec == spec:
            written.append(name)
            if len(written) == 9:  # within the second shard
                raise KeyboardInterrupt
        return real(run, name, start, values)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_rows", write_rows)
        with pytest.raises(KeyboardInterrupt):
            carry_out(spec, root=root, shard_rows=512)
    assert len(Run.open(str(root), spec.run_id).manifest.done()) == 1
    again = carry_out(spec, root=root)
    attempts = [entry.attempt for entry in again.manifest.done().values()]
    assert max(attempts) == 2
    assert attempts.count(2) == 1
    for name in whole.array_names():
        assert np.array_equal(whole.read_rows(name, 0, N), again.read_rows(name, 0, N)), name
