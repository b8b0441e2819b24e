"""The view of s_test vectors: how accurate each solution is."""

import json
from collections.abc import Sequence
from typing import Any

from influence_jobs.errors import SpecError
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.views.base import View
from influence_jobs.views.table import Table

MAX_SOLUTIONS = 50


class STestView(View[STestSpec]):
    """Shows damping, residual and cost of each vector."""

    @property
    def title(self) -> str:
        return f"s_test vectors ({self.spec.task.slug})"

    def certainty(self) -> list[str]:
        """Effective damping, residual, and the solver's messages."""
        if not self.spec.solver.uses_curvature:
            return ["no curvature: s_test is the query's gradient"]
        rows = self.run.read_table("solutions").to_pylist()
        messages = [m for row in rows for m in json.loads(row["record"]).get("messages", ())]
        if not self.spec.solver.inverts:
            return [self._segments(rows), *dict.fromkeys(messages)]
        damping, record = rows[0]["damping"], json.loads(rows[0]["record"])
        residual = max(row["residual"] for row in rows)
        steps = max(row["iterations"] for row in rows)
        line = f"lambda = {damping:.4g}; residual up to {residual:.2g}, {steps} steps"
        if "recursion_damping" in record:
            line += (
                f"; the recursion's own damping {record['recursion_damping']:.4g} x scale "
                f"{record['scale']:.4g}, batches of {record['batch_size']}"
            )
        return [line, *dict.fromkeys(messages)]

    @staticmethod
    def _segments(rows: Sequence[dict[str, Any]]) -> str:
        said = [
            f"epochs {row['epochs']}: {row['checkpoints']} checkpoints, time {row['time']:.4g}"
            for row in rows
            if row["query"] == rows[0]["query"]
        ]
        return f"segments: {'; '.join(said)}, the sum of learning rates / (1 - momentum)"

    def next_step(self) -> str:
        return f"infl submit influence --s-test {self.run.id}{self.more}"

    def tables(self) -> list[Table]:
        """Damping, residual and cost of the first vectors."""
        rows = self.run.read_table("solutions").to_pylist()
        count = len(rows)
        more = f" The first {MAX_SOLUTIONS} of {count}." if count > MAX_SOLUTIONS else ""
        if not self.spec.solver.inverts:
            columns = ("query", "segment", "epochs", "checkpoints", "time", "products")
            return [
                Table(
                    title="s_test vectors",
                    columns=columns,
                    rows=[tuple(row[column] for column in columns) for row in rows[:MAX_SOLUTIONS]],
                    note="Time: sum of the learning rates / (1 - momentum). Products: of the "
                    f"curvature with the query's vector; none by EK-FAC.{more}",
                )
            ]
        columns = ("query", "repeat", "damping", "residual", "iterations", "gradient_equivalents")
        return [
            Table(
                title="s_test vectors",
                columns=("query", "repeat", "lambda", "residual", "steps", "gradient equivalents"),
                rows=[tuple(row[column] for column in columns) for row in rows[:MAX_SOLUTIONS]],
                note="Residual: norm of (curvature + lambda I) x - gradient, relative to the "
                "gradient. Gradient equivalents: cost of the query's whole block, in passes over "
                f"the training set for one vector.{more}",
            )
        ]

    def top(
        self,
        k: int,
        *,
        layer: str | None = None,
        tests: Sequence[int] | None = None,
        side: str = "both",
        channel: int | None = None,
    ) -> dict[str, list[dict[str, Any]]]:
        raise SpecError(f"{self.run.id} has no scores yet: {self.next_step()}")
