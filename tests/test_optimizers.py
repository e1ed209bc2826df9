"""How a gradient becomes an update: by each formula in float64, on any devices, through a resume."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from parallel_train import config as config_lib
from parallel_train import config_fields, losses
from parallel_train.batches import ResidentFeed
from parallel_train.checkpoint import open_checkpoints
from parallel_train.errors import UserError
from parallel_train.evaluate import Evaluator
from parallel_train.forward import check_model_and_loss
from parallel_train.mesh import make_mesh, replicated, start_devices
from parallel_train.optimizers import create_optimizer, kernels
from parallel_train.plan import make_plan
from parallel_train.replicas import digest
from parallel_train.schedule import create_learning_rate_fn
from parallel_train.state import abstract_state, initialise, saved_parts
from parallel_train.step import make_train_step
from tests.test_step import distance, make_config, make_split

start_devices(8)

RATE, DECAY, STEPS = 0.1, 0.01, 4
Arrays = dict[str, np.ndarray]


# ---------------------------------------------------------------- the formulas, in float64

SHAPES = {
    'Conv_0/kernel': (3, 3, 2, 4),
    'Dense_0/kernel': (6, 5),
    'Dense_0/bias': (5,),
    'LayerNorm_0/scale': (5,),
    'attention/query/kernel': (6, 2, 3),
    'attention/query/bias': (2, 3),
    'attention/out/kernel': (2, 3, 6),
    'Embed_0/embedding': (7, 4),
}
DECAYED = {name for name in SHAPES if name.endswith(('kernel', 'embedding'))}
# The input axes of each matrix; the table of embeddings is none, by convention.
MATRICES = {'Conv_0/kernel': 3, 'Dense_0/kernel': 1, 'attention/query/kernel': 1, 'attention/out/kernel': 2}


def random_arrays(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def as_tree(arrays: Arrays) -> Any:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, leaf = name.split('/')
        functools.reduce(lambda at, folder: at.setdefault(folder, {}), folders, tree)[leaf] = array
    return tree


def as_arrays(tree: Any) -> Arrays:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator='/'): np.asarray(v) for k, v in leaves}


def trained_by_optax(**fields: Any) -> Arrays:
    """What the optimizer of the config makes of the parameters in a few steps of given gradients."""
    config = config_lib.complete(config_lib.Config({'weight_decay': DECAY, **fields}))
    tx = create_optimizer(config, lambda step: RATE / (step + 1))
    params = as_tree(random_arrays(0))
    state = tx.init(params)

    @jax.jit
    def update(params: Any, state: Any, gradient: Any) -> Any:
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(STEPS):
        params, state = update(params, state, as_tree(random_arrays(step + 1)))
    return as_arrays(params)


def trained_by_hand(rule: Callable[..., np.ndarray], decayed: set[str] = DECAYED) -> Arrays:
    """The same by `rule(name, t, w, g, decay, memory) -> the update, to be subtracted`."""
    params = {name: array.astype(np.float64) for name, array in random_arrays(0).items()}
    memory: dict[str, dict[str, Any]] = {name: {'m': 0.0, 'v': 0.0} for name in params}
    for step in range(STEPS):
        for name, g in random_arrays(step + 1).items():
            decay = DECAY if name in decayed else 0.0
            args = (params[name], g.astype(np.float64), decay, memory[name])
            params[name] = params[name] - rule(name, step + 1, RATE / (step + 1), *args)
    return params


def adam_direction(
    t: int, g: np.ndarray, memory: dict[str, Any], b1: float, b2: float, e: float
) -> np.ndarray:
    """Kingma & Ba 2015, algorithm 1."""
    memory['m'] = b1 * memory['m'] + (1 - b1) * g
    memory['v'] = b2 * memory['v'] + (1 - b2) * g**2
    return memory['m'] / (1 - b1**t) / (np.sqrt(memory['v'] / (1 - b2**t)) + e)


def adamw(name: str, t: int, rate: float, w: Any, g: Any, decay: float, memory: Any) -> np.ndarray:
    return rate * (adam_direction(t, g, memory, 0.9, 0.999, 1e-8) + decay * w)


def sgd(name: str, t: int, rate: float, w: Any, g: Any, decay: float, memory: Any) -> np.ndarray:
    memory['m'] = 0.9 * memory['m'] + g + decay * w
    return rate * memory['m']


def lars(name: str, t: int, rate: float, w: Any, g: Any, decay: float, memory: Any) -> np.ndarray:
    u = g + decay * w
    trust = 0.02 * np.linalg.norm(w) / np.linalg.norm(u) if name in DECAYED else 1.0
    memory['m'] = 0.9 * memory['m'] + rate * trust * u
    return memory['m']


def lamb(name: str, t: int, rate: float, w: Any, g: Any, decay: float, memory: Any) -> np.ndarray:
    u = adam_direction(t, g, memory, 0.9, 0.999, 1e-6) + decay * w
    return rate * u * (np.linalg.norm(w) / np.linalg.norm(u) if name in DECAYED else 1.0)


def lion(name: str, t: int, rate: float, w: Any, g: Any, decay: float, memory: Any) -> np.ndarray:
    u = np.sign(0.9 * memory['m'] + 0.1 * g)
    memory['m'] = 0.99 * memory['m'] + 0.01 * g
    return rate * (u + decay * w)


def muon(name: str, t: int, rate: float, w: Any, g: Any, decay: float, memory: Any) -> np.ndarray:
    """Jordan et al. 2024: the Newton-Schulz iteration on Nesterov's momentum, here with bias correction."""
    if name not in MATRICES:
        return rate * (adam_direction(t, g, memory, 0.9, 0.999, 1e-8) + decay * w)
    b = 0.95
    memory['m'] = b * memory['m'] + (1 - b) * g
    u = b * memory['m'] / (1 - b ** (t + 1)) + (1 - b) * g / (1 - b**t)
    x = u.reshape(int(np.prod(g.shape[: MATRICES[name]])), -1)
    long, turned = max(x.shape), x.shape[0] > x.shape[1]
    x = x.T if turned else x
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    x = (x.T if turned else x).reshape(g.shape)
    return rate * (0.2 * np.sqrt(long) * x + decay * w)


