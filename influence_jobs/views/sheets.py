"""Rows of samples: the top ones of a query, of a node or layer, or of several trainings."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import numpy as np
from torch import Tensor, nn

from influence_jobs.store.layout import SCORES_OF_TOKENS
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Batch, Task
from influence_jobs.tasks.seen import Text, content_of_test, contents
from influence_jobs.terms import Region
from influence_jobs.views.base import RankedRow
from influence_jobs.views.contact_sheet import Cell, Row
from influence_jobs.views.ranking import by_query, place_words
from influence_jobs.views.table import cell_text

PER_LINE = 5  # samples in a row that has no query
# Columns of ranked rows that are not descriptions of the sample by the task.
_RANKING = {
    "test",
    "region",
    "side",
    "rank",
    "score",
    "sample",
    "training",
    "channel",
    "layer",
    "norm",
    "token",
}


TokenScores = Callable[[int, str | None, int], Sequence[float]]


def score_rows(
    task: Task, ranked: Sequence[RankedRow], tokens: TokenScores | None = None
) -> list[Row]:
    """A row for every query and side of `ranked_scores`.

    Args:
        tokens: See `token_scores_of`.

    Raises:
        DataError: The task's data are missing.
    """
    rows = []
    for (test, region, side), line in by_query(ranked).items():
        query, known = query_cell(task, test, region)
        parts = [tokens(test, region, row["sample"]) for row in line] if tokens else None
        cells = sample_cells(task, line, known, token_scores=parts)
        rows.append(Row(query, region_of(region), side, cells))
    return rows


def token_scores_of(run: Run) -> TokenScores | None:
    """What each token of a sample brings to its score, by test id, region and sample.

    None if the run does not keep it.
    """
    if SCORES_OF_TOKENS not in run.array_names():
        return None
    array: Any = run.array(SCORES_OF_TOKENS)
    rows = {(q["test"], q["region"]): q["query"] for q in run.read_table("queries").to_pylist()}

    def of(test: int, region: str | None, sample: int) -> Sequence[float]:
        scores_T = np.asarray(array[rows[test, region], sample], dtype=np.float64)
        found: list[float] = scores_T[~np.isnan(scores_T)].tolist()
        return found

    return of


def seed_rows(task: Task, ranked: Sequence[RankedRow]) -> list[Row]:
    """A row for every query and training.

    The last line of a sample is the number of trainings in which it is a top sample.

    Args:
        ranked: Rows of `ranked_scores`, of one side, each with its `training`.
    """
    trainings = list(dict.fromkeys(row["training"] for row in ranked))
    rows = []
    for (test, region, _), line in by_query(ranked).items():
        query, known = query_cell(task, test, region)
        found = Counter(row["sample"] for row in line)
        for training in trainings:
            of_one = [row for row in line if row["training"] == training]
            shared = [f"in {found[row['sample']]} of {len(trainings)}" for row in of_one]
            cells = sample_cells(task, of_one, known, shared)
            rows.append(Row(query, region_of(region), training, cells))
    return rows


def node_rows(task: Task, ranked: Sequence[RankedRow]) -> list[Row]:
    """A row for every `channel` of a layer. A sample matches if its label is the channel."""
    return [
        Row(None, None, f"node {channel}", sample_cells(task, of_one, {"label": channel}))
        for channel, of_one in _grouped(ranked, "channel").items()
    ]


def layer_rows(task: Task, ranked: Sequence[RankedRow]) -> list[Row]:
    """A row for every `layer`."""
    return [
        Row(None, None, f"layer {layer}", sample_cells(task, of_one, {}))
        for layer, of_one in _grouped(ranked, "layer").items()
    ]


def plain_rows(task: Task, ranked: Sequence[RankedRow]) -> list[Row]:
    """Rows of `PER_LINE` samples, the first of the ranking first.

    Of samples with a class, a cell has the label, what the model says instead, and the measure: the
    whole description would not fit.
    """
    rows = []
    for first in range(0, len(ranked), PER_LINE):
        line = [*ranked[first : first + PER_LINE]]
        more = None
        if "predicted" in line[0]:
            more = [
                f"predicted {row['predicted']} ({row['probability']:.2f}), "
                f"loss {cell_text(row['loss'])}"
                for row in line
            ]
            line = [{name: row[name] for name in ("sample", "label", [*row][-1])} for row in line]
        title = f"rank {first + 1} to {first + len(line)}"
        rows.append(Row(None, None, title, sample_cells(task, line, {}, more)))
    return rows


def _grouped(ranked: Sequence[RankedRow], name: str) -> dict[Any, list[RankedRow]]:
    groups: dict[Any, list[RankedRow]] = {}
    for row in ranked:
        groups.setdefault(row[name], []).append(row)
    return groups


class NoData(Task):
    """Replaces a task whose data are missing; its samples have no pictures."""

    def model(self) -> nn.Module:
        raise NotImplementedError

    def train_data(self) -> Sized:
        return ()

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        raise NotImplementedError


def query_cell(
    task: Task, test: int, region: str | None = None, known: Mapping[str, Any] | None = None
) -> tuple[Cell, Mapping[str, Any]]:
    """The cell of a test sample, and its description.

    Args:
        region: The query's, as in a table; it is written out if no picture can show it, as none
            shows tokens.
        known: The description; by default the task gives it.
    """
    known = _known(task, test) if known is None else known
    content = content_of_test(task, test, known)
    lines = [f"test {test}", *_described(_beside(known, content))]
    if region and (not isinstance(content, np.ndarray) or region_of(region) is None):
        lines.append(place_words(region))
    return Cell(content, lines, span=span_of(region)), known


def _beside(known: Mapping[str, Any], content: Any) -> Mapping[str, Any]:
    """What of a description is not in what is seen of the sample anyway."""
    if isinstance(content, Mapping):
        return {name: value for name, value in known.items() if name not in content}
    if isinstance(content, Text):
        whole = str(content)
        return {name: value for name, value in known.items() if str(value).strip() != whole.strip()}
    return known


def query_words(task: Task, test: int) -> str:
    """A test sample in words."""
    return ", ".join([f"test {test}", *_described(_known(task, test))])


def _known(task: Task, test: int) -> dict[str, Any]:
    return {k: v[0] for k, v in task.describe_test(np.array([test])).items()}


def sample_cells(
    task: Task,
    ranked: Sequence[RankedRow],
    known: Mapping[str, Any],
    more: Sequence[str] | None = None,
    token_scores: Sequence[Sequence[float]] | None = None,
) -> list[Cell]:
    """Cells of ranked samples, with their score or norm.

    Args:
        known: Description of the query. If labels are classes, samples with its label match.
        more: One more line for each sample.
        token_scores: For each sample what its tokens bring to its score.
    """
    if not ranked:
        return []
    cells, classes = [], task.output_loss == "cross-entropy"
    # Rankings of other kinds have it last.
    measures = [
        next((name for name in ("score", "norm") if name in row), [*row][-1]) for row in ranked
    ]
    columns = [
        {
            name: value
            for name, value in row.items()
            if name not in _RANKING and name != measure and value is not None
        }
        for row, measure in zip(ranked, measures, strict=True)
    ]
    ids = np.array([row["sample"] for row in ranked], dtype=np.int64)
    seen = contents(task, ids, columns)
    for i, (content, row, measure) in enumerate(zip(seen, ranked, measures, strict=True)):
        lines = [
            f"{row['sample']}",
            f"{measure.replace('_', '-')} {cell_text(row[measure])}",
            *_described(
                {
                    name: cell_text(text) if isinstance(text, float) else text
                    for name, text in _beside(columns[i], content).items()
                }
            ),
            *([more[i]] if more else ()),
        ]
        matches = classes and "label" in known and row.get("label") == known["label"]
        parts = token_scores[i] if token_scores else None
        cells.append(Cell(content, lines, row["sample"], matches, parts))
    return cells


def _described(known: Mapping[str, Any]) -> list[str]:
    """A description in at most two lines: the first value (a file's bare name), then the rest."""
    said = [str(value) if name == "file" else f"{name} {value}" for name, value in known.items()]
    return [*said[:1], *([", ".join(said[1:])] if said[1:] else ())]


def region_of(text: str | None) -> Region | None:
    """Parse a region of a table, `y,x,height,width`; None for a span of tokens, as for none."""
    if not text or ":" in text:
        return None
    y, x, height, width = map(int, text.split(","))
    return y, x, height, width


def span_of(text: str | None) -> tuple[int, int] | None:
    """Parse a span of tokens of a table, `start:stop`; None for a region, as for none."""
    if not text or ":" not in text:
        return None
    start, stop = map(int, text.split(":"))
    return start, stop
