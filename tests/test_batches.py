"""Does a split live on the devices, or does the host feed each step?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from parallel_train import batches
from parallel_train.dataset import Split
from parallel_train.mesh import make_mesh, start_devices

start_devices(8)

SPLIT = Split(np.zeros((10, 28, 28, 1), np.uint8), np.zeros(10, np.int32), ('a',))
SIZE = 10 * 28 * 28  # bytes


@pytest.mark.parametrize(
    ('num_bytes', 'memory_bytes', 'may'),
    [
        (250, 1000, True),
        (251, 1000, False),
        (250, 1003, True),
        (251, 1003, False),
        (251, 1004, True),
        (20 * 2**30, 80 * 2**30, True),
        (20 * 2**30 + 1, 80 * 2**30, False),
        (1, 0, False),  # of a device that does not tell
    ],
)
def test_a_split_takes_a_quarter_of_the_memory_at_most(num_bytes: int, memory_bytes: int, may: bool) -> None:
    assert batches.may_stay(num_bytes, memory_bytes) is may


def memory_of_machine(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: SimpleNamespace(total=num_bytes))


@pytest.mark.parametrize('devices', [1, 4])
def test_cpu_devices_share_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
    """Each of them holds the split whole."""
    mesh = make_mesh(devices)
    memory_of_machine(monkeypatch, 4 * devices * SIZE)
    assert batches.resident(SPLIT, 'auto', mesh)
    memory_of_machine(monkeypatch, 4 * devices * SIZE - 1)
    assert not batches.resident(SPLIT, 'auto', mesh)


@pytest.mark.parametrize(
    ('stats', 'fits'),
    [({'bytes_limit': 4 * SIZE}, True), ({'bytes_limit': 4 * SIZE - 1}, False), ({}, False), (None, False)],
)
def test_other_devices_have_a_memory_of_their_own(stats: dict[str, int] | None, fits: bool) -> None:
    device = SimpleNamespace(platform='gpu', memory_stats=lambda: stats)
    elsewhere = SimpleNamespace(platform='gpu')  # of another process: JAX does not know its memory
    here = SimpleNamespace(devices=np.array([device] * 2))
    mesh: Any = SimpleNamespace(devices=np.array([elsewhere] * 2 + [device] * 2), local_mesh=here)
    assert batches.resident(SPLIT, 'auto', mesh) is fits


def test_the_config_decides_whatever_the_memory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(2)
    memory_of_machine(monkeypatch, 1)
    assert batches.resident(SPLIT, 'device', mesh) and not batches.resident(SPLIT, 'auto', mesh)
    memory_of_machine(monkeypatch, 2**60)
    assert not batches.resident(SPLIT, 'host', mesh) and batches.resident(SPLIT, 'auto', mesh)
