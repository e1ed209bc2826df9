"""Every schedule against rates worked out by hand from its formula; what does not fit is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from ml_collections import config_dict

from parallel_train import UserError, create_learning_rate_fn, make_plan
from parallel_train import config as config_lib
from parallel_train.config_fields import SCHEDULES
from parallel_train.plan import Plan
from parallel_train.schedule import READS
from parallel_train.show_plan import plan_table
from tests.conftest import run_cli

EXAMPLES, BATCH = 96, 24  # 4 steps an epoch


def config(schedule: str, num_epochs: float, warmup_epochs: float, **fields: Any) -> config_dict.ConfigDict:
    return config_dict.ConfigDict({
        'schedule': schedule, 'num_epochs': num_epochs, 'warmup_epochs': warmup_epochs,
        'batch_size': BATCH, 'learning_rate': 0.8, **fields,
    })  # fmt: skip


def planned(fields: config_dict.ConfigDict, devices: int = 1) -> Plan:
    return make_plan(fields, EXAMPLES, 10, devices)


# The rate of every update, by hand. 4 steps an epoch, peak 0.8. After each: boundaries, warmup_steps and
# decay_steps.
GOLDEN: dict[str, tuple[config_dict.ConfigDict, list[float], list[int], int, int]] = {
    # 2 steps up, then 0.8 + (0.2 - 0.8)·s/6.
    'linear': (
        config('linear', 2, 0.5, end_learning_rate=0.2),
        [0, 0.4, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3],
        [2], 2, 6,
    ),
    # (1 - s/4)²·0.8: 1, 9/16, 4/16, 1/16.
    'polynomial': (
        config('polynomial', 1, 0.0, decay_power=2.0),
        [0.8, 0.45, 0.2, 0.05],
        [], 0, 4,
    ),
    # 0.1 + 0.7·(1 - s/4)^1.5: 0.75^1.5 = 0.6495191, 0.5^1.5 = 0.3535534, 0.25^1.5 = 0.125.
    'polynomial, a fraction, to an end': (
        config('polynomial', 1, 0.0, decay_power=1.5, end_learning_rate=0.1),
        [0.8, 0.55466334, 0.34748737, 0.1875],
        [], 0, 4,
    ),
    # 0.2 + 0.6·(1 + cos(π s/4))/2: 1, 0.8535534, 0.5, 0.1464466 of 0.6.
    'cosine to an end': (
        config('cosine', 1, 0.0, end_learning_rate=0.2),
        [0.8, 0.71213203, 0.5, 0.28786797],
        [], 0, 4,
    ),
    # T_0 = 1 epoch, T_mult = 2: cycles of 4 and 8 steps; cos(π/8) = 0.9238795, cos(3π/8) = 0.3826834.
    'cosine_restarts': (
        config('cosine_restarts', 3, 0.0, restart_epochs=1.0, restart_multiplier=2.0),
        [0.8, 0.68284271, 0.4, 0.11715729,
         0.8, 0.76955181, 0.68284271, 0.55307337, 0.4, 0.24692663, 0.11715729, 0.03044819],
        [4], 0, 12,
    ),
    # A warmup of 1 step, then cycles of 3.5 steps that begin at steps 1 and 4.5, from 0.8 to 0.1:
    # 0.1 + 0.35·(1 + cos(π s/3.5)) for s = 0, 1, 2, 3 and 0.5, 1.5, 2.5.
    'cosine_restarts between steps, to an end': (
        config('cosine_restarts', 2, 0.25, restart_epochs=0.875, end_learning_rate=0.1),
        [0, 0.8, 0.66822143, 0.37211767, 0.13466089, 0.76533911, 0.52788233, 0.23177857],
        [1, 5], 1, 7,
    ),
    # Goyal's warmup from 0.2: 0.2 + 0.6·s/2. Then 0.8, 0.4 and 0.2 of an epoch each.
    'steps': (
        config('steps', 3.5, 0.5, warmup_learning_rate=0.2, decay_epochs=(1.5, 2.5), decay_factor=0.5),
        [0.2, 0.5, *4 * [0.8], *4 * [0.4], *4 * [0.2]],
        [2, 6, 10], 2, 8,
    ),
    # τ = the warmup's 2 steps: 0.8/√(1 + s/2), s = 0 ... 5; at s = 6 it is 0.4, from there down in 2 steps.
    'rsqrt': (
        config('rsqrt', 2.5, 0.5, cooldown_epochs=0.5),
        [0, 0.4, 0.8, 0.65319726, 0.56568542, 0.50596443, 0.46188022, 0.42761799, 0.4, 0.2],
        [2, 8], 2, 8,
    ),
    # τ = 1 step, no cooldown, no warmup: 0.8/√(1 + s).
    'rsqrt without a cooldown': (
        config('rsqrt', 1, 0.0, timescale_epochs=0.25),
        [0.8, 0.56568542, 0.46188022, 0.4],
        [], 0, 4,
    ),
    # 2 steps up, 2 at the peak, 4 down from 0.8 to 0.4.
    'warmup_stable_decay': (
        config('warmup_stable_decay', 2, 0.5, cooldown_epochs=1.0, end_learning_rate=0.4),
        [0, 0.4, 0.8, 0.8, 0.8, 0.7, 0.6, 0.5],
        [2, 4], 2, 6,
    ),
    # From 0.2 up in 3 steps, down in 3, then in 2 from 0.2 to 0.
    'one_cycle': (
        config('one_cycle', 2, 0.75, warmup_learning_rate=0.2),
        [0.2, 0.4, 0.6, 0.8, 0.6, 0.4, 0.2, 0.1],
        [3, 6], 3, 5,
    ),
    # The triangle: no tail.
    'one_cycle of the whole run': (
        config('one_cycle', 1, 0.5),
        [0, 0.4, 0.8, 0.4],
        [2], 2, 2,
    ),
    'constant': (config('constant', 1, 0.0), 4 * [0.8], [], 0, 0),
}  # fmt: skip


@pytest.mark.parametrize('name', GOLDEN)
@pytest.mark.parametrize('devices', [1, 3, 8])
def test_rates_by_hand(name: str, devices: int) -> None:
    fields, rates, boundaries, warmup_steps, decay_steps = GOLDEN[name]
    plan = planned(fields, devices)
    assert (plan.steps_per_epoch, plan.num_steps) == (4, len(rates))
    in_step = create_learning_rate_fn(fields, plan.peak_learning_rate, plan.steps_per_epoch)
    for step, rate in enumerate(rates):
        assert plan.rate(step) == pytest.approx(rate, abs=2e-8), step
        assert float(in_step(step)) == pytest.approx(rate, abs=2e-7), step
    assert (plan.boundaries, plan.warmup_steps, plan.decay_steps) == (boundaries, warmup_steps, decay_steps)
    assert plan.learning_rate_at[len(rates) - 1] == plan.final_learning_rate == plan.rate(len(rates) - 1)
    assert {0, *boundaries, len(rates)} <= set(plan.learning_rate_at)
    assert plan.warnings == []


def test_every_schedule_has_a_golden_table_and_is_shown() -> None:
    assert {fields.schedule for fields, *_ in GOLDEN.values()} == set(SCHEDULES) == set(READS)
    for fields, *_ in GOLDEN.values():
        plan = planned(fields)
        table = plan_table(plan, config_lib.complete(fields))
        for piece in plan.pieces:
            assert f'  {piece.name} ' in table


# ---------------------------------------------------------------- cosine with restarts


def test_the_cycles_of_the_paper() -> None:
    """SGDR, table 1: T_0 = 10, T_mult = 2 ends cycles after 10, 30, 70, 150 epochs."""
    paper = config(
        'cosine_restarts', 150, 0, restart_epochs=10.0, restart_multiplier=2.0, batch_size=128,
        learning_rate=0.05,
    )  # fmt: skip
    plan = make_plan(paper, 50_048, 10_000, 8)
    assert plan.steps_per_epoch == 391
    assert plan.snapshot_steps == [391 * epochs for epochs in (10, 30, 70, 150)]
    assert plan.boundaries == plan.snapshot_steps[:-1]
    assert [plan.rate(391 * epochs) for epochs in (0, 10, 30, 70)] == [0.05] * 4  # a restart
    assert plan.rate(391 * 50) == pytest.approx(0.025)  # the middle of the third cycle
    assert all(plan.rate(step - 1) < 1e-7 for step in plan.snapshot_steps)
    for step in plan.snapshot_steps:
        assert plan.is_due(step, 10**9) and not plan.is_due(step - 1, 10**9) and plan.anything_due(step)
    assert planned(config('cosine', 10, 1)).snapshot_steps == []


def test_huang_et_al() -> None:
    """Snapshot ensembles, equation 2: M cycles of T/M steps, α₀/2·(cos(π·mod(t - 1, T/M)/(T/M)) + 1)."""
    plan = planned(config('cosine_restarts', 6, 0, restart_epochs=2.0))
    assert plan.snapshot_steps == [8, 16, 24]
    for t in range(1, 25):
        assert plan.rate(t - 1) == pytest.approx(0.8 / 2 * (math.cos(math.pi * ((t - 1) % 8) / 8) + 1))


def test_cycles_that_end_between_steps_end_with_the_step() -> None:
    """Cycles end after 4.5 and 8 steps: the fifth update still has a rate of the first."""
    plan = planned(GOLDEN['cosine_restarts between steps, to an end'][0])
    assert plan.snapshot_steps == [5, 8] and plan.boundaries == [1, 5]


# ---------------------------------------------------------------- what does not fit


BAD: dict[str, tuple[config_dict.ConfigDict, list[str]]] = {
    'no first cycle': (config('cosine_restarts', 3, 0), ['restart_epochs=0', 'such as 10']),
    'cycles too long': (
        config('cosine_restarts', 3, 0, restart_epochs=5.0), ['num_epochs=3', 'nearest that fits is: 5'],
    ),
    'cycles that do not end there': (
        config('cosine_restarts', 200, 0, restart_epochs=10.0, restart_multiplier=2.0),
        ['num_epochs=200', 'restart_epochs=10', 'nearest that fit are: 150, 310'],
    ),
    'cycles after a warmup': (
        config('cosine_restarts', 3, 0.5, restart_epochs=1.0), ['num_epochs=3', '2.5, 3.5'],
    ),
    'too many cycles': (
        config('cosine_restarts', 101, 0, restart_epochs=1.0), ['restart_epochs=1', 'more than 100 cycles'],
    ),
    'shrinking cycles': (
        config('cosine_restarts', 3, 0, restart_epochs=1.0, restart_multiplier=0.5),
        ['restart_multiplier=0.5', 'at least 1'],
    ),
    'only a warmup': (config('linear', 2, 2), ['warmup_epochs=2', 'num_epochs=2', "'linear'"]),
    'more warmup than epochs': (config('polynomial', 2, 3), ['warmup_epochs=3', 'longer than num_epochs=2']),
    'no power': (config('polynomial', 2, 0, decay_power=0.0), ['decay_power=0', 'greater than 0']),
    'cooldown too long': (
        config('warmup_stable_decay', 3, 1, cooldown_epochs=4.0), ['cooldown_epochs=4', 'use at most 2'],
    ),
    'cooldown with warmup too long': (
        config('rsqrt', 3, 1, cooldown_epochs=2.5), ['cooldown_epochs=2.5', 'warmup_epochs=1', 'at most 2'],
    ),
    'no decay': (config('warmup_stable_decay', 30, 1), ['cooldown_epochs=0', 'such as 3']),
    'no time scale': (config('rsqrt', 3, 0), ['timescale_epochs=0', 'warmup_epochs']),
    'end above the peak': (config('linear', 3, 0, end_learning_rate=0.9), ['end_learning_rate=0.9', '0.8']),
    'end above the root': (
        config('rsqrt', 4, 1, cooldown_epochs=1.0, end_learning_rate=0.5),
        ['end_learning_rate=0.5', '0.46188'],
    ),
    'half a cycle': (config('one_cycle', 3, 2), ['warmup_epochs=2', 'num_epochs=3', 'at most 1.5']),
    'no ascent': (config('one_cycle', 3, 0), ['warmup_epochs=0', 'more than 0']),
    'a tail of zeros': (config('one_cycle', 3, 1), ['warmup_learning_rate=0', 'such as 0.08', '1.5']),
}  # fmt: skip


@pytest.mark.parametrize('case', BAD)
def test_what_does_not_fit(case: str) -> None:
    fields, words = BAD[case]
    with pytest.raises(UserError) as error:
        planned(fields)
    assert str(error.value).startswith('config.')
    for word in words:
        assert word in str(error.value), error.value


def test_fields_that_have_no_effect_are_said() -> None:
    fields = config('cosine', 3, 1, cooldown_epochs=1.0, restart_epochs=2.0)
    assert [warning.split(':')[0] for warning in planned(fields).warnings] == [
        "schedule='cosine' does not read cooldown_epochs",
        "schedule='cosine' does not read restart_epochs",
    ]


@pytest.mark.parametrize('case', ['cycles that do not end there', 'cooldown too long'])
def test_it_is_exit_code_2_and_nothing_is_written(case: str, tmp_path: Path, recipe: Path) -> None:
    fields, words = BAD[case]
    sizes = ['--config.num_train_examples=96', '--config.num_eval_examples=10', '--config.shards=0',
             '--config.input_shape=(28,28,1)', '--config.num_classes=10']  # fmt: skip
    given = [f'--config.{name}={value}' for name, value in fields.items()]
    common = [f'--data_dir={tmp_path / "none"}', f'--config={recipe}', '--devices=1', *sizes, *given]
    result = run_cli('plan', *common)
    assert result.code == 2 and result.stdout == '', result
    assert result.stderr.startswith('error: config.') and all(word in result.stderr for word in words)
    assert list(tmp_path.iterdir()) == []
