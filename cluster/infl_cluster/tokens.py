"""The Ray token that the user gives for clusters named with `--address`."""

import os
from pathlib import Path

from influence_jobs.errors import RuntimeFault


def find_token() -> tuple[str, str]:
    """Return the token of the environment and the name of its source."""
    if "RAY_AUTH_TOKEN" in os.environ:
        source, token = "RAY_AUTH_TOKEN", os.environ["RAY_AUTH_TOKEN"]
    else:
        default = Path("~/.ray/auth_token").expanduser()
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or default)
        source = f"RAY_AUTH_TOKEN_PATH ({path})" if path != default else str(path)
        try:
            token = path.read_text()
        except FileNotFoundError:
            raise RuntimeFault(
                f"no Ray token in {source}: set RAY_AUTH_TOKEN_PATH to the cluster's token file"
            ) from None
        except OSError as error:
            raise RuntimeFault(f"cannot read the Ray token in {source}: {error.strerror}") from None
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable():
        raise RuntimeFault(f"{source} holds no Ray token: it must be one line of plain characters")
    return token, source
