"""Draw the rooms of the code and which imports which: `python docs/site/rooms_picture.py`.

Rooms and rows are those that lint-imports keeps; arrows are the imports that grimp finds. An arrow
that follows from others is left out: who imports `jobs`, which imports `store`, may import `store`.
"""

import re
import tomllib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import grimp

PROJECT = Path(__file__).parents[2]
PICTURE = PROJECT / "docs" / "rooms.svg"

Arrow = tuple[str, str]

PACKAGES = ("infl_cli", "infl_cluster", "infl_configs", "influence_jobs")
# In pixels: the distance of rows, the height of a box, the least distance of boxes, the margin, and
# the width of a character.
ROW, BOX, GAP, MARGIN, CHARACTER = 64, 34, 26, 14, 8.6

# Every room may import the specs of all kinds of runs, as the contracts say.
_SPEC = re.compile(r"influence_jobs\.kinds\.\w+\.spec")


@dataclass
class _Place:
    """What stands in a row: a room, or a long arrow that passes by."""

    row: int
    width: float
    room: bool = True
    x: float = 0  # of the middle
    above: list["_Place"] = field(default_factory=list)
    below: list["_Place"] = field(default_factory=list)


def rows() -> tuple[list[list[str]], list[str]]:
    """The rooms from top to bottom, and those below that every room may import."""
    with (PROJECT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    packages, library = (contract["layers"] for contract in contracts[:2])
    split = [[room.strip() for room in layer.split("|")] for layer in library]
    found = [[package] for package in packages[:-1]] + split[:-2]
    # Presets import nothing, and requests read them.
    presets = next(i for i, row in enumerate(found) if "requests" in row) + 1
    found[presets].append("infl_configs")
    return found, [room for row in split[-2:] for room in row]


def arrows(levels: list[list[str]]) -> list[Arrow]:
    """The imports between rooms that go down and do not follow from others."""
    row = {room: i for i, level in enumerate(levels) for room in level}
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True)
    found = {
        (_room(module), _room(imported))
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
    }
    return reduced({(a, b) for a, b in found if {a, b} <= row.keys() and row[a] < row[b]})


def _room(module: str) -> str:
    if _SPEC.fullmatch(module):
        return "specs"
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "influence_jobs" and rest else package


def reduced(found: Collection[Arrow]) -> list[Arrow]:
    """The arrows without those that follow from others."""
    below: dict[str, set[str]] = {}
    for room, imported in found:
        below.setdefault(room, set()).add(imported)

    def reach(room: str) -> set[str]:
        near = below.get(room, set())
        return near.union(*(reach(other) for other in near))

    return sorted(
        (room, imported)
        for room, imported in found
        if not any(imported in reach(other) for other in below[room] - {imported})
    )


def placed(levels: list[list[str]], found: Collection[Arrow]) -> tuple[dict[str, _Place], float]:
    """A place for each room, near those that it imports and that import it; and the width."""
    places = {
        room: _Place(row, len(room) * CHARACTER + 24)
        for row, level in enumerate(levels)
        for room in level
    }
    grid = [[places[room] for room in level] for level in levels]
    for room, imported in found:
        above, last = places[room], places[imported]
        for between in range(above.row + 1, last.row):
            passing = _Place(between, 0, room=False)
            grid[between].append(passing)
            _join(above, passing)
            above = passing
        _join(above, last)
    for row in grid:
        _spread(row)
    for turn in range(24):
        down = turn % 2 == 0
        for row in grid if down else reversed(grid):
            for place in row:
                near = place.above if down else place.below
                place.x = sum(other.x for other in near) / len(near) if near else place.x
            row.sort(key=lambda place: place.x)
            _spread(row)
    everything = [place for row in grid for place in row]
    left = min(place.x - place.width / 2 for place in everything) - MARGIN
    for place in everything:
        place.x -= left
    return places, max(place.x + place.width / 2 for place in everything) + MARGIN


def _join(above: _Place, below: _Place) -> None:
    above.below.append(below)
    below.above.append(above)


def _spread(row: list[_Place]) -> None:
    """Put the places of a row side by side, as near to where they want to be as they can."""
    right = float("-inf")
    wanted = sum(place.x for place in row) / len(row)
    for place in row:
        place.x = max(place.x, right + place.width / 2)
        right = place.x + place.width / 2 + GAP
    shift = wanted - sum(place.x for place in row) / len(row)
    for place in row:
        place.x += shift


def picture() -> str:
    """The picture as SVG, readable on light and on dark pages."""
    levels, base = rows()
    found = arrows(levels)
    places, width = placed(levels, found)
    height = len(levels) * ROW + BOX + 2 * MARGIN
    said = "Rooms of the code from top to bottom; an arrow leads from a room to one that it imports"
    lines = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
            f'width="{width:.0f}" height="{height}" role="img" aria-label="{said}" '
            'font-family="ui-monospace, monospace" font-size="14" text-anchor="middle">'
        ),
        (
            "<style>.arrow { fill: none; stroke: #808080; stroke-width: 1.5 } "
            "rect { fill: #dbe9f6; stroke: #5b7fa3 } .package { fill: #f6e7c8; stroke: #a3854a } "
            ".base { fill: #e4e4e4; stroke: #808080 } text { fill: #1a1a1a }</style>"
        ),
        (
            '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 8 4 0 8z" fill="#808080"/>'
            "</marker>"
        ),
        *(_arrow(places[room], places[imported]) for room, imported in found),
    ]
    for room, place in places.items():
        kind = ' class="package"' if room in PACKAGES else ""
        lines += _box(room, place.x, place.row, place.width, kind)
    below = "for all: " + ", ".join(base)
    lines += _box(below, width / 2, len(levels), width - 2 * MARGIN, ' class="base"')
    return "\n".join([*lines, "</svg>", ""])


def _box(text: str, x: float, row: int, width: float, kind: str) -> list[str]:
    y = MARGIN + row * ROW
    return [
        f'<rect x="{x - width / 2:.1f}" y="{y}" width="{width:.1f}" height="{BOX}" rx="6"{kind}/>',
        f'<text x="{x:.1f}" y="{y + BOX / 2 + 5:.0f}">{text}</text>',
    ]


def _arrow(room: _Place, imported: _Place) -> str:
    """A smooth line through the places that are kept free for it."""
    steps = [room, *_way(room, imported), imported]
    x, y = room.x, MARGIN + room.row * ROW + BOX
    path = [f"M{x:.1f} {y}"]
    for step in steps[1:]:
        top = MARGIN + step.row * ROW
        middle = (y + top) / 2
        path.append(f"C{x:.1f} {middle:.0f} {step.x:.1f} {middle:.0f} {step.x:.1f} {top}")
        x, y = step.x, top
        if not step.room:
            y = top + BOX
            path.append(f"V{y}")
    return f'<path class="arrow" marker-end="url(#tip)" d="{" ".join(path)}"/>'


def _way(room: _Place, imported: _Place) -> list[_Place]:
    """The places between two rooms that their arrow passes by."""
    for step in room.below:
        way = [step]
        while not way[-1].room:
            way += way[-1].below
        if way[-1] is imported:
            return way[:-1]
    raise LookupError


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
