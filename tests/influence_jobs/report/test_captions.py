"""What is seen of rankings, norms and figures, and what cannot be asked for, against the store."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from digits import DigitsTask

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.errors import SpecError
from influence_jobs.kinds import view_of
from influence_jobs.kinds.train.spec import TrainedCheckpoint
from influence_jobs.store.run import Run
from influence_jobs.tasks.published import Published


@pytest.fixture(scope="module")
def recorded(runs_of_all_kinds) -> Run:
    """A training that records norms."""
    train = runs_of_all_kinds.train
    fields = {"norm_layers": ("conv2", "head"), "norm_skip_epochs": 0, "epochs": 1}
    spec = train.spec.model_copy(update={**fields, "save_epochs": (1,)})
    run = Run.create(train.root, spec)
    drive(run.root, run.id, InlineBackend())
    return run


def test_a_histogram_says_how_many_lie_beyond_its_line(
    recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals = np.asarray(recorded.array("norms/head")[:]).sum(axis=1, dtype=np.float64)

    def caption() -> str:
        return {shown.name: shown for shown in view_of(recorded).figures(print)}[
            "norms-head"
        ].caption

    last = np.percentile(totals, 99)
    rest = f"; the largest is {totals.max():.3g}, the median {np.median(totals):.3g}."
    beyond = (totals > last).sum()
    assert caption() == (
        f"{beyond:,} of 1,500 samples lie above {last:.3g}, the dashed line (the top 1 %){rest}"
    )
    limit = float(np.median(totals))
    known = Published(section="4.2", quick_epochs=1, norm_limit=limit)
    monkeypatch.setattr(DigitsTask, "published", known)
    beyond = (totals > limit).sum()
    assert 500 < beyond < 1000
    assert caption() == (
        f"{beyond:,} of 1,500 samples lie above {limit:.3g}, the dashed line, "
        f"the limit in the research report{rest}"
    )


def test_a_training_offers_its_recorded_norms(recorded, runs_of_all_kinds) -> None:
    view, plain = view_of(recorded), view_of(runs_of_all_kinds.train)
    stored = view.stored_norms
    assert stored is not None
    assert (stored.layers, stored.chosen) == (("conv2", "head"), ("head",))
    assert stored.checkpoint == TrainedCheckpoint(train=recorded.spec, epoch=1)
    assert view.next_step().startswith(f"infl top {recorded.id}")
    assert plain.stored_norms is None
    assert plain.next_step().startswith("infl submit grad-norms --layer all --checkpoint train-")
    whole = Run(recorded.root, recorded.spec)
    whole.spec = recorded.spec.model_copy(update={"norm_reduction": "layer"})
    assert view_of(whole).stored_norms is None
    kinds = runs_of_all_kinds
    norms = view_of(kinds.norms).stored_norms
    assert norms is not None
    assert (norms.layers, norms.chosen) == (("conv1", "conv2", "head"), ("head",))
    asked = view_of(kinds.attribution).stored_norms
    assert asked is not None
    assert asked.run.id == norms.run.id
    assert replace(asked, run=norms.run) == replace(norms, chosen=("conv2",))
    names = [shown.name for shown in view.figures(print)]
    assert names == ["training", "norms-conv2", "norms-head", "nodes"]


def test_what_norms_and_scores_cannot_be_asked_for(recorded, runs_of_all_kinds) -> None:
    kinds = runs_of_all_kinds
    with pytest.raises(SpecError, match="has norms, which do not depend on a query"):
        view_of(recorded).top(3, tests=[5])
    with pytest.raises(SpecError, match="has norms, which do not depend on a query"):
        view_of(recorded).top(3, side="helpful")
    with pytest.raises(SpecError, match="has no gradient norms: infl submit grad-norms"):
        view_of(kinds.train).top(3)
    with pytest.raises(SpecError, match="has no norms of layer conv9; it has conv2, head"):
        view_of(recorded).top(3, layer="conv9")
    with pytest.raises(SpecError, match="layer head has no channel 10; it has channels 0 to 9"):
        view_of(recorded).top(3, layer="head", channel=10)
    with pytest.raises(SpecError, match="has scores, which have no channels"):
        view_of(kinds.random).top(3, channel=0)
    with pytest.raises(SpecError, match="--side has no meaning for baseline-"):
        view_of(kinds.random).top(3, side="helpful")
    with pytest.raises(SpecError, match="has no query of test sample 7; it has 5, 0, 111"):
        view_of(kinds.influence).top(3, tests=[5, 7])
    with pytest.raises(SpecError, match="keeps no scores of layer conv2: leave --layer out"):
        view_of(kinds.influence).top(3, layer="conv2")
    with pytest.raises(SpecError, match="k = 0: k must be at least 1"):
        view_of(kinds.influence).top(0)
    with pytest.raises(SpecError, match="has no scores yet: infl submit influence --s-test"):
        view_of(kinds.s_test).top(3)
    assert len(view_of(kinds.influence).top(1)["scores"]) == 3 * 2


def test_the_caption_of_scores_counts_samples_and_labels(runs_of_all_kinds) -> None:
    run = runs_of_all_kinds.influence
    shown = {one.name: one for one in view_of(run).figures(print)}["top-helpful"]
    rows = shown.data.to_pylist()
    labels = {row["test"]: row["label"] for row in run.read_table("queries").to_pylist()}
    matching = sum(row["label"] == labels[row["test"]] for row in rows)
    assert 0 < matching < len(rows) == 15
    assert shown.caption == (
        f"Places: 15, different samples in them: {len({row['sample'] for row in rows})}. "
        f"Places with the label of their query (green frame): {matching}."
    )


def test_the_caption_of_seeds_counts_samples_that_came_once(runs_of_all_kinds) -> None:
    (shown,) = view_of(runs_of_all_kinds.stability).figures(print)
    times = Counter((row["test"], row["sample"]) for row in shown.data.to_pylist())
    once = sum(count == 1 for count in times.values())
    assert 0 < once < len(times)
    assert shown.caption == (
        f"The first 3 of 3 queries. Of the {len(times)} samples found in all, {once} come first "
        "after one training only."
    )
