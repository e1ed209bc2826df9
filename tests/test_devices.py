"""How many devices, where the user does not say."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from parallel_train import config as config_lib
from parallel_train import devices
from parallel_train.mesh import start_devices
from parallel_train.sizes import Sizes
from tests.conftest import environment
from tests.models_for_tests import tiny

start_devices(8)
SIZES = Sizes(256, 64, (28, 28, 1), 10, 'here')


def config(**fields: Any) -> config_lib.Config:
    return config_lib.with_dataset(config_lib.complete(tiny(**fields)), SIZES.input_shape, 10)


@pytest.mark.parametrize(
    ('fields', 'cores', 'counts'),
    [
        ({'batch_size': 256}, 2, [1, 2, 4, 8]),
        ({'batch_size': 256, 'shards': 4}, 2, [1, 2, 4]),
        ({'batch_size': 256, 'shards': 8, 'accumulation_steps': 4}, 2, [1, 2]),
        ({'batch_size': 27}, 2, [1]),
        ({'batch_size': 256}, 16, [8, 16, 32, 64]),
        ({'batch_size': 4}, 64, [4]),
        ({'batch_size': 8, 'mixup_alpha': 0.2}, 2, [1, 2, 4]),  # two examples in each shard
    ],
)
def test_counts_worth_measuring(fields: dict[str, Any], cores: int, counts: list[int]) -> None:
    assert devices.candidates(config(**fields), cores) == counts


def test_schedules_that_do_not_fit_the_measurement_are_no_obstacle() -> None:
    job = config(schedule='cosine_restarts', restart_epochs=2.0, warmup_epochs=1.0)
    assert devices._stepper(job, SIZES, 1)() > 0


@pytest.mark.slow
def test_measured_once_then_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    lines: list[str] = []
    chosen = devices.choose_devices(config(num_epochs=0.2), SIZES, None, None, lines.append)
    assert 'measuring' in lines[0] and chosen in devices.candidates(config())
    rates = {int(line.split()[0]): float(line.split()[2].replace(',', '')) for line in lines[1:]}
    assert list(rates) == devices.candidates(config()) and rates[chosen] == max(rates.values())
    lines.clear()
    # Another rate or length is the same step; another batch size is not.
    again = devices.choose_devices(config(learning_rate=0.5), SIZES, None, None, lines.append)
    assert again == chosen and lines == []
    assert devices.remembered(config(batch_size=64), SIZES) is None


def test_a_resumed_job_keeps_its_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    (tmp_path / 'plan.json').write_text('{"num_devices": 2}')
    assert devices.choose_devices(config(), SIZES, None, tmp_path, print) == 2
    assert devices.choose_devices(config(), SIZES, 4, tmp_path, print) == 4
    assert jax.device_count() == 8


FAULTS = """
import resource, threading
{start}

def touch():
    for _ in range(10):
        b'x' * 24_000_000

def in_thread():
    touch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    touch()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=in_thread)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason="another libc's malloc")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """What a thread takes and frees again and again is not given back, page fault for page fault."""

    def faults(start: str, **changes: str) -> int:
        env = {name: value for name, value in environment().items() if not name.startswith('MALLOC_')}
        code = FAULTS.format(start=start)
        return int(subprocess.check_output([sys.executable, '-c', code], env={**env, **changes}, text=True))

    of_one_array = 24_000_000 // 4096
    started = 'from parallel_train import start_devices; start_devices(2)'
    assert faults(started) < of_one_array / 2
    assert faults(started, MALLOC_TRIM_THRESHOLD_='131072') > 5 * of_one_array  # as the environment says
