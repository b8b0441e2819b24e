"""Every fault of docs/reliability.md."""

import pytest
from faults_base import Fault, World
from faults_page import all_faults, note


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=fault.id, marks=() if fault.fast else pytest.mark.faults)
        for fault in all_faults()
    ],
)
def test_a_fault(fault: Fault, request: pytest.FixtureRequest) -> None:
    world: World = request.getfixturevalue(fault.fixture)
    outcome = "the promise was broken"
    try:
        outcome = fault.inject(world)
    finally:
        note(fault, outcome)
