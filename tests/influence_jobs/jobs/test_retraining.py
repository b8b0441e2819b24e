"""Ablation and LDS runs, compared with trainings by `Trainer`, one at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.errors import RuntimeFault, SpecError
from influence_jobs.experiments.lds import subset
from influence_jobs.jobs import retraining
from influence_jobs.jobs.recipe import recipe_of
from influence_jobs.kinds import open_job
from influence_jobs.kinds.baseline.spec import BaselineSpec
from influence_jobs.kinds.lds.spec import LdsSpec
from influence_jobs.kinds.train.spec import TrainSpec
from influence_jobs.specs.base import make_spec
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.specs.rankings import Ranking
from influence_jobs.store.run import Run
from influence_jobs.store.verify import find_damage, mark_undone
from influence_jobs.tasks.base import Draw
from influence_jobs.training.changes import Changes
from influence_jobs.training.ensemble import Variant
from influence_jobs.training.train import Trainer, initial_model

N = 1500


def alone(task, recipe: TrainSpec, seed: int, changes: Changes) -> torch.nn.Module:
    trainer = Trainer(
        task, recipe_of(recipe), seed=seed, device=torch.device("cpu"), changes=changes
    )
    while not trainer.finished:
        trainer.step()
    return trainer.model.eval()


def table(run: Run, name: str) -> list[dict[str, Any]]:
    return run.read_table(name).to_pylist()


def test_each_row_is_what_a_training_of_its_own_gives(
    carry_out, grid, digits_task, recipe, queries
) -> None:
    run = carry_out(grid(seeds=(3, 4)))
    rows = table(run, "results")
    assert len(rows) == 2 * 2 * 2 * 3
    assert find_damage(run).damaged == {}
    labels = digits_task.targets(digits_task.batch(torch.arange(N), Draw(0))).numpy()
    scores = {
        ranking.name: Run(run.root, ranking.scores[0]).read_rows("scores", 0, N)
        for ranking in run.spec.rankings
    }
    tests = [query.test for query in queries.items]
    batch = digits_task.test_batch(torch.tensor(tests), Draw(0))
    for row in (rows[1], rows[5], rows[8], rows[-1]):
        ids = np.argsort(-scores[row["by"]][row["query"]], kind="stable")[:100]
        query_label = int(digits_task.targets(batch)[row["query"]])
        new = np.full(100, 1 if query_label == 0 else 0)
        changes = {
            "remove": Changes(removed=ids),
            "relabel": Changes(relabelled=ids, labels=new),
        }[row["mode"]]
        for found, made in (("", changes), ("_before", Changes())):
            model = alone(digits_task, recipe, row["seed"], made)
            with torch.no_grad():
                expected = digits_task.losses(model, batch)[row["query"]]
                decision = digits_task.outputs(model, batch)[row["query"]].argmax()
            assert row[f"loss{found}"] == pytest.approx(float(expected), rel=1e-3)
            assert row[f"decision{found}"] == int(decision)
    assert {row["mode"] for row in rows} == {"relabel", "remove"}
    assert labels.shape == (N,)


def test_the_same_run_masks_what_it_would_remove(
    carry_out, grid, loss, digits_task, recipe, queries
) -> None:
    run = carry_out(grid(modes=("remove",), rankings=(loss,), same_run=True))
    row = table(run, "results")[1]
    scores = Run(run.root, loss.scores[0]).read_rows("scores", 0, N)
    ids = np.argsort(-scores[row["query"]], kind="stable")[:100]
    batch = digits_task.test_batch(torch.tensor([query.test for query in queries.items]), Draw(0))
    for name, made in (("loss", Changes(masked=ids)), ("loss_before", Changes())):
        model = alone(digits_task, recipe, row["seed"], made)
        with torch.no_grad():
            expected = digits_task.losses(model, batch)[row["query"]]
        assert row[name] == pytest.approx(float(expected), rel=1e-3)
    removed = table(carry_out(grid(modes=("remove",), rankings=(loss,))), "results")[1]
    assert removed["loss_before"] == row["loss_before"]
    assert abs(removed["loss"] - row["loss"]) > 1e-3 * row["loss"]


def test_masks_are_only_of_removals(grid) -> None:
    assert grid(modes=("relabel",), same_run=True).run_id == grid(modes=("relabel",)).run_id
    assert grid(same_run=True).run_id != grid().run_id


def test_a_larger_grid_trains_only_what_is_new(carry_out, grid, fresh_root, trained) -> None:
    root = fresh_root()
    small = carry_out(grid(), root=root)
    # One unchanged model; `loss` ranks the same for all queries, so its removals are one model.
    first = set(trained)
    assert set(trained.values()) == {1}
    large = carry_out(grid(sizes=(100, 200), modes=("remove",)), root=root)
    assert set(trained.values()) == {1}
    assert len(trained) == len(first) + 3 + 1
    kept = [row for row in table(large, "results") if row["k"] == 100]
    assert kept == [row for row in table(small, "results") if row["mode"] == "remove"]


def test_a_model_of_other_labels_is_another_model(
    carry_out, grid, random, fresh_root, trained
) -> None:
    root, chosen = fresh_root(), {"modes": ("relabel",), "rankings": (random,)}
    found = [table(carry_out(grid(**chosen, relabel=rule), root=root), "results")
             for rule in ("report", "next")]  # fmt: skip
    # Of either rule a model a query, and the one that nothing was done to.
    assert len(trained) == 2 * 3 + 1
    assert set(trained.values()) == {1}
    for before, after in zip(*found, strict=True):
        assert before["loss_before"] == after["loss_before"]
        assert before["loss"] != after["loss"]


def test_the_key_of_a_model_has_all_that_distinguishes_its_training_in_any_order() -> None:
    def key(seed: int, removed: list[int], relabelled: list[int], labels: list[int]) -> str:
        changes = Changes(*(np.array(values) for values in (removed, relabelled, labels)))
        return retraining._key(Variant(seed, changes))

    whole = key(0, [9, 7], [3, 5, 1], [1, 2, 3])
    others = {
        key(1, [9, 7], [3, 5, 1], [1, 2, 3]),
        key(0, [9, 8], [3, 5, 1], [1, 2, 3]),
        key(0, [9, 7], [3, 5, 2], [1, 2, 3]),
        key(0, [9, 7], [3, 5, 1], [1, 2, 4]),
        key(0, [9, 7], [3, 5, 1], [2, 1, 3]),
    }
    assert len(others - {whole}) == 5
    assert key(0, [7, 9], [1, 5, 3], [3, 2, 1]) == whole


def test_shards_of_any_size_give_the_same_table(carry_out, grid, fresh_root) -> None:
    runs = [carry_out(grid(), root=fresh_root(), shard_rows=rows) for rows in (1, 5, 100)]
    whole, *others = (table(run, "results") for run in runs)
    for other in others:
        for a, b in zip(whole, other, strict=True):
            # Other ensembles round otherwise, and ReLUs may amplify that.
            assert a["loss"] == pytest.approx(b["loss"], rel=0.02, abs=2e-3)
            assert a.keys() == b.keys()
            assert all(a[name] == b[name] for name in ("query", "k", "mode", "by", "seed"))


def test_more_samples_than_are_scored_cannot_be_taken(
    carry_out, grid, grad_norms_spec, queries, checkpoint, fresh_root
) -> None:
    from influence_jobs.kinds.attribution.spec import AttributionSpec

    few = make_spec(
        AttributionSpec,
        task=grad_norms_spec.task,
        norms=grad_norms_spec,
        checkpoint=checkpoint,
        layers=("conv1",),
        queries=queries,
        exclude_norm_above=1e-9,
    )
    ranking = Ranking(name="attribution", scores=(few,))
    with pytest.raises(RuntimeFault, match="scores 0 samples only"):
        carry_out(grid(rankings=(ranking,)), root=fresh_root())


@pytest.fixture(scope="module")
def lds_spec(grad_norms_spec, recipe, random, loss):
    def make(**fields: Any) -> LdsSpec:
        chosen = {
            "task": grad_norms_spec.task,
            "recipe": recipe,
            "rankings": (random, loss),
            "seeds": (0, 1),
            "subsets": 6,
        }
        return make_spec(LdsSpec, **(chosen | fields))

    return make


def expected_lds(run: Run, task, recipe: TrainSpec, tests: list[int]) -> Iterator[float]:
    """Spearman's correlation of minus summed scores and losses of models trained one by one."""
    spec: Any = run.spec
    batch = task.test_batch(torch.tensor(tests), Draw(0))
    losses, sums = [], []
    scores_QN = Run(run.root, spec.rankings[0].scores[0]).read_rows("scores", 0, N)
    for index in range(6):
        kept = subset(N, 0.5, index)
        removed = np.setdiff1d(np.arange(N), kept)
        seeds = (index, index + 2**32)
        models = [alone(task, recipe, seed, Changes(removed=removed)) for seed in seeds]
        with torch.no_grad():
            losses.append(np.mean([task.losses(m, batch).numpy() for m in models], axis=0))
        sums.append(scores_QN[:, kept].sum(1))
    for query in range(len(tests)):
        yield spearmanr(-np.array(sums)[:, query], np.array(losses)[:, query]).statistic


