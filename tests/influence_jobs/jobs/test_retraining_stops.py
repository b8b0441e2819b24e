"""Retrainings that are killed, damaged or diverge: finished models are kept and trained once."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.errors import RuntimeFault
from influence_jobs.jobs import retraining
from influence_jobs.store.retrained import Retrained
from influence_jobs.store.run import Run

N = 1500


def rows_of(run: Run) -> list[dict[str, Any]]:
    return run.read_table("results").to_pylist()


class Killed(BaseException):
    """No `Exception`: a worker does not survive it."""


def drive_until_kept(run: Run, count: int, *, shard_rows: int) -> set[str]:
    """Carry out a run until so many variants are kept, then die; returns their keys."""
    write, kept = Retrained.write, set()

    def killed(self: Retrained, key: str, weights: Any) -> None:
        if len(kept) == count:
            raise Killed
        write(self, key, weights)
        kept.add(key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Retrained, "write", killed)
        with pytest.raises(Killed):
            drive(run.root, run.id, InlineBackend(), shard_rows=shard_rows)
    return kept


@pytest.mark.parametrize("written", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_in_the_middle_no_finished_variant_is_trained_again(
    carry_out, grid, fresh_root, trained, written
) -> None:
    straight = carry_out(grid(), root=fresh_root(), shard_rows=4)
    expected = set(trained)
    trained.clear()
    run = Run.create(str(fresh_root()), grid())
    kept = drive_until_kept(run, written, shard_rows=4)
    (folder,) = Path(run.root).glob("retrained-*/checkpoints")
    half = folder / "a.pt.0123.partial"
    half.touch()
    os.utime(half, (0, 0))
    drive(run.root, run.id, InlineBackend())
    assert not half.exists()
    assert set(trained) == expected
    assert all(trained[key] == 1 for key in kept)
    if written == 3:  # the end of an ensemble: the others are trained in the same company
        for name in ("results", "summary"):
            assert run.read_table(name) == straight.read_table(name)
    else:
        for a, b in zip(rows_of(run), rows_of(straight), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=0.02, abs=2e-3)


def test_killed_while_keeping_an_ensemble_the_rest_of_it_goes_on_from_its_state(
    carry_out, grid, fresh_root, trained, monkeypatch
) -> None:
    monkeypatch.setattr("influence_jobs.jobs.saved_state.SAVE_EVERY_S", 0.0)
    monkeypatch.setattr("influence_jobs.jobs.saved_state.SAVE_SHARE", 1e9)
    straight = carry_out(grid(), root=fresh_root(), shard_rows=20)
    run = Run.create(str(fresh_root()), grid())
    drive_until_kept(run, 2, shard_rows=20)
    steps: list[int] = []
    make = retraining.RetrainJob._trainer

    def counted(self: Any, variants: Any, **how: Any) -> Any:
        trainer = make(self, variants, **how)
        step: Any = trainer.step
        trainer.step = lambda: (steps.append(1), step())[1]
        return trainer

    monkeypatch.setattr(retraining.RetrainJob, "_trainer", counted)
    drive(run.root, run.id, InlineBackend())
    # The first ensemble has one step left; the second is trained from its beginning.
    a_training = 1 + (N - 1) // 64
    assert len(steps) == 1 + a_training
    assert run.read_table("results") == straight.read_table("results")


def test_an_ensemble_cut_off_goes_on_from_its_saved_state(
    carry_out, grid, fresh_root, monkeypatch
) -> None:
    monkeypatch.setattr("influence_jobs.jobs.saved_state.SAVE_EVERY_S", 0.0)
    monkeypatch.setattr("influence_jobs.jobs.saved_state.SAVE_SHARE", 1e9)
    root = fresh_root()
    run = Run.create(str(root), grid(seeds=(0, 1)))
    started: list[int] = []
    make = retraining.RetrainJob._trainer

    def dies(self, variants, **how):
        trainer = make(self, variants, **how)
        step, steps = trainer.step, iter(range(9))

        def limited():
            if next(steps, None) is None:
                raise Killed
            return step()

        trainer.step = limited
        return trainer

    monkeypatch.setattr(retraining.RetrainJob, "_trainer", dies)
    with pytest.raises(Killed):
        drive(run.root, run.id, InlineBackend(), shard_rows=8)

    def watched(self, variants, **how):
        trainer = make(self, variants, **how)
        load = trainer.load_state_dict

        def loaded(state):
            load(state)
            started.append(trainer.samples_seen)

        trainer.load_state_dict = loaded
        return trainer

    monkeypatch.setattr(retraining.RetrainJob, "_trainer", watched)
    drive(run.root, run.id, InlineBackend())
    assert started[0] > 0
    assert not [name for name in run.files.names("checkpoints") if name.startswith("state")]
    straight = carry_out(grid(seeds=(0, 1)), root=fresh_root(), shard_rows=8)
    assert run.read_table("results") == straight.read_table("results")


def test_damaged_weights_are_trained_again(carry_out, grid, fresh_root, trained) -> None:
    root = fresh_root()
    carry_out(grid(modes=("remove",)), root=root)
    assert set(trained.values()) == {1}
    damaged = next(root.glob("retrained-*/checkpoints/*.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    carry_out(grid(modes=("remove",), sizes=(100, 150)), root=root)
    assert trained[damaged.stem.partition("-")[0]] == 2
    assert Counter(trained.values())[2] == 1


def test_a_diverged_training_is_an_error_not_a_result(carry_out, grid, recipe, fresh_root) -> None:
    wild = recipe.model_copy(update={"lr": 1e6})
    with pytest.raises(RuntimeFault, match=r"trainings diverged.*lower the learning rate"):
        carry_out(grid(recipe=wild), root=fresh_root())


def test_where_one_training_diverges_the_others_are_kept(
    carry_out, grid, fresh_root, monkeypatch
) -> None:
    make = retraining.RetrainJob._trainer

    def one_diverges(self: Any, variants: Any, **how: Any) -> Any:
        trainer = make(self, variants, **how)
        trainer.diverged = lambda i: (1, 16) if i == 1 else None
        return trainer

    monkeypatch.setattr(retraining.RetrainJob, "_trainer", one_diverges)
    root = fresh_root()
    with pytest.raises(
        RuntimeFault, match=r"1 of 4 trainings diverged: .* after step 16 of epoch 2"
    ):
        carry_out(grid(modes=("remove",)), root=root)
    assert len(list(root.glob("retrained-*/manifest/*"))) == 3


def test_a_sample_whose_loss_is_not_finite_is_named(
    carry_out, grid, random, fresh_root, monkeypatch
) -> None:
    import digits

    def poisoned(self: Any, ids: Any, draw: Any) -> Any:
        images, labels = self.batch(ids, draw)
        images[ids == 700] = float("nan")
        return images, labels

    monkeypatch.setattr(digits.DigitsTask, "train_batch", poisoned)
    told = "training loss of sample 700 is not finite before any training: check the sample"
    with pytest.raises(RuntimeFault, match=told):
        carry_out(grid(modes=("remove",), rankings=(random,)), root=fresh_root())
