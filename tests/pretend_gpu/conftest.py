"""The pretended GPU, for every test of this folder that asks for it."""

from collections.abc import Iterator

import pytest

from .pretend import PretendGpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGpu]:
    with PretendGpu(monkeypatch) as device:
        yield device
