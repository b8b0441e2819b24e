"""What templates are told of a cell's content: the pieces of a text, the columns of rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from influence_jobs.tasks.seen import Text, Wave
from influence_jobs.terms import shown
from influence_jobs.views.contact_sheet import Cell
from influence_jobs.views.table import cell_text

LONGEST = 600  # characters of a text beside others
BEFORE = 200  # of them before the strongest token, if the beginning is left out
LEVELS = 4  # steps of shading
SOUND_BYTES, ALL_SOUNDS_BYTES = 2**19, 10 * 2**20  # in a report: of one sound, of all


@dataclass(frozen=True)
class Piece:
    """A piece of a text.

    Attributes:
        text: The piece; what is not seen is written out.
        sign: "+" or "-" of its token's score; "" without one.
        level: From 1 to `LEVELS`, by the size of the score beside the sample's largest; 0 of none.
        explained: Whether it is one of the tokens that the query explains.
    """

    text: str
    sign: str = ""
    level: int = 0
    explained: bool = False


def pieces_of(cell: Cell, whole: bool = False) -> list[Piece]:
    """The pieces of a cell's text, shaded by its tokens' scores; long texts are cut.

    Args:
        whole: Do not cut.
    """
    text = cell.content
    assert isinstance(text, Text)
    scores = dict(zip(text.places, cell.token_scores or (), strict=False)) if fits(cell) else {}
    largest = max((abs(score) for score in scores.values()), default=0.0)
    explained = {text.places[i] for i in range(*cell.span)} if cell.span and fits(cell) else set()
    found = []
    for place, whole_piece in enumerate(text.pieces):
        piece = whole_piece
        score = scores.get(place, 0.0)
        level = round(LEVELS * abs(score) / largest) if largest else 0
        sign = ("+" if score > 0 else "-") if level else ""
        word = piece.lstrip()
        if word and (level or place in explained):  # the space before it is not marked
            found.append(Piece(shown(piece[: len(piece) - len(word)])))
            piece = word
        found.append(Piece(shown(piece), sign, level, place in explained))
    return found if whole else _cut(found)


def fits(cell: Cell) -> bool:
    """Whether the tokens of a cell's text are those that its scores, or its query, are of."""
    text = cell.content
    assert isinstance(text, Text)
    if cell.token_scores is not None:
        return len(cell.token_scores) == len(text.places)
    return cell.span is not None and cell.span[1] <= len(text.places)


def unmarked(cell: Cell) -> str:
    """Why tokens cannot be marked in a text; empty if they are, or there is nothing to mark."""
    if not isinstance(cell.content, Text) or fits(cell):
        return ""
    count = len(cell.content.places)
    has = f"its text names {count or 'no'} tokens (see Text in show())"
    if cell.token_scores is not None:
        return f"not shaded: it has scores of {len(cell.token_scores)} tokens, and {has}"
    return f"not marked: {has}" if cell.span is not None else ""


def _cut(pieces: list[Piece]) -> list[Piece]:
    """At most `LONGEST` characters, with the strongest or first explained token among them."""
    if sum(len(piece.text) for piece in pieces) <= LONGEST:
        return pieces
    weights = [piece.level + LEVELS * piece.explained for piece in pieces]
    centre = weights.index(max(weights))
    start, before = centre, 0
    while start > 0 and before + len(pieces[start - 1].text) <= BEFORE:
        start -= 1
        before += len(pieces[start].text)
    found, count = [Piece("... ")] if start else [], 0
    for piece in pieces[start:]:
        if count + len(piece.text) > LONGEST:
            rest = Piece(piece.text[: LONGEST - count], piece.sign, piece.level, piece.explained)
            return [*found, rest, Piece(" ...")]
        found.append(piece)
        count += len(piece.text)
    return found


def all_columns(cells: Sequence[Cell]) -> bool:
    """Whether all samples are rows of columns, so that a table shows them."""
    return all(cell.kind == "columns" for cell in cells)


def columns_of(cells: Sequence[Cell], query: Cell | None) -> list[str]:
    """The names of the columns of rows, those of the query first."""
    rows = [cell.content for cell in ([query] if query else []) + [*cells]]
    return list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))


def differs(value: Any, other: Any) -> str:
    """How a value differs from the query's: "" if it does not, else a signed number, or "differs".

    Args:
        other: The query's value; None if it has none.
    """
    if other is None or value == other or str(value) == str(other) == "nan":
        return ""
    numbers = (int, float)
    if isinstance(value, numbers) and isinstance(other, numbers) and not isinstance(value, bool):
        difference = float(value) - float(other)
        return f"{'+' if difference > 0 else ''}{cell_text(difference)}"
    return "differs"


class Sounds:
    """The sounds of a report, as data URIs while there is room for them."""

    def __init__(self) -> None:
        self._left = ALL_SOUNDS_BYTES

    def fits(self, sound: Wave) -> bool:
        """Whether there is room for a sound; it is taken."""
        size = len(sound.values) * sound.values.shape[1] * sound.values.itemsize
        if size > min(SOUND_BYTES, self._left):
            return False
        self._left -= size
        return True
