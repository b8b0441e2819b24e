"""Fetching samples ahead of the device."""

import threading

import pytest

from influence_jobs.jobs.samples import ahead


def test_each_item_is_made_while_the_one_before_is_in_use():
    made = [threading.Event() for _ in range(4)]
    threads = set()

    def items():
        for i in range(4):
            threads.add(threading.get_ident())
            made[i].set()
            yield i

    found = []
    for item in ahead(items()):
        found.append(item)
        if item < 3:
            assert made[item + 1].wait(10)
        if item < 2:
            assert not made[item + 2].is_set()  # one ahead, no more
    assert found == [0, 1, 2, 3]
    assert threading.get_ident() not in threads


def test_an_error_comes_where_its_item_would():
    def items():
        yield 1
        raise ValueError("the second")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="the second"):
        next(found)


def test_whoever_stops_early_leaves_no_thread():
    before = threading.active_count()
    found = ahead(iter(range(100)))
    assert next(found) == 0
    found.close()
    assert threading.active_count() == before
