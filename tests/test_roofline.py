"""The arithmetic behind a prediction, against numbers worked out by hand; no compiler, no JAX."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from parallel_train import UserError, topologies
from parallel_train.fit import largest_that_fits
from parallel_train.hlo import Collective, collectives
from parallel_train.roofline import (
    Prediction,
    checkpoint_interval_seconds,
    fit_cpu,
    mean_seconds_between_failures,
    predict,
    ring_all_reduce_seconds,
    time_lost_fraction,
    torus_seconds,
)
from parallel_train.traffic import hbm_bytes

# ---------------------------------------------------------------- topologies


@pytest.mark.parametrize(
    ('name', 'devices', 'links', 'hops'),
    [
        ('v5e:2x4', 8, 1 + 1, 1 + 3),  # two lines
        ('v5e:8x16', 128, 1 + 2, 7 + 15),  # a line and the pod's ring
        ('v6e:16x16', 256, 2 + 2, 15 + 15),
        ('v4:2x2x1', 4, 1 + 1 + 0, 1 + 1),
        ('v4:2x4x4', 32, 3, 7),  # less than a cube: nothing closes
        ('v5p:8x8x16', 1024, 6, 7 + 7 + 15),  # whole cubes: a torus
        ('cpu:8', 8, 1, 7),
    ],
)
def test_topologies(name: str, devices: int, links: int, hops: int) -> None:
    topology = topologies.parse(name)
    assert (topology.name, topology.num_devices, topology.links, topology.hops) == (
        name, devices, links, hops
    )  # fmt: skip
    assert topology.is_cpu == (name == 'cpu:8')


@pytest.mark.parametrize('name', ['v5e:3x5', 'v5e', 'v7:2x2', 'cpu:0', 'cpu:65', 'cpu:x', 'v5e:2x4 ', ''])
def test_unknown_topologies_are_refused_with_those_known(name: str) -> None:
    with pytest.raises(UserError) as error:
        topologies.parse(name)
    message = str(error.value)
    assert f'topology={name!r}' in message
    for part in ('v4:{', 'v5e:{2x2,2x4,', 'v5p:{', 'v6e:{', 'cpu:N'):
        assert part in message


def test_the_nearest_topology_is_named() -> None:
    with pytest.raises(UserError, match=r'did you mean v5e:16x16\?'):
        topologies.parse('v5e:16x61')


# ---------------------------------------------------------------- predictions

ALL_REDUCE = Collective('all-reduce', 1, 100_000_000)


@pytest.mark.parametrize(
    ('name', 'seconds'),
    [
        # 2 · 7/8 · 10⁸ / (2 links · 50 GB/s) + 2 · 4 µs
        ('v5e:2x4', 1.75e-3 + 8e-6),
        # 2 · 255/256 · 10⁸ / (4 · 50 GB/s) + 2 · 30 µs
        ('v5e:16x16', 0.99609375e-3 + 60e-6),
        # 2 · 1023/1024 · 10⁸ / (6 · 100 GB/s) + 2 · 29 µs
        ('v5p:8x8x16', 3.330078125e-4 + 58e-6),
    ],
)
def test_all_reduce_on_a_torus(name: str, seconds: float) -> None:
    topology = topologies.parse(name)
    assert torus_seconds(ALL_REDUCE, topology.chip, topology) == pytest.approx(seconds, rel=1e-12)
    gather = Collective('all-gather', 1, 100_000_000)
    assert torus_seconds(gather, topology.chip, topology) == pytest.approx(seconds / 2, rel=1e-12)


def test_collectives_to_one_neighbour() -> None:
    topology = topologies.parse('v5e:2x4')
    permute = Collective('collective-permute', 3, 300_000_000)
    assert torus_seconds(permute, topology.chip, topology) == pytest.approx(6e-3 + 12e-6, rel=1e-12)


def test_prediction_of_a_step() -> None:
    topology = topologies.parse('v5e:2x4')
    found = predict(topology.chip, topology, 3.94e12, 40.95e9, [ALL_REDUCE])
    assert found.compute_seconds == pytest.approx(20e-3) and found.hbm_seconds == pytest.approx(50e-3)
    assert found.step_seconds == pytest.approx(51.758e-3)
    assert found.efficiency == pytest.approx(50 / 51.758) and found.bound == 'hbm'
    assert Prediction(0.3, 0.2, 0.1).bound == 'compute'
    assert Prediction(0.1, 0.2, 0.3).bound == 'interconnect'
    assert Prediction(0.1, 0.0, 0.0, 0.2).bound == 'overhead'


def test_nvlink_and_dcn_by_the_ring() -> None:
    assert ring_all_reduce_seconds(100e6, 8, 450e9) == pytest.approx(100e6 * 2 * 7 / 8 / 450e9, rel=1e-12)


def test_a_cpu_is_fitted_by_other_batch_sizes() -> None:
    model = fit_cpu([1e9, 4e9], [0.02 + 0.1, 0.02 + 0.4])
    assert (model.overhead_seconds, model.flops_per_second) == pytest.approx((0.02, 1e10))
    found = model.predict(2e9)
    assert found.step_seconds == pytest.approx(0.22) and found.bound == 'compute'
    assert found.efficiency == pytest.approx(0.2 / 0.22)
    assert model.predict(1e8).bound == 'overhead'


def test_a_cpu_has_no_negative_overhead() -> None:
    """Larger batches that run slower an image, as out of cache: the best line through the origin."""
    model = fit_cpu([1.0, 2.0], [1.0, 3.0])
    assert model.overhead_seconds == 0
    # Least relative error, (b·1/1 - 1)² + (b·2/3 - 1)²: b = (1 + 2/3) / (1 + 4/9).
    assert 1 / model.flops_per_second == pytest.approx((1 + 2 / 3) / (1 + 4 / 9))


def test_checkpoints_at_scale() -> None:
    between = mean_seconds_between_failures(1000, 50_000)
    assert between == 180_000
    assert checkpoint_interval_seconds(10, between) == pytest.approx(1897.3666)
    # 10/1000 saving, (500 + 100)/180,000 redone and restarted.
    assert time_lost_fraction(1000, 10, between, 100) == pytest.approx(0.01 + 600 / 180_000)
    best = checkpoint_interval_seconds(10, between)
    lost = [time_lost_fraction(best * factor, 10, between, 100) for factor in (0.8, 1, 1.25)]
    assert min(lost) == lost[1]


# ---------------------------------------------------------------- compiled programs

TPU = """
HloModule jit_train_step, is_scheduled=true
%add.1 (x: f32[], y: f32[]) -> f32[] {
  ROOT %add.2 = f32[]{:T(256)} add(%x, %y), metadata={op_name="psum = all-reduce(nothing"}
}
ENTRY %main {
  %fusion.3 = f32[7,7,3,64]{3,2,1,0:T(8,128)} fusion(%all-reduce.9), kind=kLoop, calls=%fused
  %all-reduce.9 = (f32[7,7,3,64]{3,2,1,0:T(8,128)S(1)}, f32[64]{0:T(256)}, /*index=2*/bf16[10]{0}) all-reduce(%a, %b, %c), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add.1
  %get-tuple-element.1 = f32[64]{0} get-tuple-element(%all-reduce.9), index=1
  %all-gather-start.1 = (f32[16]{0}, f32[128]{0}) all-gather-start(%d), replica_groups=[1,8]<=[8]
  %all-gather-done.1 = f32[128]{0} all-gather-done(%all-gather-start.1)
  %collective-permute-start = (f32[5]{0}, f32[5]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%e)
  ROOT %reduce-scatter.1 = f32[16]{0} reduce-scatter(%f), replica_groups={{0,1,2,3},{4,5,6,7}}
}
"""  # noqa: E501, as the compiler prints it


def test_collectives_of_a_program() -> None:
    assert collectives(TPU) == [
        Collective('all-reduce', 1, 4 * (7 * 7 * 3 * 64 + 64) + 2 * 10),
        Collective('all-gather', 1, 4 * 128),
        Collective('reduce-scatter', 1, 4 * 16 * 4),
        Collective('collective-permute', 1, 4 * 5),
    ]
    started = 'ENTRY main {\n  all-reduce-start = f32[3]{0} all-reduce-start(a), to_apply=add\n}\n'
    assert collectives(started) == [Collective('all-reduce', 1, 12)]
    assert collectives('') == []


TRAFFIC = """
%fused (p: f32[1000]) -> f32[1000] {
  %p = f32[1000]{0} parameter(0)
  ROOT %inside = f32[1000]{0} negate(%p)
}
%body (state: (s32[], f32[100])) -> (s32[], f32[100]) {
  %state = (s32[]{:T(128)}, f32[100]{0:T(128)}) parameter(0)
  %value = f32[100]{0:T(128)} get-tuple-element(%state), index=1
  ROOT %next = f32[100]{0:T(128)} add(%value, %value)
}
ENTRY %main (a: f32[1000], table: f32[8,100]) -> f32[1000] {
  %a = f32[1000]{0:T(256)} parameter(0)
  %table = f32[8,100]{1,0:T(8,128)} parameter(1)
  %copy-start = (f32[1000]{0:T(256)S(1)}, f32[1000]{0:T(256)}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = f32[1000]{0:T(256)S(1)} copy-done(%copy-start)
  %slice-start = ((f32[8,100]{1,0:T(8,128)}), f32[1,100]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%table), slice={[0:1], [0:100]}
  %slice-done = f32[1,100]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  %on_chip = f32[1000]{0:T(256)S(1)} fusion(%copy-done), kind=kLoop, calls=%fused
  %loop = (s32[], f32[100]{0:T(128)}) while(%tuple), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = f32[1000]{0:T(256)} fusion(%on_chip, /*index=1*/%a), kind=kLoop, calls=%fused
}
"""  # noqa: E501, as the compiler prints it


def test_traffic_counts_main_memory_alone() -> None:
    copied = 4000  # read once; its place on the chip is no traffic
    sliced = 400  # a part of the table
    loop = 3 * (400 + 400 + 400)  # two operands and the result, three times
    out = 4000 + 4000  # one operand is on the chip
    assert hbm_bytes(TRAFFIC) == copied + sliced + loop + out


# ---------------------------------------------------------------- the largest batch


@pytest.mark.parametrize('start', [1, 16, 1000])
@pytest.mark.parametrize(
    'needed',
    [
        lambda size: 300 + 25 * size,
        lambda size: 300 + 25 * size if size < 20 else 900,  # rematerialised: no longer grows
        lambda size: 10 + size * size,
        lambda size: 2000,  # never fits
        lambda size: 3,  # always fits
    ],
)
def test_search_for_the_largest_batch(needed: Callable[[int], int], start: int) -> None:
    limit, most = 1000, 64
    measured: list[int] = []

    def measure(size: int) -> tuple[bool, int]:
        assert 1 <= size <= most and size not in measured
        measured.append(size)
        return needed(size) <= limit, needed(size)

    found = largest_that_fits(measure, start, most, limit)
    best = max((size for size in range(1, most + 1) if needed(size) <= limit), default=0)
    assert found <= best <= found + max(1, found // 32)
    assert len(measured) <= 11


def test_none_of_this_waits_for_jax() -> None:
    program = (
        'import sys; import parallel_train.roofline, parallel_train.topologies, parallel_train.compile,'
        'parallel_train.fit, parallel_train.show_compile;'
        'sys.exit(", ".join(m for m in ("jax", "flax", "tensorflow") if m in sys.modules) or None)'
    )
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