FORMULAS: dict[str, tuple[Callable[..., np.ndarray], dict[str, Any]]] = {
    'sgd': (sgd, {}),
    'adamw': (adamw, {}),
    'lars': (lars, {'trust_coefficient': 0.02}),
    'lamb': (lamb, {}),
    'lion': (lion, {}),
    'muon': (muon, {'momentum': 0.95}),
}


def assert_close(got: Arrays, want: Arrays, but: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=but, err_msg=name)


@pytest.mark.parametrize('optimizer', config_fields.OPTIMIZERS)
def test_updates_are_those_of_the_formula(optimizer: str) -> None:
    """Norms, biases (also those of two dimensions) are not decayed; with `decay_norm_and_bias` they are."""
    rule, fields = FORMULAS[optimizer]
    got = trained_by_optax(optimizer=optimizer, **fields)
    assert_close(got, trained_by_hand(rule))
    everything = trained_by_hand(rule, set(SHAPES))
    assert_close(trained_by_optax(optimizer=optimizer, decay_norm_and_bias=True, **fields), everything)
    for name in set(SHAPES) - DECAYED:  # the comparison can fail
        assert np.abs(everything[name] - got[name]).max() > 1e-4, name


def test_nesterovs_momentum_is_one_step_ahead() -> None:
    """Sutskever et al. 2013, as PyTorch writes it: m = 0.9 m + g, and the update is 0.9 m + g."""

    def rule(name: str, t: int, rate: float, w: Any, g: Any, decay: float, memory: Any) -> np.ndarray:
        u = g + decay * w
        memory['m'] = 0.9 * memory['m'] + u
        return rate * (0.9 * memory['m'] + u)

    got = trained_by_optax(optimizer='sgd', nesterov=True)
    assert_close(got, trained_by_hand(rule))
    for name, plain in trained_by_optax(optimizer='sgd').items():  # the comparison can fail
        assert np.abs(got[name] - plain).max() > 1e-3, name


def test_what_is_a_kernel() -> None:
    assert {name for name, is_one in as_arrays(kernels(as_tree(random_arrays(0)))).items() if is_one} == (
        DECAYED
    )


def test_betas_and_epsilon_are_the_configs() -> None:
    def rule(name: str, t: int, rate: float, w: Any, g: Any, decay: float, memory: Any) -> np.ndarray:
        return rate * (adam_direction(t, g, memory, 0.8, 0.95, 0.01) + decay * w)

    got = trained_by_optax(optimizer='adamw', momentum=0.8, beta2=0.95, epsilon=0.01)
    assert_close(got, trained_by_hand(rule))
    assert np.abs(got['Dense_0/kernel'] - trained_by_optax(optimizer='adamw')['Dense_0/kernel']).max() > 1e-3


