"""The script `infl`. It also starts without the extra `cli`, to say which package is missing."""

import sys

from influence_jobs.extras import missing_extra


def main() -> None:
    """Run `infl`; exit code 2 with one line if a package that it needs is not installed."""
    try:
        from infl_cli.main import main as infl

        infl()
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        if missing is None:
            raise
        print(f"error: {missing}", file=sys.stderr)
        sys.exit(2)
