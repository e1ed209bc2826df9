"""The self-test: green on a machine that is fit, red with a remedy where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parallel_train import checks, processes
from parallel_train.doctor import CHECKS, examine, report
from tests.conftest import Job, run_cli, run_ok


def test_a_machine_that_is_fit(job: Job, tmp_path: Path) -> None:
    arguments = job.line('doctor', f'--workdir={tmp_path / "run"}', '--devices=4')
    findings = json.loads(run_ok(*arguments, '--json').stdout)
    assert list(findings) == list(CHECKS)
    assert all(found['ok'] for found in findings.values()), findings
    assert findings['devices']['text'].startswith('4 × cpu')
    assert 'right' in findings['all-reduce']['text'] and 'over 4 devices' in findings['all-reduce']['text']
    assert not (tmp_path / 'run').exists()


def test_what_is_wrong_is_said_with_what_to_do(job: Job, tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    flags = [
        f'--config={job.recipe}',
        f'--workdir={tmp_path / "file"}',
        f'--data_dir={tmp_path}',
        '--devices=2',
    ]
    result = run_cli('doctor', *flags)
    assert result.code == 1 and result.stderr == '', result
    failed = [line.split()[1] for line in result.stdout.splitlines() if line.startswith('FAIL')]
    assert failed == ['dataset', 'workdir']
    assert 'is not a folder' in result.stdout


@pytest.mark.slow
def test_wrong_sums_and_gradients_are_seen(monkeypatch: pytest.MonkeyPatch, job: Job, tmp_path: Path) -> None:
    """A reduction that forgets one device is what both checks are for."""
    from parallel_train import config, reduce
    from parallel_train.mesh import start_devices

    start_devices(8)
    import jax
    import jax.numpy as jnp

    def forgetful(tree: object) -> object:
        there = reduce.device_index() != 1
        return jax.lax.psum(jax.tree.map(lambda x: jnp.where(there, x, 0), tree), reduce.DATA_AXIS)

    patient = checks.Patient(config.complete(config.load(job.recipe)), job.data_dir, None, None)
    assert checks.all_reduce(patient).ok and checks.gradients(patient).ok
    monkeypatch.setattr(reduce, 'sum_over_devices', forgetful)
    assert not checks.all_reduce(patient).ok and not checks.gradients(patient).ok
    assert processes.is_first()
    text = report(examine(patient), as_json=False, colours=False)
    assert 'FAIL  all-reduce' in text and 'FAIL  gradients' in text and '→ ' in text