def test_lds_is_the_correlation_of_summed_scores_with_losses_of_retrained_models(
    carry_out, lds_spec, digits_task, recipe, queries, trained, fresh_root
) -> None:
    root = fresh_root()
    run = carry_out(lds_spec(), root=root)
    tests = [query.test for query in queries.items]
    found = [row["lds"] for row in table(run, "results") if row["method"] == "random"]
    assert found == pytest.approx(list(expected_lds(run, digits_task, recipe, tests)), abs=1e-6)
    assert len(trained) == 12
    for summary in table(run, "summary"):
        rows = [r for r in table(run, "results") if r["method"] == summary["method"]]
        known = [r["lds"] for r in rows if not np.isnan(r["lds"])]
        assert summary["queries"] == len(known)
        # Losses rank alike for all queries, and what predicts nothing has no mean.
        mean = np.mean(known) if known else np.nan
        assert summary["mean_lds"] == pytest.approx(mean, nan_ok=True)
        assert [r["test"] for r in rows] == tests
    # Another method and another ensemble use the same trainings.
    both = Ranking(name="both", scores=tuple(r.scores[0] for r in run.spec.rankings))
    again = carry_out(lds_spec(rankings=(both,), subsets=8), root=root)
    assert len(trained) == 16
    carry_out(lds_spec(seeds=(0, 1, 2)), root=root)
    assert len(trained) == 22
    assert set(trained.values()) == {1}
    assert {row["method"] for row in table(again, "summary")} == {"both"}
    before = {(r["subset"], r["query"]): r["loss"] for r in table(run, "losses")}
    after = {(r["subset"], r["query"]): r["loss"] for r in table(again, "losses")}
    assert before.items() <= after.items()


