"""The script `infl`. It also starts without the extra `cli`, to say which package is missing."""

import sys

from influence_jobs.devices import let_idle_threads_sleep
from influence_jobs.extras import missing_extra


def main() -> None:
    """Run `infl`; exit code 2 with one line if a package that it needs is not installed."""
    let_idle_threads_sleep()
    try:
        _main()
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        if missing is None:
            raise
        print(f"error: {missing}", file=sys.stderr)
        sys.exit(2)


def _main() -> None:
    try:
        from infl_cli.main import main as infl
    except Exception as error:
        if sys.argv[1:2] != ["doctor"]:
            error.add_note("infl doctor says what is wrong with the installed packages")
            raise
        from infl_cli.doctor import alone

        alone(sys.argv[2:])
    else:
        infl()
