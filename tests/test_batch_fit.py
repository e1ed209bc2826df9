"""Is what an error advises accepted?"""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from parallel_train.batch_fit import check_fit
from parallel_train.config import complete, default_config
from parallel_train.errors import UserError

EXAMPLES = 102
JOBS = ((1, 1), (3, 1), (4, 2), (8, 1), (8, 4), (6, 3))  # devices and processes


@pytest.fixture(scope='module')
def config() -> Any:
    config = default_config()
    config.dataset = 'mnist'
    return complete(config)


def check(config: Any, job: tuple[int, int], **fields: Any) -> None:
    config.update(fields)
    check_fit(config, EXAMPLES, 10, *job)


def test_every_advice_on_shards_is_accepted(config: Any) -> None:
    ranges = ((1, 8, 20, 64, 100, 120), (1, 4, 6, 8, 10, 36, 100), (1, 2, 3), ('pmean', 'tree'), (0.0, 0.2))
    names = ('batch_size', 'shards', 'accumulation_steps', 'reduction', 'mixup_alpha')
    taken = {'fewer': 0, 'nearest': 0, 'both': 0, 'none': 0}
    for values, job in itertools.product(itertools.product(*ranges), JOBS):
        fields: dict[str, Any] = dict(zip(names, values, strict=True))
        if fields['shards'] % (job[0] * fields['accumulation_steps']) == 0:
            continue
        with pytest.raises(UserError, match='exactly that many; ') as caught:
            check(config, job, **fields)
        advice = str(caught.value).split('exactly that many; ')[1]
        if found := re.search(r'fewer devices: (\d+)', advice):
            check(config, (int(found[1]), job[1]), **fields)
            taken['fewer'] += 1
        if found := re.search(r'nearest that .*: (\d+(?:, \d+)*)', advice.split(', or use')[0]):
            for near in found[1].split(', '):
                check(config, job, **fields | {'shards': int(near)})
            taken['nearest'] += 1
        if found := re.search(r'shards=(\d+) with batch_size=(\d+)', advice):
            check(config, job, **fields | {'shards': int(found[1]), 'batch_size': int(found[2])})
            taken['both'] += 1
        taken['none'] += advice == 'use fewer devices or accumulation_steps'
    assert all(taken.values()), taken


@pytest.mark.parametrize('field', ['devices', 'batch_size', 'shards', 'accumulation_steps'])
def test_advice_on_a_number_beyond_counting_comes_at_once(config: Any, field: str) -> None:
    fields = {
        'batch_size': 64,
        'shards': 12,
        'accumulation_steps': 1,
        'reduction': 'pmean',
        'mixup_alpha': 0.0,
    }
    devices = 10**20 if field == 'devices' else 8
    if field != 'devices':
        fields[field] = 10**20 + 2
    with pytest.raises(UserError, match='exactly that many; '):
        check(config, (devices, 1), **fields)
