"""What `pip install influence-jobs` leaves out, and the one line that says how to get it."""

from influence_jobs.errors import InflError

# Extra of pyproject.toml: the import packages that it brings.
EXTRAS = {
    "report": ("jinja2", "matplotlib", "starlette", "uvicorn", "xarray"),
    "cli": ("ray", "rich", "skimage", "typer"),
}


class MissingExtra(InflError, ImportError):
    """An optional package is not installed."""


def missing_extra(error: ModuleNotFoundError) -> MissingExtra | None:
    """The error that names the extra of a missing package; None if the package is in no extra.

    Args:
        error: What the import raised.
    """
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return MissingExtra(
                f"{package} is not installed; run: pip install 'influence-jobs[{extra}]'"
            )
    return None
