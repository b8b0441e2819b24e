"""What lies where on a sheet of pictures, read back from its axes."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Rectangle

from influence_jobs.views.contact_sheet import Cell, Row, contact_sheet

GREY = np.full((30, 40), 7, dtype=np.uint8)
COLOUR = np.zeros((30, 40, 3), dtype=np.uint8)


def frames(axis: Axes) -> list[tuple[float, float, float, float]]:
    found = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
    return [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in found]


def test_each_row_has_its_query_its_samples_and_its_marks() -> None:
    rows = [
        Row(
            Cell(COLOUR, ["test 3"]),
            (10, 20, 1, 1),
            "helpful",
            [Cell(GREY, ["8", "score 2"], 8, True), Cell(GREY, ["9"], 9)],
        ),
        Row(Cell(COLOUR, ["test 4"]), (10, 20, 5, 6), "harmful", [Cell(None, ["in words"], 2)]),
        Row(None, None, "node 1", [Cell(GREY, ["10"], 10)]),
        Row(Cell(None, ["gone"]), (1, 2, 3, 4), "moved", [Cell(GREY, ["11"], 11, False)]),
    ]
    figure = contact_sheet(rows)
    grid = np.array(figure.axes).reshape(4, 3)
    texts = [["\n".join(t.get_text() for t in axis.texts) for axis in line] for line in grid]
    assert texts == [
        ["test 3", "8\nscore 2", "9"],
        ["test 4", "in words", ""],
        ["", "10", ""],
        ["gone", "11", ""],
    ]
    pictures = [[len(axis.images) for axis in line] for line in grid]
    assert pictures == [[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert [line[1].get_title(loc="left") for line in grid] == [row.title for row in rows]
    asked = [line[0].get_title(loc="left") for line in grid]
    assert asked == ["query", "query", "", "query"]
    # A point is a ring around x, y; a region and a match are frames at the edges of their pixels.
    (ring,) = (patch for patch in grid[0, 0].patches if isinstance(patch, Circle))
    assert (ring.center, ring.radius) == ((20, 10), 4)
    (cross,) = grid[0, 0].lines
    assert cross.get_xydata().tolist() == [[20, 10]]
    assert frames(grid[1, 0]) == [(19.5, 9.5, 6, 5)]
    assert frames(grid[0, 1]) == [(-0.5, -0.5, 40, 30)]
    unmarked = [grid[0, 2], *grid[2], *grid[3]]
    assert not any(len(axis.patches) for axis in unmarked)
    # Grey values are what they are, not stretched to the darkest and brightest of a picture.
    assert grid[0, 1].images[0].get_clim() == (0, 255)
    assert not any(axis.axison for axis in figure.axes)
