"""Two hosts, one link: what does a job do while the link is cut, and once it is mended?

    python -m pytest -s tests/soak/test_network.py

The hosts are network namespaces with host names of their own, joined by a veth pair. That takes root.
Like the soak of processes it prints what the faults cost, against the same job on the same hosts without one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import NUM_STEPS, Job, checkpoint_steps, cli
from tests.soak.test_many_faults import losses
from tests.test_processes import (  # noqa: F401, fixtures
    HEARTBEAT,
    Processes,
    alone,
    assert_same_bits,
    saved,
    tree_job,
)

# ruff: noqa: F811, fixtures again
PORT = 23456
MOMENT = 2  # seconds; TCP sends again after 3, well before HEARTBEAT
ETC = Path('/etc/netns')


class Host:
    """A network namespace, whose name is its host name, with an address on the link."""

    def __init__(self, name: str, address: str, card: str):
        self.name, self.address, self.card = name, address, card

    def command(self, line: list[str]) -> list[str]:
        """Returns `line` as it runs on this host: it becomes the process that is started."""
        named = ['unshare', '--uts', 'sh', '-c', 'hostname "$0" && exec "$@"', self.name, *line]
        return ['ip', 'netns', 'exec', self.name, *named]

    def resolve(self, addresses: dict[str, str]) -> None:
        """Makes host names mean these addresses on this host."""
        lines = [f'{address} {name}\n' for name, address in addresses.items()]
        (ETC / self.name).mkdir(parents=True, exist_ok=True)
        (ETC / self.name / 'hosts').write_text(''.join(['127.0.0.1 localhost\n', *lines]))


def ip(*arguments: str) -> None:
    subprocess.run(['ip', *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts that know each other's names."""
    missing = [program for program in ('ip', 'unshare', 'hostname') if not shutil.which(program)]
    if missing:
        pytest.skip(f'not installed: {", ".join(missing)} (Debian: iproute2, util-linux, hostname)')
    number = os.getpid()
    hosts = [Host(f'pt{number}-{i}', f'10.111.7.{i + 1}', f'pt{number}v{i}') for i in range(2)]
    there = ETC.exists()
    try:
        try:
            for host in hosts:
                ip('netns', 'add', host.name)
            ip('link', 'add', hosts[0].card, 'type', 'veth', 'peer', 'name', hosts[1].card)
            for host in hosts:
                ip('link', 'set', host.card, 'netns', host.name)
                ip('-n', host.name, 'addr', 'add', f'{host.address}/24', 'dev', host.card)
                for card in ('lo', host.card):
                    ip('-n', host.name, 'link', 'set', card, 'up')
                host.resolve({other.name: other.address for other in hosts})
            subprocess.run(hosts[0].command(['true']), check=True, capture_output=True, text=True)
        except (subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f'network namespaces are not permitted here: {getattr(error, "stderr", error)}')
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(['ip', 'netns', 'delete', host.name], capture_output=True, check=False)
            shutil.rmtree(ETC / host.name, ignore_errors=True)
        if not there and ETC.exists():
            ETC.rmdir()


def start(job: Job, hosts: list[Host], workdir: Path, folder: Path, *more: str) -> Processes:
    """Starts a process with one device on each host."""
    common = [
        *job.train(workdir, devices=len(hosts)),
        f'--coordinator={hosts[0].address}:{PORT}',
        f'--num_processes={len(hosts)}',
        f'--heartbeat_timeout={HEARTBEAT}',
        *more,
    ]
    lines = [host.command(cli(*common, f'--process_id={i}')) for i, host in enumerate(hosts)]
    return Processes(folder, lines, job.env)


_without: list[float] = []


def seconds_without_faults(job: Job, reference: Path, hosts: list[Host], folder: Path) -> float:
    """Returns how long the job takes over the link, which nobody cuts; measured once for all tests."""
    if not _without:
        began = time.monotonic()
        processes = start(job, hosts, folder / 'without', folder / 'undisturbed')
        try:
            results = processes.results()
        finally:
            processes.close()
        _without.append(time.monotonic() - began)
        assert [result.code for result in results] == [0, 0], results
        assert_same_bits(folder / 'without', reference)
    return _without[0]


