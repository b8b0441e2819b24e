"""Which files count as the user's own code."""

from pathlib import Path

import pytest
import torch

from influence_jobs.tasks.own_code import is_own


@pytest.mark.parametrize(
    ("file", "module", "own"),
    [
        ("/home/a/project/my_task.py", "my_task", True),
        ("/home/a/project/influence_jobs/tasks/base.py", "influence_jobs.tasks.base", False),
        (torch.__file__, "torch", False),
        ("/other/lib/python3.12/site-packages/timm/models.py", "timm.models", False),
        ("/usr/lib/python3/dist-packages/timm/models.py", "timm.models", False),
    ],
)
def test_installed_files_are_not_ones_own(file: str, module: str, own: bool) -> None:
    assert is_own(Path(file), module) is own