def test_trainings_of_a_subset_have_initial_weights_of_their_own(lds_spec, digits_task) -> None:
    """torch takes the low 32 bits of a seed; earlier runs had one start for all of a subset."""

    def starts(**fields: Any) -> int:
        job: Any = open_job(Run("unused", lds_spec(**fields)))
        seeds = [job.variant(row).seed for row in range(12)]
        models = [initial_model(digits_task, seed, torch.device("cpu")) for seed in seeds]
        return len({model.head.weight.detach().numpy().tobytes() for model in models})

    assert starts(own_starts=True) == 12
    assert starts() == 6
    assert lds_spec(seeds=(0,), own_starts=True) == lds_spec(seeds=(0,))


def test_the_lds_of_the_same_run_repeats_it_with_the_others_masked(
    carry_out, lds_spec, digits_task, recipe, queries, random, trained, fresh_root
) -> None:
    run = carry_out(
        lds_spec(same_run=True, seeds=(3,), fraction=0.9, rankings=(random,)), root=fresh_root()
    )
    assert len(trained) == 6
    batch = digits_task.test_batch(torch.tensor([query.test for query in queries.items]), Draw(0))
    losses = run.read_rows("losses", 0, 6)
    for index in range(6):
        masked = np.setdiff1d(np.arange(N), subset(N, 0.9, index))
        assert len(masked) == N // 10
        model = alone(digits_task, recipe, 3, Changes(masked=masked))
        with torch.no_grad():
            expected = digits_task.losses(model, batch).numpy()
        # In float32, and other subsets are further away than rounding is.
        np.testing.assert_allclose(losses[index], expected, rtol=0.02)
        assert not np.allclose(losses[index - 1], expected, rtol=0.04)


def test_the_same_run_has_one_seed(lds_spec) -> None:
    with pytest.raises(SpecError, match="leave --seeds out with --same-run"):
        lds_spec(same_run=True)


def test_a_ranking_by_smallest_scores_has_no_lds(lds_spec, random) -> None:
    turned = random.model_copy(update={"largest": False, "name": "harmful"})
    with pytest.raises(SpecError, match="leave method harmful out"):
        lds_spec(rankings=(random, turned))


def test_scores_and_trainings_of_other_samples_are_not_mixed(
    grid, grad_norms_spec, recipe, random
) -> None:
    other = grad_norms_spec.task.model_copy(update={"options": {"width": 9}})
    with pytest.raises(SpecError, match="of another option width"):
        grid(task=other)
    with pytest.raises(SpecError, match="of another option width"):
        grid(recipe=recipe.model_copy(update={"task": other}))
    scores = random.scores[0].model_copy(update={"task": other})
    with pytest.raises(SpecError, match=r"baseline-.* is of another option width"):
        grid(rankings=(Ranking(name="random", scores=(scores,)),))
    # An option that trainings do not look at, such as a noise level of attribution.
    more = {"options": {"width": 8, "sigma": 9.0}}
    grid(task=grad_norms_spec.task.model_copy(update=more))