@pytest.mark.slow
def test_the_link_is_cut_and_mended(tree_job: Job, alone: Path, hosts: list[Host], tmp_path: Path) -> None:
    workdir = tmp_path / 'run'
    undisturbed = seconds_without_faults(tree_job, alone, hosts, tmp_path)
    began = time.monotonic()
    processes = start(tree_job, hosts, workdir, tmp_path / 'cut')
    try:
        processes.wait_until(saved(workdir, 12))
        ip('-n', hosts[0].name, 'link', 'set', hosts[0].card, 'down')
        cut = time.monotonic()
        ends = []
        for process in processes.all:
            process.wait(HEARTBEAT + 60)
            ends.append(time.monotonic() - cut)
        results = processes.results()
    finally:
        processes.close()
    first, second = results
    # Each names the other.
    assert first.code == 1 and f'process 1 ({hosts[1].name}) is gone or hangs' in first.stderr, results
    assert second.code == 1 and 'process 0, the coordinator, is gone or hangs' in second.stderr, results
    assert 'last completed step' in first.stderr and 'last completed step' in second.stderr
    assert max(ends) < HEARTBEAT + 20, ends
    kept = max(checkpoint_steps(workdir))
    assert kept >= 12

    ip('-n', hosts[0].name, 'link', 'set', hosts[0].card, 'up')
    mended = time.monotonic()
    processes = start(tree_job, hosts, workdir, tmp_path / 'mended')
    try:
        results = processes.results()
    finally:
        processes.close()
    last = time.monotonic() - mended
    assert [result.code for result in results] == [0, 0], results
    assert f'resuming from step {kept} of {NUM_STEPS}' in results[0].stdout
    assert_same_bits(workdir, alone)
    print(
        f'\n1 fault, survived: link cut {cut - began:.1f} s after the start, at step {kept} or later: the '
        f'processes ended after {ends[0]:.1f} and {ends[1]:.1f} s (heartbeat_timeout {HEARTBEAT} s), each '
        f'naming the other; mended and started again, the job resumed from step {kept} and ended '
        f'{last:.1f} s later, the final checkpoint and metrics.jsonl as without the fault\n'
        f'{losses(undisturbed, cut - began + max(ends) + last, 1)}'
    )


@pytest.mark.slow
def test_a_link_that_is_cut_for_a_moment_ends_nothing(
    tree_job: Job, alone: Path, hosts: list[Host], tmp_path: Path
) -> None:
    workdir = tmp_path / 'run'
    undisturbed = seconds_without_faults(tree_job, alone, hosts, tmp_path)
    began = time.monotonic()
    processes = start(tree_job, hosts, workdir, tmp_path / 'job')
    try:
        processes.wait_until(saved(workdir, 12))
        ip('-n', hosts[0].name, 'link', 'set', hosts[0].card, 'down')
        before = checkpoint_steps(workdir)
        time.sleep(MOMENT)
        assert len(set(checkpoint_steps(workdir)) - set(before)) <= 1  # at most the one under way
        ip('-n', hosts[0].name, 'link', 'set', hosts[0].card, 'up')
        mended = time.monotonic()
        processes.wait_until(lambda: checkpoint_steps(workdir) != before)
        print(f'\nlink cut for {MOMENT} s: the next checkpoint {time.monotonic() - mended:.1f} s after')
        results = processes.results()
    finally:
        processes.close()
    print(losses(undisturbed, time.monotonic() - began, 1))
    assert [result.code for result in results] == [0, 0], results
    assert 'resuming' not in results[0].stdout
    assert_same_bits(workdir, alone)


@pytest.mark.slow
def test_a_host_name_that_means_the_host_itself_is_refused(
    tree_job: Job, hosts: list[Host], tmp_path: Path
) -> None:
    """As Debian's installer writes /etc/hosts: gloo would tell the other host to connect to itself."""
    hosts[1].resolve({hosts[1].name: '127.0.1.1', hosts[0].name: hosts[0].address})
    processes = start(tree_job, hosts, tmp_path / 'run', tmp_path / 'job')
    try:
        results = processes.results()
    finally:
        processes.close()
    name = hosts[1].name
    for result in results:
        assert result.code == 2, results
        assert f'error: process 1: its host name {name!r} means 127.0.1.1 there' in result.stderr, results
        assert f'in /etc/hosts of {name}, give {name} the address of its network interface' in result.stderr
    assert not (tmp_path / 'run').exists()
