"""What do the turns of a scaling experiment say? Medians, quartiles and ratios of each size and mode."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from parallel_train.roofline import fit_cpu
from parallel_train.scale_sizes import Experiment, Size

Turn = Mapping[str, Any]  # what `Bench.turn` gives, with 'size', 'session' and 'round'
Measurement = dict[str, Any]


def measurements(
    experiment: Experiment, turns: Sequence[Turn], facts: Mapping[str, Mapping[str, Any]]
) -> list[Measurement]:
    """Returns the rows of scale.json for the sizes that have all their rounds; see docs/scaling.md.

    Args:
      experiment: what was asked for.
      turns: all that there are.
      facts: of each size, by its key: what `Bench.facts` gives.
    """
    rows = []
    for mode, sizes in experiment.modes.items():
        done = [s for s in sizes if len(turns_of(s, turns)) >= experiment.rounds]
        if sizes[0] in done:  # what the others are compared with
            rows += [_measurement(mode, size, sizes[0], turns, facts) for size in done]
    return rows


def turns_of(size: Size, turns: Sequence[Turn]) -> list[Turn]:
    return [turn for turn in turns if turn['size'] == size.key]


def _measurement(
    mode: str, size: Size, first: Size, turns: Sequence[Turn], facts: Mapping[str, Mapping[str, Any]]
) -> Measurement:
    mine, its_facts = turns_of(size, turns), facts[size.key]
    batch = size.batch_size
    pairs = _pairs(mine, turns_of(first, turns))
    ratios = [(batch / a['fed']) / (first.batch_size / b['fed']) for a, b in pairs]
    values: dict[str, list[float]] = {
        'examples_per_second': [batch / turn['fed'] for turn in mine],
        'step_seconds': [turn['fed'] for turn in mine],
        'resident_examples_per_second': [batch / turn['resident'] for turn in mine],
        'resident_step_seconds': [turn['resident'] for turn in mine],
        'input_fraction': [1 - turn['resident'] / turn['fed'] for turn in mine],
        'data_wait_fraction': [turn['data_wait'] for turn in mine],
        'communication_fraction': [
            1 - turn['alone'] / turn['resident'] if 'alone' in turn else 0.0 for turn in mine
        ],
        'speedup': ratios,
        'efficiency': [ratio * first.num_devices / size.num_devices for ratio in ratios],
    }
    row: Measurement = {
        'mode': mode,
        'num_devices': size.num_devices,
        'num_processes': size.num_processes,
        'batch_size': batch,
        **{name: its_facts[name] for name in ('per_device_batch_size', 'accumulation_steps', 'shards')},
        'compared_with': {'num_devices': first.num_devices, 'num_processes': first.num_processes},
        'rounds': len(mine),
        **{name: statistics.median(each) for name, each in values.items()},
        'spread': _spread(values['examples_per_second']),
        'quartiles': {name: quartiles(each) for name, each in values.items()},
        'idle_cpu_fraction': statistics.median(turn['idle_cpu'] for turn in mine),
        **_prediction(size, first, turns, facts, statistics.median(values['resident_step_seconds'])),
        'losses': its_facts['losses'],
    }
    if mode == 'strong':
        row |= _loss_difference(its_facts['losses'], facts[first.key]['losses'])
    return row


def _pairs(mine: Sequence[Turn], firsts: Sequence[Turn]) -> list[tuple[Turn, Turn]]:
    """Returns turns with those of the smallest size in the same round, as a machine's speed drifts."""
    by_round = {(turn['session'], turn['round']): turn for turn in firsts}
    pairs = [(t, by_round[t['session'], t['round']]) for t in mine if (t['session'], t['round']) in by_round]
    assert pairs, 'the smallest size takes turns with every other'
    return pairs


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method='inclusive')
    return low, high


def _spread(values: Sequence[float]) -> float:
    """The distance between the quartiles, as a share of the median."""
    low, high = quartiles(values)
    return (high - low) / statistics.median(values)


def _prediction(
    size: Size,
    first: Size,
    turns: Sequence[Turn],
    facts: Mapping[str, Mapping[str, Any]],
    measured_seconds: float,
) -> Measurement:
    seconds = _predicted_seconds(size, turns, facts)
    of_first = _predicted_seconds(first, turns, facts)
    fields = {
        'predicted_step_seconds': seconds,
        'predicted_examples_per_second': None,
        'predicted_efficiency': None,
        'speed_of_prediction': None,  # measured images/s, on a resident batch, ÷ predicted
        'not_predicted': facts[size.key]['not_predicted'],
    }
    if seconds is not None:
        fields['predicted_examples_per_second'] = size.batch_size / seconds
        fields['speed_of_prediction'] = seconds / measured_seconds
    if seconds is not None and of_first is not None:
        rate, of_base = size.batch_size / seconds, first.batch_size / of_first
        fields['predicted_efficiency'] = rate / size.num_devices / (of_base / first.num_devices)
    return fields


def _predicted_seconds(
    size: Size, turns: Sequence[Turn], facts: Mapping[str, Mapping[str, Any]]
) -> float | None:
    """Returns what a resident step should take: by the roofline; on a CPU by two other batch sizes.

    On a CPU: seconds = a + examples × b through the two (roofline.fit_cpu), measured in the same turns.
    """
    mine = turns_of(size, turns)
    others = {name: int(name.split()[1]) for name in mine[0] if name.startswith('batch ')}
    if not others:
        return facts[size.key]['predicted_step_seconds']
    seconds = [statistics.median(turn[name] for turn in mine) for name in others]
    return fit_cpu(list(others.values()), seconds).predict(size.batch_size).step_seconds


def _loss_difference(losses: Sequence[float], of_first: Sequence[float]) -> Measurement:
    """Returns by how much losses differ at most from those of the smallest size, and at which step."""
    differences = [abs(a - b) for a, b in zip(losses, of_first, strict=True)]
    largest = max(differences)
    return {'loss_difference': largest, 'loss_difference_step': differences.index(largest) + 1}
