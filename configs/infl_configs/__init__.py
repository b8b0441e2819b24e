"""Training presets: YAML files, and a reader. Requests turn them into specs."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 2**20  # of a preset


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    entries = files(__name__).iterdir()
    return sorted(e.name.removesuffix(".yaml") for e in entries if e.name.endswith(".yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """A preset, by its name or from a user's YAML file.

    Raises:
        ValueError: There is no such preset, or it is not a mapping; the message is for the user.
    """
    if name in preset_names():
        text = files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    else:
        try:
            path = Path(name)
            if not path.is_file() or path.stat().st_size > MOST_BYTES:  # a device might not end
                raise OSError
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"preset {name} is not YAML: it is no UTF-8") from None
        except (OSError, ValueError):
            known = ", ".join(preset_names())
            raise ValueError(f"no preset {name!r}: choose {known}, or name a YAML file") from None
    try:
        preset = yaml.safe_load(text)
    except Exception as error:  # the constructors of YAML's types raise almost anything
        deep = "it is nested too deeply" if isinstance(error, RecursionError) else error
        why = " ".join(str(getattr(error, "problem", deep)).split())
        raise ValueError(f"preset {name} is not YAML: {why}") from error
    if not isinstance(preset, dict) or not isinstance(preset.get("train"), dict):
        raise ValueError(  # noqa: TRY004  (the content is wrong, not a caller's type)
            f"preset {name} must have a mapping `train` of training options"
        )
    return preset