def test_a_wide_shard_is_cut_into_ensembles_of_the_fastest_width(
    grid, fresh_root, trained, monkeypatch
) -> None:
    monkeypatch.setattr(retraining, "MEASURED_STEPS", 0)
    monkeypatch.setattr(retraining, "measure_widths", lambda *_a, **_k: {1: 5.0, 4: 9.0, 8: 7.0})
    widths = []
    make = retraining.RetrainJob._trainer

    def noted(self, variants, **how):
        widths.append(len(variants))
        return make(self, variants, **how)

    monkeypatch.setattr(retraining.RetrainJob, "_trainer", noted)
    root: Path = fresh_root()
    run = Run.create(str(root), grid(modes=("remove",)))
    drive(run.root, run.id, InlineBackend(), shard_rows=100)
    # 3 without random samples and 1 without those of the largest loss; 1 unmanipulated.
    assert widths == [4, 1]
    # The width that the run's first worker measured stays.
    monkeypatch.setattr(retraining, "measure_widths", lambda *_a, **_k: {1: 5.0})
    for folder in root.glob("retrained-*"):
        folder.rename(root / "gone")
    mark_undone(run, dict.fromkeys(run.manifest.done(), ""))
    drive(run.root, run.id, InlineBackend())
    assert widths == [4, 1, 4, 1]
    assert set(trained.values()) == {2}
    assert len(trained) == 5


def test_a_network_that_is_faster_alone_is_trained_alone_and_as_well(
    grid, random, fresh_root, trained, monkeypatch
) -> None:
    chosen = grid(modes=("remove",), rankings=(random,))
    rows = {}
    for alone in (False, True):
        monkeypatch.setattr(retraining, "COMPARED_STEPS", 0 if alone else 10**9)
        monkeypatch.setattr(retraining, "faster_alone", lambda *_, **__: True)
        run = Run.create(str(fresh_root()), chosen)
        drive(run.root, run.id, InlineBackend())
        width = json.loads(run.files.read("width.json"))["variants_side_by_side"]
        assert width == (1 if alone else 32)
        rows[alone] = table(run, "results")
    for one, other in zip(rows[True], rows[False], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02, abs=2e-3)
    assert set(trained.values()) == {2}


def test_a_network_that_cannot_be_stacked_is_trained_one_variant_at_a_time(
    grid, random, fresh_root, trained, monkeypatch
) -> None:
    import digits

    plain = digits.DigitsTask.model
    monkeypatch.setattr(
        digits.DigitsTask,
        "model",
        lambda self: torch.nn.Sequential(plain(self), torch.nn.Dropout(0.1)),
    )
    widths = []
    make = retraining.RetrainJob._trainer

    def noted(self, variants, **how):
        widths.append(len(variants))
        return make(self, variants, **how)

    monkeypatch.setattr(retraining.RetrainJob, "_trainer", noted)
    run = Run.create(str(fresh_root()), grid(modes=("remove",), rankings=(random,)))
    drive(run.root, run.id, InlineBackend())
    assert widths == [1, 1, 1, 1]
    assert len(trained) == 4


def test_each_query_is_measured_in_its_region_and_on_average_over_noise(
    grad_norms_spec, recipe, trained_root, monkeypatch
) -> None:
    import digits

    plain = digits.DigitsTask.test_batch

    def noisy(self, ids, draw):
        images, labels = plain(self, ids, draw)
        return images + (1 + draw.index) * draw.seed, labels

    def measure(self, model, batch, quantity, region):
        images, labels = batch
        y, x, height, width = region or (0, 0, 8, 8)
        return (images + labels[:, None, None, None])[:, 0, y : y + height, x : x + width].sum(
            (1, 2)
        )

    monkeypatch.setattr(digits.DigitsTask, "test_batch", noisy)
    monkeypatch.setattr(digits.DigitsTask, "measure", measure)
    monkeypatch.setattr(
        digits.DigitsTask, "test_size", lambda _, test: None if test < 9 else (8, 8)
    )
    items = (Query(test=7), Query(test=11), Query(test=9, region=(1, 2, 3, 4)), Query(test=0))
    asked = Queries(items=items, noise_draws=2, seed=3)
    scores = make_spec(BaselineSpec, task=grad_norms_spec.task, method="random", queries=asked)
    ranking = Ranking(name="random", scores=(scores,))
    spec = make_spec(LdsSpec, task=recipe.task, recipe=recipe, rankings=(ranking,))
    job: Any = open_job(Run(str(trained_root), spec), device="cpu")
    values, decisions = job._measure()
    for row, query in enumerate(items):
        found = [
            measure(
                None,
                None,
                noisy(job.task, torch.tensor([query.test]), Draw(3, draw)),
                "",
                query.region,
            )
            for draw in range(2)
        ]
        assert values[row] == pytest.approx(float(sum(found)) / 2, rel=1e-6)
    assert not np.isnan(decisions).any()
    monkeypatch.setattr(digits.DigitsTask, "output_loss", "mse")
    assert np.isnan(job._measure()[1]).all()
    monkeypatch.setattr(digits.DigitsTask, "measure", lambda *_: torch.tensor([torch.nan]))
    with pytest.raises(SpecError, match="loss on a query is not finite: lower the learning rate"):
        job._measure()