def test_clipping_comes_before_the_rule() -> None:
    def rule(name: str, t: int, rate: float, w: Any, g: Any, decay: float, memory: Any) -> np.ndarray:
        norm = np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in random_arrays(t).values()))
        return rate * (g * min(1, 0.5 / norm) + decay * w)

    got = trained_by_optax(optimizer='sgd', momentum=0.0, gradient_clip_norm=0.5)
    assert_close(got, trained_by_hand(rule))


# ---------------------------------------------------------------- in the step


def run(config: Any, devices: int, start: Any, steps: range) -> Any:
    """Trains from `start` (None: from the beginning) and returns the state, on its devices."""
    mesh = make_mesh(devices)
    plan = make_plan(config, 96, 96, devices)
    rate = create_learning_rate_fn(config, 0.01, plan.steps_per_epoch)
    state = initialise(config, rate, mesh) if start is None else start(rate, mesh)
    step, feed = make_train_step(config, plan, mesh), ResidentFeed(make_split(), config, plan, mesh)
    for i in steps:
        state = step(state, feed.at(i))
    feed.close()
    return state


def options(optimizer: str, **fields: Any) -> Any:
    # Adam divides a gradient by its own size: one that is rounding alone (a bias before BatchNorm) stays
    # rounding only where epsilon is larger.
    given = {'weight_decay': 1e-3, 'gradient_clip_norm': 1.0, 'ema_decay': 0.9, 'label_smoothing': 0.1}
    given['epsilon'] = 1e-3
    return normed(optimizer=optimizer, warmup_epochs=0.5, **given, **fields)


def normed(**fields: Any) -> Any:
    return make_config('tests.models_for_tests:DenseNormNet', **fields)


BITS = [name for name in config_fields.OPTIMIZERS if name != 'muon']  # what `tree` serves


@functools.cache
def ten_steps(optimizer: str) -> Any:
    """On one device, with `tree` where it can be had."""
    return run(options(optimizer, reduction='tree' if optimizer in BITS else 'pmean'), 1, None, range(10))


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', config_fields.OPTIMIZERS)
def test_bits_on_1_2_8_devices_and_through_a_checkpoint(optimizer: str, tmp_path: Path) -> None:
    """Ten steps on one device; five on eight, a checkpoint, five on two: every array is the same.

    Muon, which `tree` does not serve, takes them all on one.
    """
    reduction, first, second = ('tree', 8, 2) if optimizer in BITS else ('pmean', 1, 1)
    config = options(optimizer, reduction=reduction)
    whole = digest(ten_steps(optimizer))
    half = run(config, first, None, range(5))
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, half, digest(half))

    def restored(rate: Any, mesh: Any) -> Any:
        with open_checkpoints(tmp_path, read_only=True) as checkpoints:
            return checkpoints.restore(abstract_state(config, rate), replicated(mesh))

    found = digest(run(config, second, restored, range(5, 10)))
    assert [name for name in whole if whole[name] != found[name]] == []
    assert whole.keys() == found.keys() and any('ema' in name for name in whole)
    assert digest(half) != whole  # the comparison can fail


# Muon makes all singular values of a gradient alike, also those that are rounding.
@pytest.mark.slow
@pytest.mark.parametrize('optimizer', [name for name in config_fields.OPTIMIZERS if name != 'muon'])
def test_any_devices_train_alike_with_pmean(optimizer: str) -> None:
    config = options(optimizer)
    start = jax.device_get(initialise(config, 0.01, make_mesh(1)))
    one, four = jax.device_get(ten_steps(optimizer)), jax.device_get(run(config, 4, None, range(10)))
    # Lion takes signs: where a direction is 0 but for rounding, it may turn.
    bound = 3e-2 if optimizer == 'lion' else 1e-3
    assert distance(four.params, one.params, start.params) < bound
    assert distance(four.ema, one.ema, start.ema) < bound
    assert four.sums['loss'] == pytest.approx(one.sums['loss'], rel=bound)


@pytest.mark.parametrize('optimizer', config_fields.OPTIMIZERS)
def test_no_two_arrays_of_a_new_state_share_a_buffer(optimizer: str) -> None:
    """A buffer that is donated twice crashes the process."""
    state = initialise(options(optimizer), 0.1, make_mesh(2))
    leaves = jax.tree.leaves(saved_parts(state))
    buffers = [shard.data.unsafe_buffer_pointer() for leaf in leaves for shard in leaf.addressable_shards]
    assert len(set(buffers)) == len(buffers) == 2 * len(leaves)


