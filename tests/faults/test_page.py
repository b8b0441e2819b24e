"""docs/reliability.md tells of the faults of the suite, and of no others."""

import re

from faults_page import PAGE, all_faults


def test_the_page_has_every_fault_of_the_suite() -> None:
    told: list[str] = []
    group = ""
    faults, _, schedules = PAGE.read_text().partition("## Random schedules")
    for line in faults.splitlines():
        if line.startswith("## "):
            group = line[3:].lower()
        elif (found := re.match(r"\| (.+?) \|", line)) and found[1] != "fault":
            told.append(f"{group}: {found[1]}".lower())
    assert sorted(told) == sorted(fault.id.lower() for fault in all_faults())
    tried = re.search(r"(\d+) schedules of one to three faults", schedules)
    assert tried
    assert int(tried[1]) >= 200


def test_faults_have_names_of_their_own() -> None:
    names = [fault.id for fault in all_faults()]
    assert len({*names}) == len(names)
