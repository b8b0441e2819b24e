"""A figure that a notebook shows by itself."""

import io

from matplotlib.figure import Figure

_CSS_PIXELS = 96  # of an inch


class Drawing(Figure):
    """A figure of matplotlib that notebooks show without pyplot."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        width, height = self.get_size_inches()
        shown = {"width": round(width * _CSS_PIXELS), "height": round(height * _CSS_PIXELS)}
        return buffer.getvalue(), shown
