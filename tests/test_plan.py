"""The plan's arithmetic and the schedule's values, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import optax
import pytest
from ml_collections import config_dict

from parallel_train import UserError, create_learning_rate_fn, default_config, make_plan
from parallel_train.plan import HARDWARE_FIELDS

HERE = __file__


def config(**fields: Any) -> config_dict.ConfigDict:
    return config_dict.ConfigDict({'batch_size': 240, **fields})


# The guide's function, written from its description with optax alone: the reference.
def guide_schedule(config: Any, base_learning_rate: float, steps_per_epoch: int) -> optax.Schedule:
    warmup = optax.linear_schedule(
        init_value=0.0,
        end_value=base_learning_rate,
        transition_steps=config.warmup_epochs * steps_per_epoch,
    )
    cosine_epochs = max(config.num_epochs - config.warmup_epochs, 1)
    cosine = optax.cosine_decay_schedule(
        init_value=base_learning_rate, decay_steps=cosine_epochs * steps_per_epoch
    )
    return optax.join_schedules([warmup, cosine], [config.warmup_epochs * steps_per_epoch])


@pytest.mark.parametrize('num_epochs', [1, 3, 10, 2.5])
@pytest.mark.parametrize('warmup_epochs', [0, 1, 2, 0.5, 0.3, 1.37])
@pytest.mark.parametrize('steps_per_epoch', [1, 7, 50])
def test_schedule_is_the_guides(num_epochs: float, warmup_epochs: float, steps_per_epoch: int) -> None:
    fields = config_dict.ConfigDict({'num_epochs': num_epochs, 'warmup_epochs': warmup_epochs})
    ours = create_learning_rate_fn(fields, 0.1, steps_per_epoch)
    guides = guide_schedule(fields, 0.1, steps_per_epoch)
    for step in range(math.ceil(num_epochs * steps_per_epoch) + 3):
        assert float(ours(step)) == float(guides(step)), step


def test_constant_schedule_is_the_guides_default_column() -> None:
    rate = create_learning_rate_fn(config(schedule='constant', num_epochs=3, warmup_epochs=1), 0.1, 5)
    assert [float(rate(step)) for step in (0, 1, 7, 100)] == pytest.approx([0.1] * 4)
    plan = make_plan(config(schedule='constant', num_epochs=3, warmup_epochs=1), 1200, 100, 1)
    assert plan.boundaries == [] and plan.warmup_steps == 0
    assert plan.final_learning_rate == plan.peak_learning_rate == 0.1


# By hand. 1,200 examples in batches of 240: 5 steps an epoch; 2 epochs, 0.8 of warmup: 4 steps
# from 0 to 0.1, then cosine over 6: 0.1·(1 + cos(πt/6))/2.
WHOLE = [0, 0.025, 0.05, 0.075, 0.1, 0.0933013, 0.075, 0.05, 0.025, 0.0066987]
# 1.5 epochs, 0.5 of warmup: 2.5 steps, then cosine over 5, from 2.5 on: at step 3, t = 0.5 of 5.
FRACTIONAL = [0, 0.04, 0.08, 0.0975528, 0.0793893, 0.05, 0.0206107]


@pytest.mark.parametrize('devices', [1, 3, 8])
@pytest.mark.parametrize(
    ('num_epochs', 'warmup_epochs', 'rates', 'num_steps'),
    [(2, 0.8, WHOLE, 10), (1.5, 0.5, FRACTIONAL, 7)],
)
def test_rates_by_hand(
    devices: int, num_epochs: float, warmup_epochs: float, rates: list[float], num_steps: int
) -> None:
    fields = config(num_epochs=num_epochs, warmup_epochs=warmup_epochs, learning_rate=0.1)
    plan = make_plan(fields, 1200, 100, devices)
    assert (plan.steps_per_epoch, plan.num_steps) == (5, num_steps)
    in_step = create_learning_rate_fn(fields, plan.peak_learning_rate, plan.steps_per_epoch)
    for step, rate in enumerate(rates):
        assert plan.rate(step) == pytest.approx(rate, abs=1e-7)
        assert float(in_step(step)) == pytest.approx(rate, abs=1e-7)
    assert plan.final_learning_rate == plan.rate(num_steps - 1)


def test_plan_by_hand() -> None:
    fields = config(
        batch_size=256, num_epochs=10, warmup_epochs=1, learning_rate=0.1,
        learning_rate_scaling='linear', reference_batch_size=128, shards=32, accumulation_steps=2,
        eval_batch_size=3000, eval_every_epochs=0.5, checkpoint_every_epochs=0,
    )  # fmt: skip
    plan = make_plan(fields, 60_000, 10_000, 8, 2).to_dict()
    expected = {
        'num_train_examples': 60_000, 'num_eval_examples': 10_000, 'batch_size': 256,
        'num_devices': 8, 'num_processes': 2, 'per_device_batch_size': 16, 'accumulation_steps': 2,
        'shards': 32, 'examples_per_shard': 8, 'steps_per_epoch': 234,
        'dropped_examples_per_epoch': 96, 'num_steps': 2340, 'warmup_steps': 234,
        'decay_steps': 2106, 'boundaries': [234], 'peak_learning_rate': 0.2, 'eval_steps': 4,
        'eval_every_steps': 117, 'checkpoint_every_steps': 2340, 'warnings': [],
    }  # fmt: skip
    assert {key: plan[key] for key in expected} == expected
    assert plan['learning_rate_at']['234'] == 0.2
    assert plan['learning_rate_at']['2340'] == pytest.approx(0, abs=1e-12)


def test_square_root_scaling() -> None:
    fields = config(
        batch_size=1024, learning_rate=0.1, learning_rate_scaling='sqrt', reference_batch_size=256
    )
    assert make_plan(fields, 60_000, 1, 1).peak_learning_rate == pytest.approx(0.2)


def test_plan_is_the_same_on_any_device_count() -> None:
    plans = [make_plan(config(shards=24), 60_000, 10_000, n) for n in (1, 2, 4, 8)]
    first = plans[0].to_dict()
    for plan in plans[1:]:
        differing = {key for key, value in plan.to_dict().items() if value != first[key]}
        assert differing <= set(HARDWARE_FIELDS)
        assert [plan.rate(step) for step in range(2500)] == [plans[0].rate(step) for step in range(2500)]


@pytest.mark.parametrize('fields', [{}, {'shards': 24}, {'shards': 48, 'accumulation_steps': 2}])
def test_plan_is_the_same_in_any_number_of_processes(fields: dict[str, Any]) -> None:
    for devices in (4, 8):
        plans = {n: make_plan(config(**fields), 60_000, 10_000, devices, n) for n in (1, 2, 4)}
        one = plans[1].to_dict()
        for processes, plan in plans.items():
            assert (plan.num_processes, plan.num_devices) == (processes, devices)
            assert plan.to_dict() == {**one, 'num_processes': processes}
            assert plan.pieces == plans[1].pieces  # the rate of every step


def test_plan_is_the_same_on_any_devices_in_any_processes() -> None:
    first = make_plan(config(shards=24), 60_000, 10_000, 1, 1)
    for devices, processes in ((2, 1), (2, 2), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4)):
        plan = make_plan(config(shards=24), 60_000, 10_000, devices, processes)
        hardware = {
            'num_devices': devices, 'num_processes': processes, 'per_device_batch_size': 240 // devices
        }  # fmt: skip
        assert set(hardware) == set(HARDWARE_FIELDS)
        assert plan.to_dict() == {**first.to_dict(), **hardware}
        assert plan.comparable() == first.comparable()
        assert plan.pieces == first.pieces


def test_clamped_decay_is_said_loudly() -> None:
    plan = make_plan(config(num_epochs=2.5, warmup_epochs=2, learning_rate=0.1), 1200, 100, 1)
    assert (plan.num_steps, plan.warmup_steps, plan.decay_steps) == (12, 10, 5)
    # The last update has 1 of the cosine's 5 steps behind it.
    final = 0.1 * (1 + math.cos(math.pi / 5)) / 2
    assert plan.final_learning_rate == pytest.approx(final)
    [warning] = plan.warnings
    assert 'THE DECAY WILL NOT BE FINISHED' in warning and f'{final:.6g}' in warning
    assert make_plan(config(num_epochs=3, warmup_epochs=2), 1200, 100, 1).warnings == []
    [warning] = make_plan(config(num_epochs=1, warmup_epochs=2), 1200, 100, 1).warnings
    assert 'INSIDE THE WARMUP' in warning


@pytest.mark.parametrize(
    ('fields', 'devices', 'parts'),
    [
        ({'batch_size': 100}, 8, ['batch_size=100', '8 × 1', '96, 104']),
        ({'batch_size': 5}, 8, ['batch_size=5', 'nearest that is: 8']),
        ({'batch_size': 64, 'accumulation_steps': 3}, 2, ['batch_size=64', '2 × 3', '60, 66']),
        ({'batch_size': 64, 'shards': 4}, 8, ['shards=4', '8 × 1', 'and divides batch_size=64: 8']),
        ({'batch_size': 60, 'shards': 8}, 4, ['batch_size=60', 'shards=8', '56, 64']),
        ({'batch_size': 50, 'shards': 8}, 4, ['batch_size=50', '4 × 1', 'shards=8', '48, 56']),
        ({'batch_size': 1203, 'shards': 32}, 1, ['batch_size=1203', 'nearest that is: 1184']),
        ({'num_epochs': 1e300}, 1, ['num_epochs=1e+300', 'less than 2.14748e+09']),
        ({'batch_size': 2400}, 1, ['batch_size=2400', '1200 examples']),
        ({'num_epochs': 0.1}, 1, ['num_epochs=0.1', 'at least 0.2']),
        ({'num_epochs': 0}, 1, ['num_epochs=0', 'greater than 0']),
        ({'num_epochs': -1.0}, 1, ['num_epochs=-1']),
        ({'warmup_epochs': -0.5}, 1, ['warmup_epochs=-0.5']),
        ({'learning_rate': math.nan}, 1, ['learning_rate=nan', 'finite']),
        ({'learning_rate': math.inf}, 1, ['learning_rate=inf']),
        ({'batch_size': 0}, 1, ['batch_size=0']),
        ({'batch_size': True}, 1, ['batch_size=True']),
        ({'schedule': 'cosin'}, 1, ["schedule='cosin'", 'did you mean cosine?']),
        ({'schedule': 'steps', 'decay_epochs': (1.0,), 'warmup_epochs': 2}, 1, ['decay_epochs=(1.0,)', '2']),
        ({'decay_epochs': (3.0, 2.0)}, 1, ['decay_epochs=(3.0, 2.0)', 'rising order']),
        ({'dtype': 'float16'}, 1, ["dtype='float16'", 'float32, bfloat16']),
        ({'optimizer': 'sgdd'}, 1, ["optimizer='sgdd'", 'sgd, adamw']),
        ({'batchsize': 3}, 1, ['config.batchsize', 'did you mean batch_size?']),
    ],
)
def test_what_does_not_fit(fields: dict[str, Any], devices: int, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        make_plan(config(**fields), 1200, 100, devices)
    for part in parts:
        assert part in str(error.value)


def test_step_decay_after_a_warmup_from_the_reference_rate() -> None:
    """Goyal et al. 2017 in small: 5 steps an epoch, one of warmup from 0.1, decays after 3 and 4 epochs."""
    steps = config(
        schedule='steps', num_epochs=5, warmup_epochs=1, learning_rate=0.1, batch_size=960,
        learning_rate_scaling='linear', reference_batch_size=240, warmup_learning_rate=0.1,
        decay_epochs=(3.0, 4.0), decay_factor=0.5,
    )  # fmt: skip
    plan = make_plan(steps, 4800, 100, 1)
    expected = [0.1, 0.16, 0.22, 0.28, 0.34] + 10 * [0.4] + 5 * [0.2] + 5 * [0.1]
    assert [plan.rate(step) for step in range(25)] == pytest.approx(expected)
    assert (plan.boundaries, plan.warmup_steps, plan.decay_steps) == ([5, 15, 20], 5, 15)
    assert plan.peak_learning_rate == 0.4 and plan.final_learning_rate == pytest.approx(0.1)
    assert plan.warnings == []
    rate = create_learning_rate_fn(steps, 0.4, 5)
    assert [float(rate(step)) for step in range(25)] == pytest.approx(expected)
    short = make_plan(config(**{**steps.to_dict(), 'num_epochs': 4.0}), 4800, 100, 1)
    assert len(short.warnings) == 1 and 'BEFORE THE LAST DECAY' in short.warnings[0]


def test_empty_splits_do_not_fit() -> None:
    for sizes in ((0, 100), (1200, 0)):
        with pytest.raises(UserError, match='holds no examples'):
            make_plan(config(), *sizes, 1)


def test_every_field_of_the_defaults_is_checked_and_valid() -> None:
    from parallel_train import config as config_lib
    from parallel_train import config_fields

    assert set(config_fields.CHECKS) == set(default_config())
    assert json.loads(config_lib.to_json(config_lib.complete(default_config())))


def test_planning_needs_no_jax() -> None:
    program = (
        'import sys; from parallel_train import make_plan, default_config;'
        'make_plan(default_config(), 60000, 10000, 8);'
        'sys.exit(", ".join(m for m in ("jax", "flax", "optax", "tensorflow") if m in sys.modules) or None)'
    )
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
