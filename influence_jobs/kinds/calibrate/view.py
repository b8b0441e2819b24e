"""The view of a calibration."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from influence_jobs.experiments.lds import Ceiling
from influence_jobs.kinds.calibrate.spec import CalibrateSpec, setting_of
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.train.spec import TrainedCheckpoint
from influence_jobs.specs.queries import Queries
from influence_jobs.terms import duration
from influence_jobs.views.base import Say, View
from influence_jobs.views.table import Table

if TYPE_CHECKING:
    from influence_jobs.views.figure import Shown


class CalibrateView(View[CalibrateSpec]):
    """Which setting was chosen, how well it does on other subsets, and the command that uses it."""

    @property
    def title(self) -> str:
        return f"Calibration of influence ({self.spec.task.slug})"

    def certainty(self) -> list[str]:
        spec = self.spec
        said = (
            f"Chosen by {spec.choosing} subsets, measured on {spec.held_out} others; "
            f"{len(spec.seeds)} trainings of each subset."
        )
        return [said, self._ceiling.words]

    def next_step(self) -> str:
        return self._command

    @property
    def _result(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.run.read_table("result").to_pylist()[0]
        return found

    @property
    def _ceiling(self) -> Ceiling:
        return Ceiling(**self.run.read_table("ceiling").to_pylist()[0])

    @property
    def _command(self) -> str:
        """The command that computes influence in the chosen setting, of the first query."""
        name = self._result["method"]
        (ranking,) = (r for r in self.spec.rankings if r.name == name)
        setting, scores = setting_of(ranking), ranking.scores[0]
        assert isinstance(scores, InfluenceSpec)
        checkpoint = scores.s_tests[0].checkpoint
        assert isinstance(checkpoint, TrainedCheckpoint)
        samples = setting.curvature_samples
        words = [
            f"infl submit influence --checkpoint {checkpoint.train.run_id}@{setting.epoch}",
            f"--models {setting.models}" if setting.models > 1 else "",
            f"--solver {setting.solver}",
            "" if setting.damping is None else f"--damping {setting.damping:g}",
            f"--curvature-samples {'all' if samples is None else samples}",
            *options_of(self.spec.queries),
        ]
        return " ".join(filter(None, words)) + self.more

    def tables(self) -> list[Table]:
        spec, result = self.spec, self._result
        settings = self.run.read_table("settings").to_pylist()
        settings.sort(key=lambda row: (row["mean_lds"] != row["mean_lds"], -row["mean_lds"]))
        limit = self._ceiling.value
        share = result["mean_lds"] / limit if limit else float("nan")
        columns = ("method", "mean_lds", "low", "high")
        return [
            Table(
                title=f"Settings by their linear datamodeling score on {spec.choosing} subsets",
                columns=("setting", "mean LDS", "95 % from", "to", "seconds"),
                rows=[
                    (*(row[column] for column in columns), round(row["seconds"]))
                    for row in settings
                ],
                note="Seconds: compute of the trainings, s_test vectors and scores of a setting, "
                "on the machine that did it. The best of many scores is too high by chance: the "
                "next table measures it anew.",
            ),
            Table(
                title=f"The chosen setting on {spec.held_out} other subsets",
                columns=("setting", "mean LDS", "95 % from", "to", "ceiling", "of the ceiling"),
                rows=[(*(result[column] for column in columns), limit, share)],
                note=f"Use it: {self._command}. It takes {duration(result['setting_seconds'])} of "
                "compute for these queries; finding it took "
                f"{duration(result['scores_seconds'])} for the scores of all settings and "
                f"{duration(result['retraining_seconds'])} for "
                f"{(spec.choosing + spec.held_out) * len(spec.seeds)} retrainings, which "
                "infl submit lds uses again.",
            ),
        ]

    def figures(self, say: Say) -> "Iterator[Shown]":
        from influence_jobs.views.curves import lds_panels
        from influence_jobs.views.figure import Shown

        settings = self.run.read_table("settings")
        yield Shown(
            "settings",
            "Settings of influence",
            "Longer bars are better: a score of 1 predicts the order of all retrained models' "
            f"{self.spec.queries.quantity}. Lines: 95 % intervals over the subsets by which the "
            "setting is chosen.",
            settings,
            panels=lds_panels(settings.to_pylist()),
        )


def options_of(queries: Queries) -> list[str]:
    """The options that ask for the first query as it was measured."""
    first = queries.items[0]
    words = [f"--test {first.test}"]
    if first.region is not None:
        words.append(f"--region {','.join(map(str, first.region))}")
    if queries.quantity != "loss":
        words.append(f"--quantity {queries.quantity}")
    if queries.noise_draws > 1:
        words.append(f"--noise-draws {queries.noise_draws}")
    return words
