"""Packages that a plain `pip install influence-jobs` leaves out, and how to get them."""

from influence_jobs.errors import InflError

# For each extra of pyproject.toml, the import packages that it installs.
EXTRAS = {
    "faiss": ("faiss",),
    "report": ("jinja2", "matplotlib", "starlette", "uvicorn", "xarray"),
    "cli": ("ray", "rich", "skimage", "typer"),
}


class MissingExtra(InflError, ImportError):
    """An optional package is not installed."""


def missing_extra(error: ModuleNotFoundError) -> MissingExtra | None:
    """The error that names the extra with a missing package; None if no extra has the package.

    Args:
        error: The error that the import raised.
    """
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return MissingExtra(
                f"{package} is not installed; run: pip install 'influence-jobs[{extra}]'"
            )
    return None