def test_muon_with_tree_is_refused() -> None:
    with pytest.raises(UserError, match="config.optimizer='muon': .*use pmean"):
        make_plan(options('muon', reduction='tree'), 96, 96, 1)


# ---------------------------------------------------------------- moving averages


def test_moving_average_by_hand() -> None:
    """After update n + 1 it is d·average + (1 - d)·parameters, d = min(ema_decay, (1 + n) / (10 + n))."""
    decay = 0.2  # (1 + n) / (10 + n) is 0.1, 0.18, 0.25, ...
    config, mesh = normed(ema_decay=decay), make_mesh(2)
    plan = make_plan(config, 96, 96, 2)
    state, step = initialise(config, 0.1, mesh), make_train_step(config, plan, mesh)
    feed, states = ResidentFeed(make_split(), config, plan, mesh), [jax.device_get(state)]
    for i in range(4):
        state = step(state, feed.at(i))
        states.append(jax.device_get(state))
    feed.close()
    average = [{'params': s.params, 'batch_stats': s.batch_stats} for s in states][0]
    for n, state in enumerate(states[1:]):
        d = [0.1, 2 / 11, decay, decay][n]
        latest = {'params': state.params, 'batch_stats': state.batch_stats}
        average = jax.tree.map(lambda a, x, d=d: d * np.float64(a) + (1 - d) * np.float64(x), average, latest)
        for got, want in zip(jax.tree.leaves(state.ema), jax.tree.leaves(average), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert distance(states[4].ema['params'], states[4].params, states[0].params) > 1e-2


def test_averages_change_nothing_but_what_is_evaluated() -> None:
    plain, averaged = (run(normed(ema_decay=d), 2, None, range(6)) for d in (0.0, 0.9))
    assert plain.ema is None and 'ema' not in saved_parts(plain)
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(averaged.params), strict=True):
        np.testing.assert_array_equal(a, b)
    config, mesh, split = normed(), make_mesh(2), make_split()
    evaluator = Evaluator(split, config, mesh, plain)
    by_hand = plain.replace(params=averaged.ema['params'], batch_stats=averaged.ema['batch_stats'])
    assert evaluator(averaged) == evaluator(by_hand) != evaluator(plain)


# ---------------------------------------------------------------- label smoothing


def test_smoothed_labels_by_hand() -> None:
    """Probabilities 1/2, 1/4, 1/4, label 0, ε = 0.3: against 0.8, 0.1, 0.1."""
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    batch = {'label': jnp.array([0])}
    smoothed, weights = losses.softmax_cross_entropy(logits, batch, label_smoothing=0.3)
    assert float(smoothed[0]) == pytest.approx(0.8 * np.log(2) + 0.2 * np.log(4), rel=1e-6)
    plain, _ = losses.softmax_cross_entropy(logits, batch)
    assert float(plain[0]) == pytest.approx(np.log(2), rel=1e-6) and weights.tolist() == [1]


def test_labels_are_smoothed_in_training_and_not_in_evaluation() -> None:
    smooth, plain = (make_config('linear', label_smoothing=e) for e in (0.4, 0.0))
    mesh, split = make_mesh(2), make_split()
    states = [jax.device_get(run(config, 2, None, range(1))) for config in (smooth, plain)]
    assert states[0].sums['loss'] != states[1].sums['loss']
    assert states[0].sums['accuracy'] == states[1].sums['accuracy']
    state = initialise(plain, 0.1, mesh)
    assert Evaluator(split, smooth, mesh, state)(state) == Evaluator(split, plain, mesh, state)(state)


def test_a_loss_that_cannot_smooth_is_refused() -> None:
    config = make_config('linear', loss='tests.models_for_tests:weighted_loss', label_smoothing=0.1)
    with pytest.raises(UserError, match='config.label_smoothing=0.1: .*weighted_loss.*takes no argument'):
        check_model_and_loss(config)


@pytest.mark.parametrize('field', ['label_smoothing', 'ema_decay', 'beta2'])
@pytest.mark.parametrize('value', [-0.1, 1.0, float('nan')])
def test_out_of_range(field: str, value: float) -> None:
    with pytest.raises(UserError, match=rf'config.{field}={value}: must be .* less than 1'):
        config_lib.complete(config_lib.Config({field: value}))
