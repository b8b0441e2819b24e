"""Calibration: choose a setting by some subsets, measure it on others."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from influence_jobs.errors import SpecError
from influence_jobs.experiments.lds import ceiling, mean_lds
from influence_jobs.jobs.base import Result
from influence_jobs.jobs.subsets import SubsetsJob
from influence_jobs.kinds import kind_of
from influence_jobs.kinds.calibrate.spec import CalibrateSpec, setting_of
from influence_jobs.specs.base import AnySpec
from influence_jobs.specs.rankings import Ranking
from influence_jobs.store.run import Run

CHOOSING = 2**20  # index of the first subset to choose by; `infl submit lds` counts from 0


class CalibrateJob(SubsetsJob[CalibrateSpec]):
    """The subsets to choose by come first, then those that are held out."""

    spec_type = CalibrateSpec

    @property
    def title(self) -> str:
        return f"calibrate {self.spec.task.slug} {len(self.spec.rankings)} settings"

    @property
    def indices(self) -> Sequence[int]:
        return [*range(CHOOSING, CHOOSING + self.spec.choosing), *range(self.spec.held_out)]

    def finish(self) -> Result:
        spec, found_MSQ = self.spec, self.found()
        found_QM = found_MSQ.mean(axis=1).T
        choosing, held_out = slice(spec.choosing), slice(spec.choosing, None)
        rows: list[dict[str, Any]] = []
        for ranking in spec.rankings:
            predicted_QM = self.predicted(ranking)
            by = mean_lds(predicted_QM[:, choosing], found_QM[:, choosing])
            rows.append(
                {
                    "method": ranking.name,
                    **setting_of(ranking)._asdict(),
                    "mean_lds": by.mean,
                    "low": by.low,
                    "high": by.high,
                    "seconds": sum(self._seconds(ranking).values()),
                }
            )
        scores = np.array([row["mean_lds"] for row in rows])
        if np.isnan(scores).all():
            raise SpecError(
                "no setting can be chosen: the losses or the scores of all queries are the same "
                "for all subsets; name other queries"
            )
        best = int(np.nanargmax(scores))  # the first of equals, which has the fewest models
        chosen = spec.rankings[best]
        measured = mean_lds(self.predicted(chosen)[:, held_out], found_QM[:, held_out])
        result = {
            "method": chosen.name,
            "mean_lds": measured.mean,
            "low": measured.low,
            "high": measured.high,
            "chosen_lds": rows[best]["mean_lds"],
            "setting_seconds": rows[best]["seconds"],
            "scores_seconds": self._all_seconds(),
            "retraining_seconds": _own_seconds(self.run_store),
        }
        limit = ceiling(found_MSQ[held_out])._asdict()
        files = self.write_queries()
        files |= self.run_store.write_table("ceiling", pa.Table.from_pylist([limit]))
        files |= self.run_store.write_table("settings", pa.Table.from_pylist(rows))
        files |= self.run_store.write_table("result", pa.Table.from_pylist([result]))
        return Result(files=files)

    def _seconds(self, ranking: Ranking) -> dict[str, float]:
        """Seconds of compute, by run id, of a ranking's trainings, s_test vectors and scores."""
        runs = {spec.run_id: spec for scores in ranking.scores for spec in _needed(scores)}
        root = self.run_store.root
        return {run_id: _own_seconds(Run(root, spec)) for run_id, spec in runs.items()}

    def _all_seconds(self) -> float:
        """Seconds of compute of all settings, which share trainings."""
        found: dict[str, float] = {}
        for ranking in self.spec.rankings:
            found |= self._seconds(ranking)
        return sum(found.values())


def _needed(spec: AnySpec) -> Iterator[AnySpec]:
    """A run and all that it needs."""
    yield spec
    for other in kind_of(spec).job_type.inputs(spec):
        yield from _needed(other)


def _own_seconds(run: Run) -> float:
    return sum(entry.seconds for entry in run.manifest.done().values())
