"""A run stopped in some processes and gone on with in others, with `pmean`: the same but for rounding."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.conftest import Job, checkpoint_steps, make_tiny_job, read_rows, run_ok
from tests.test_processes import Start, saved, start  # noqa: F401, a fixture
from tests.test_resume import assert_nearly_same_end

# ruff: noqa: F811, a fixture again

# To each example's loss a number is added that tells which example it is, whatever the model makes of it:
# the sum of its pixels, which a flip leaves as it is, modulo a prime. So a row's loss tells which examples
# stood in its steps.
TELLING = """
import jax.numpy as jnp

from parallel_train.losses import softmax_cross_entropy


def loss(logits, batch):
    losses, weights = softmax_cross_entropy(logits, batch)
    pixels = jnp.round(batch['image'] * 255).sum(axis=(1, 2, 3))
    return losses + pixels % 997, weights
"""


@pytest.fixture(scope='module')
def telling_job(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, models_dir: Path) -> Job:
    """The tiny model (BatchNorm, dropout), 4 shards, a loss that tells which examples it is of."""
    folder = tmp_path_factory.mktemp('recipe')
    (folder / 'telling.py').write_text(TELLING)
    more = "config.random_flip = True\nconfig.shards = 4\nconfig.loss = 'telling:loss'"
    job = make_tiny_job(folder, data_dir, models_dir, more)
    path = os.pathsep.join([job.env['PYTHONPATH'], str(folder)])
    return Job(job.recipe, data_dir, {**job.env, 'PYTHONPATH': path})


@pytest.fixture(scope='module')
def undisturbed(telling_job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
    run_ok(*telling_job.train(workdir), env=telling_job.env)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(('before', 'after'), [((2, 4), (1, 2)), ((1, 2), (2, 4))])
def test_pmean_goes_on_in_other_processes_with_the_same_examples_and_rates(
    before: tuple[int, int],
    after: tuple[int, int],
    telling_job: Job,
    undisturbed: Path,
    start: Start,
    tmp_path: Path,
) -> None:
    """Each as (processes, devices of all of them)."""
    workdir = tmp_path / 'run'
    job = start(telling_job, workdir, *before)
    job.wait_until(saved(workdir, 12))
    job.all[-1].send_signal(signal.SIGTERM)
    results = job.results()
    assert [result.code for result in results] == [75] * before[0], results
    step = max(checkpoint_steps(workdir))
    results = start(telling_job, workdir, *after).results()
    assert [result.code for result in results] == [0] * after[0], results
    assert f'resuming from step {step} of' in results[0].stdout
    assert_nearly_same_end(workdir, undisturbed)
    # Of 192 examples of a row, one that is another moves the mean by 1/192 at least, nearly always by 1.
    for row, other in zip(read_rows(workdir), read_rows(undisturbed), strict=True):
        assert row['loss'] == pytest.approx(other['loss'], abs=0.005, rel=0), (row, other)


def test_a_loss_tells_which_examples_it_is_of(undisturbed: Path) -> None:
    """(The comparison above can fail: the rows of other steps, and so of other examples, are far apart.)"""
    losses = sorted(row['loss'] for row in read_rows(undisturbed) if row['split'] == 'train')
    assert min(b - a for a, b in zip(losses, losses[1:], strict=False)) > 0.01 and losses[0] > 100
