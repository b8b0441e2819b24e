"""The view of a stability run."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from influence_jobs.kinds.stability.spec import StabilitySpec
from influence_jobs.specs.rankings import Ranking
from influence_jobs.store.rankings import score_blocks
from influence_jobs.store.run import Run
from influence_jobs.store.top import top_of
from influence_jobs.tasks import published
from influence_jobs.tasks.registry import published_of
from influence_jobs.views.base import Say, View
from influence_jobs.views.norms import PER_ROW
from influence_jobs.views.ranking import named, places
from influence_jobs.views.scores import of_first
from influence_jobs.views.table import Table

if TYPE_CHECKING:
    from influence_jobs.views.figure import Shown

SEED_QUERIES = 3  # queries whose top samples are shown for each training


class StabilityView(View[StabilitySpec]):
    """How many of the top samples are found again."""

    @property
    def title(self) -> str:
        return f"Stability ({self.spec.task.slug})"

    def certainty(self) -> list[str]:
        return ["95 % intervals of the means by BCa bootstrap over queries."]

    def next_step(self) -> str:
        return f"infl report {self.run.id}{self.more}"

    def tables(self) -> list[Table]:
        return [self._shares(rankings[0].name) for rankings in self.spec.methods] + [
            self._summary()
        ]

    def _shares(self, method: str) -> Table:
        results = self.run.read_table("results").to_pylist()
        rows = [row for row in results if row["method"] == method]
        tests = list(dict.fromkeys(row["test"] for row in rows))
        queries = list(dict.fromkeys(row["query"] for row in rows))
        retrainings = list(dict.fromkeys(row["retraining"] for row in rows))
        found = {(row["retraining"], row["query"]): row["overlap"] for row in rows}
        shares = np.array([[found[r, q] for q in queries] for r in retrainings])
        title = (
            f"Stability of {method}: share of the top {rows[0]['top']} also found by retrainings "
            "from other seeds"
        )
        theirs, note = None, ""
        if (known := self._published()) is not None and method in known.stability:
            theirs = known.stability[method]
            title = f"Table {known.stability_tables[method]}. {title}"
            note = "In brackets: the numbers of the research report."
            if method != "attribution":
                note += f" {published.OTHER_QUANTITY}"
        lines: list[tuple[object, ...]] = []
        for i, retraining in enumerate(retrainings):
            beside = theirs[i] if theirs is not None and i < len(theirs) else None
            lines.append((f"retraining {retraining}", *_percents(shares[i], beside)))
        beside = theirs.mean(0) if theirs is not None else None
        lines.append(("mean", *_percents(shares.mean(0), beside)))
        names = [str(test) for test in tests] if len(tests) == len(queries) else map(str, queries)
        return Table(title, ("test", *names), lines, note)

    def _published(self) -> published.Published | None:
        """The research report's figures, if the run is of its test images and training set."""
        known = published_of(self.spec.task)
        tests = tuple(query.test for query in self.spec.queries.items)
        whole = self.spec.task.options.get("limit") is None
        if known is None or not whole or (tests, self.spec.top) != (known.tests, known.top):
            return None
        return known

    def _summary(self) -> Table:
        columns = (
            "method",
            "mean_overlap",
            "low",
            "high",
            "least",
            "most",
            "mean_rank_correlation",
        )
        rows = self.run.read_table("summary").to_pylist()
        return Table(
            title="Stability: mean over queries",
            columns=("method", "overlap", "95 % from", "to", "least", "most", "rank correlation"),
            rows=[tuple(row[column] for column in columns) for row in rows],
        )

    def figures(self, say: Say) -> "Iterator[Shown]":
        from influence_jobs.views.figure import Shown, file_name
        from influence_jobs.views.sheets import seed_rows

        for rankings in self.spec.methods:
            ranked = self._after_each_training(rankings)
            pictures = self.pictures(seed_rows, of_first(ranked, SEED_QUERIES), say)
            if not pictures:
                continue
            count = len(self.spec.queries.items)
            method = named(rankings[0].name, self.spec.queries.quantity)
            times: dict[tuple[object, ...], int] = {}
            for row in ranked:
                key = row["test"], row.get("region"), row["sample"]
                times[key] = times.get(key, 0) + 1
            once = sum(count == 1 for count in times.values())
            yield Shown(
                f"seeds-{file_name(rankings[0].name)}",
                f"Top {PER_ROW} by {method} after each of {len(rankings)} trainings",
                f"The first {min(SEED_QUERIES, count)} of {count} queries. Of the {len(times)} "
                f"samples found in all, {once} come first after one training only.",
                pa.Table.from_pylist(ranked),
                rows=pictures,
            )

    def _after_each_training(self, rankings: Sequence[Ranking]) -> list[dict[str, Any]]:
        root = self.run.root
        samples = Run(root, rankings[0].scores[0]).read_table("samples")
        queries = places(self.run.read_table("queries").to_pylist())
        tops = [
            top_of(
                score_blocks(root, ranking), range(len(queries)), PER_ROW, largest=ranking.largest
            )
            for ranking in rankings
        ]
        return [
            {
                **place,
                "side": rankings[0].name,
                "training": "first training" if i == 0 else f"retraining {i}",
                "rank": rank,
                "score": float(score),
                **sample,
            }
            for query, place in enumerate(queries)
            for i, found in enumerate(tops)
            for rank, (sample, score) in enumerate(
                zip(samples.take(found[query][0]).to_pylist(), found[query][1], strict=True),
                start=1,
            )
        ]


def _percents(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64] | None) -> list[str]:
    """Shares in per cent, the published ones in brackets."""
    if theirs is None:
        return [f"{100 * share:.0f}%" for share in ours]
    return [f"{100 * a:.0f}% ({100 * b:.0f}%)" for a, b in zip(ours, theirs, strict=True)]
