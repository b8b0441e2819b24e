"""Words that requests, engines and trainer share, and how times, sizes and texts are written."""

import math
import re
from collections.abc import Sequence
from html import escape
from typing import Literal

Reduction = Literal["kernel", "channel", "layer"]
Precision = Literal["float32", "float64", "bfloat16", "tf32"]
# Of jobs: "bfloat16" has weights of float32, and the last one of bfloat16 too.
JobPrecision = Literal["float32", "float64", "tf32", "bfloat16", "bfloat16-weights"]
ScorePrecision = Literal["float32", "float64"]
FullPrecision = Literal["float32", "float64", "tf32"]  # of what needs more digits than bfloat16
OutputLoss = Literal["cross-entropy", "mse", "binary-cross-entropy"]
# "task": the task's own.
Optimizer = Literal["sgd", "adam", "adamw", "task"]
Schedule = Literal["constant", "cosine", "linear", "step", "task"]
# How the entries of a random projection are distributed; how stored gradients are rounded.
Distribution = Literal["gaussian", "rademacher", "sparse"]
Stored = Literal["float32", "float16", "int8", "1-bit"]
GradientMethod = Literal["influence", "trak", "dot", "cosine"]  # scores of stored gradients
#: A part of an image, also `influence_jobs.Region`. It is y, x, height and width in pixels.
Region = tuple[int, int, int, int]


def stored_as(precision: JobPrecision) -> ScorePrecision:
    """The format of weights, vectors and results of a computation in `FullPrecision`."""
    return "float64" if precision == "float64" else "float32"


LONGEST = 2000  # characters of a text that are shown in a line
# Control characters, which a terminal obeys; those that turn the direction of reading; surrogates.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def shown(text: str) -> str:
    """A text of any source as a terminal may show it: what is not seen is written out.

    New lines and tabs stay.
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def in_a_line(text: str) -> str:
    """A text of any source in one line. A very long one loses its middle: its end is the cure."""
    if len(text) > 4 * LONGEST:
        text = f"{text[: 2 * LONGEST]} ... {text[-2 * LONGEST :]}"
    line = shown(" ".join(text.split()))
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


def html_table(rows: Sequence[Sequence[str]], columns: Sequence[str] = ()) -> str:
    """Texts of any source as a small HTML table, for notebooks; it takes the notebook's colours."""
    left = ' style="text-align: left"'  # notebooks have cells flush right

    def line(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}{left}>{escape(shown(c))}</{tag}>' for c in cells)}</tr>"

    head = f"<thead>{line('th', columns)}</thead>" if columns else ""
    return f"<table>{head}<tbody>{''.join(line('td', row) for row in rows)}</tbody></table>"


def duration(seconds: float) -> str:
    """Seconds as 1:02:03, or 0:45."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def is_missing(value: object) -> bool:
    """Whether a cell of a table has no value: it is None or NaN, and is shown as `-`."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def speed(samples_per_second: float) -> str:
    """Samples a second as text, such as `1,234 samples/s` or `0.25 samples/s`."""
    form = ",.0f" if samples_per_second >= 10 else ".2g"
    return f"{samples_per_second:{form}} samples/s"


def size(num_bytes: float) -> str:
    """Bytes as 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
