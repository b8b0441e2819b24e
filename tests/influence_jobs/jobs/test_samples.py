"""Fetching samples ahead of the device."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from influence_jobs.curvature import GaussNewton
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.jobs.base import Shard
from influence_jobs.jobs.samples import SampleJob
from influence_jobs.memory import BatchSize
from influence_jobs.tasks.base import Draw
from influence_jobs.transfers import ahead


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ids_come_with_their_samples_whether_fetched_ahead_or_not(device):
    fetching = set()

    def batch(ids, draw):
        fetching.add(threading.get_ident())
        return ids * 10 + draw

    job: Any = SimpleNamespace(device=torch.device(device), batch=batch, batching=BatchSize(3))
    job.chunks = lambda shard: [torch.arange(shard.start, shard.stop)]
    found = list(SampleJob.each(job, Shard("", 0, 7), 1, lambda ids, samples: samples))  # type: ignore[arg-type]
    assert [ids.tolist() for ids, _ in found] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [samples.tolist() for _, samples in found] == [[1, 11, 21], [31, 41, 51], [61]]
    assert (threading.get_ident() in fetching) == (device == "cpu")


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


def test_a_reader_that_stops_early_leaves_no_thread():
    before = threading.active_count()
    found = ahead(iter(range(100)))
    assert next(found) == 0
    found.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_two_threads_do_not_make_batches_at_the_same_time(digits_task, monkeypatch):
    """The thread that fetches in advance, and the curvature's own batches: a file has one place."""
    kind, inside, most = type(digits_task), [], []
    plain = kind.batch

    def seeking(task, ids, draw):
        inside.append(ids)
        most.append(len(inside))
        time.sleep(0.02)  # long enough for the other thread to come in
        inside.pop()
        return plain(task, ids, draw)

    monkeypatch.setattr(kind, "batch", seeking)
    model = digits_task.model().eval()
    operator = GaussNewton(model, ParameterSpace(model), digits_task, torch.arange(8))
    job: Any = SimpleNamespace(task=digits_task)
    ids, draw = torch.arange(4), Draw(0)
    work = [lambda: SampleJob.read(job, ids, draw), lambda: operator.batch(ids)]
    threads = [threading.Thread(target=lambda one=one: [one() for _ in range(5)]) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 10
    assert max(most) == 1
