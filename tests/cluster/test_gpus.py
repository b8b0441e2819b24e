"""Workers and GPUs: how many have room, and what a part of a GPU means."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from infl_cluster.how import How, workers_on
from infl_cluster.pool import RayBackend
from infl_cluster.room import lack
from influence_jobs import devices, memory
from influence_jobs.errors import SpecError
from influence_jobs.jobs import automatic


@pytest.mark.parametrize(
    ("gpus", "num_gpus", "workers"),
    [
        (4, 1, 4),
        (4, 2, 2),
        (3, 2, 1),
        (1, 0.5, 2),
        (2, 0.5, 4),
        (2, 0.6, 2),
        (1, 0.1, 10),
        (0, 0.5, 0),
    ],
)
def test_a_worker_is_on_one_gpu_or_takes_whole_ones(gpus, num_gpus, workers):
    assert workers_on(gpus, num_gpus) == workers


@pytest.mark.parametrize(("num_gpus", "workers"), [(1.0, 3), (0.5, 6), (0.6, 3), (2.0, 1)])
def test_workers_are_as_many_as_have_room_on_every_node(num_gpus, workers, monkeypatch):
    nodes: list[dict[str, Any]] = [
        {"Alive": True, "Labels": {}, "Resources": {"CPU": 16, "GPU": 2}},
        {"Alive": True, "Labels": {}, "Resources": {"CPU": 16, "GPU": 1}},
        {"Alive": False, "Labels": {}, "Resources": {"CPU": 16, "GPU": 8}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    backend = RayBackend(device="cuda", num_gpus=num_gpus)
    assert backend._sizes(100)[0] == workers


def test_one_and_a_half_gpus_are_refused():
    with pytest.raises(SpecError, match=r"--num-gpus 1\.5: a worker takes whole GPUs"):
        How.checked({"num_gpus": 1.5})


def test_workers_here_share_gpus(monkeypatch):
    monkeypatch.setattr(devices, "resolved", lambda device: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert How.checked({"num_gpus": 0.5}).num_workers == 4
    assert How.checked({}).num_workers == 2


def test_a_part_of_a_gpu_is_a_part_of_its_memory(monkeypatch):
    taken = []
    monkeypatch.setattr(memory, "_gpu_share", 1.0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", taken.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 15)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
    device = torch.device("cuda")
    assert memory.free_bytes(device) == 70  # of the whole GPU, and what torch keeps unused
    memory.share_gpu(0.5)
    assert taken == [0.5]
    assert memory.free_bytes(device) == 35
    card = SimpleNamespace(name="card", total_memory=80)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    # A batch that fits into all of it may not fit into a part.
    assert automatic._device(device) == "card, 80 bytes, 0.5 of them"
    memory.share_gpu(1.0)
    assert automatic._device(device) == "card, 80 bytes"


Node = tuple[dict[str, float], dict[str, str]]
SMALL: Node = ({"CPU": 2.0}, {"zone": "a", "kind": "x"})
LARGE: Node = ({"CPU": 8.0, "GPU": 1.0}, {"zone": "b"})


@pytest.mark.parametrize(
    ("nodes", "wants", "said", "cure"),
    [
        ([], {}, "no node of the cluster is up", "add a node"),
        (
            [SMALL, LARGE],
            {"labels": {"zone": "c"}},
            "no node has the label zone=c: the nodes have zone=a, zone=b",
            "correct --node-label, or add a node with it",
        ),
        (
            [SMALL],
            {"labels": {"disk": "ssd"}},
            "no node has the label disk=ssd: the nodes have none such",
            "correct --node-label, or add a node with it",
        ),
        (
            [SMALL, SMALL],
            {"cpus": 4},
            "a worker takes CPU 4, and the nodes have CPU 2",
            "add such a node; a resumed run takes as many CPUs as the nodes have then",
        ),
        (
            [SMALL, LARGE],
            {"gpus": 2.0},
            "a worker takes CPU 1, GPU 2, and the nodes have CPU 2, GPU 0; CPU 8, GPU 1",
            "lower --num-gpus, take --device cpu, or add such a node",
        ),
        (
            [SMALL, LARGE],
            {"cpus": 4, "labels": {"zone": "a"}},
            "a worker takes CPU 4, and the nodes with zone=a have CPU 2",
            "add such a node; a resumed run takes as many CPUs as the nodes have then",
        ),
    ],
)
def test_what_no_node_has_is_told_with_the_cure_that_fits(nodes, wants, said, cure):
    assert lack(nodes, **{"cpus": 1, "gpus": 0.0, "labels": {}, **wants}) == (said, cure)


def test_a_cluster_with_room_lacks_nothing():
    assert lack([SMALL, LARGE], cpus=4, gpus=0.5, labels={"zone": "b"}) is None
