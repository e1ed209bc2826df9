"""Which processes make up this job, and do they agree?

A job of several processes is JAX's: one coordinator, run by process 0, and a key-value store there.
The store carries what is said before and beside the collectives; nothing here waits for ever.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from parallel_train.cluster import Cluster
from parallel_train.errors import FAULT, Late, UserError

START_TIMEOUT = 300.0  # seconds
_patience = START_TIMEOUT  # seconds for what the others say, once all have come
Checked = TypeVar('Checked')


def start(cluster: Cluster, heartbeat_timeout: float, timeout: float, say: Callable[[str], None]) -> None:
    """Joins the job; JAX's backend must not run yet.

    Raises:
      UserError: what tells of the other processes is incomplete.
      Late: the coordinator cannot be reached or cannot listen, or not all processes came in time.
    """
    global _patience
    _patience = max(START_TIMEOUT, timeout)
    # XLA's warnings of what is done here on purpose; read when JAX is imported.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    import jax

    # Our own watch (lifeline.py) ends a job with a message that names the process that is gone; JAX's
    # would abort with a stack trace. JAX's stays as the last resort, a good deal later.
    jax.config.update('jax_enable_preemption_service', False)
    where = cluster.coordinator or 'found by JAX'
    if cluster.process_id:
        _await_coordinator(cluster.coordinator, timeout)
    elif cluster.coordinator:
        _check_port(cluster.coordinator)
    # JAX ends a process without a word of ours where not all come in time: hence an earlier clock.
    too_late = threading.Timer(timeout, _give_up, [f'{_missing(where)} within {timeout:g} s'])
    too_late.daemon = True
    too_late.start()
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            local_device_ids=cluster.local_device_ids,
            coordinator_bind_address=_listen_at(cluster.coordinator),
            initialization_timeout=int(timeout) + 60,
            heartbeat_timeout_seconds=int(max(100, 3 * heartbeat_timeout, timeout + 60)),
            shutdown_timeout_seconds=int(max(60, heartbeat_timeout)),
        )
    except ValueError as error:
        raise UserError(f'{_missing(where)} ({_first_line(error)})') from error
    except RuntimeError as error:
        raise Late(f'{_missing(where)} ({_first_line(error)})') from error
    finally:
        too_late.cancel()
    if is_first():
        say(f'{count()} processes, found by {cluster.found_by}; coordinator {where}')


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _missing(where: str) -> str:
    return (
        f'coordinator={where}: not all processes joined the job; start all of them, with the same '
        '--num_processes (on a TPU pod: the command on every worker, --worker=all)'
    )


def _give_up(message: str) -> None:
    print(f'error: {message}', file=sys.stderr, flush=True)
    os._exit(FAULT)


def _listen_at(address: str | None) -> str | None:
    """Returns where process 0 listens: a job of one machine is not to be reached from others.

    None is JAX's default, every interface: what a name means here may be another address than elsewhere.
    """
    if address and address.rpartition(':')[0] in ('127.0.0.1', 'localhost', '[::1]'):
        return address
    return None


def _check_port(address: str) -> None:
    """Raises Late if another program listens there: JAX's coordinator would end by a segmentation fault."""
    host, _, port = address.rpartition(':')
    here = host.strip('[]') if _listen_at(address) else ''
    family = socket.AF_INET6 if ':' in here else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((here, int(port)))  # without listening: the others wait for somebody who does
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Late(f'coordinator={address}: another program listens there; name another port') from error


def _await_coordinator(address: str | None, timeout: float) -> None:
    """Waits until somebody listens there: JAX's client would end the process without a word of ours."""
    if address is None:
        return
    host, _, port = address.rpartition(':')
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise Late(
                    f'coordinator={address!r}: cannot be reached within {timeout:g} s ({error}); is '
                    'process 0 started, is this its address, and does no firewall stand between?'
                ) from error
        time.sleep(0.2)


def exchange_failed(error: BaseException | None) -> bool:
    """Whether an error comes from an exchange between processes: then another one is to blame, as a rule."""
    import jax

    if client() is None:
        return False
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) or 'Gloo' in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def count() -> int:
    """Returns how many processes the job has; unlike `jax.process_count`, without starting the backend."""
    return _state().num_processes


def index() -> int:
    """Returns which of them this is, from 0."""
    return _state().process_id


def is_first() -> bool:
    """Whether this process prints and writes for all."""
    return index() == 0


def client() -> Any:
    """Returns the client of the job's key-value store; None for a process on its own."""
    return _state().client


def _state() -> Any:
    from jax._src import distributed  # JAX has no public name for it

    return distributed.global_state


def host() -> str:
    return socket.gethostname()


_shared = 0


def share(value: Callable[[], Any], timeout: float | None = None) -> Any:
    """Returns on every process what `value()` gives on process 0 (as JSON can hold it).

    Every process calls it, in the same order.

    Raises:
      Late: process 0 did not answer in time.
    """
    global _shared
    store = client()
    if store is None:
        return value()
    key, _shared = f'parallel_train/shared/{_shared}', _shared + 1
    if is_first():
        store.key_value_set(key, json.dumps(value()))
    return json.loads(_await(store, key, 0, 'what all are to know', timeout))


def gather(topic: str, value: Any, timeout: float | None = None) -> list[Any]:
    """Returns on every process what each gives for a topic (as JSON can hold it), by their numbers.

    Every process calls it, each topic once.

    Raises:
      Late: names the process that did not answer in time.
    """
    store = client()
    if store is None:
        return [value]
    store.key_value_set(f'parallel_train/gather/{topic}/{index()}', json.dumps(value))
    keys = [f'parallel_train/gather/{topic}/{process}' for process in range(count())]
    return [json.loads(_await(store, key, process, topic, timeout)) for process, key in enumerate(keys)]


def _await(store: Any, key: str, process: int, topic: str, timeout: float | None) -> str:
    seconds = _patience if timeout is None else timeout
    try:
        return store.blocking_key_value_get(key, int(seconds * 1000))
    except Exception as error:  # a time-out, of jaxlib's own kind
        raise Late(f'process {process}: did not answer ({topic}) within {seconds:g} s') from error


def agree(
    check: Callable[[], Checked], facts: Callable[[Checked], dict[str, Any]], timeout: float
) -> Checked:
    """Returns what `check` gives here, once all processes are here and the facts of what it gives are equal.

    Args:
      check: what each process does by itself. A UserError that it raises is known to all, and raised there.
      facts: what must be equal.
      timeout: seconds to wait for the last process.

    Raises:
      UserError: on every process; names process and field that differ.
      Late: names the processes that did not come.
    """
    store = client()
    if store is None:
        return check()
    try:
        checked = check()
        mine: dict[str, Any] = {'facts': facts(checked), 'address': _address()}
    except UserError as error:
        mine = {'error': str(error)}
    store.key_value_set(f'parallel_train/facts/{index()}', json.dumps(mine))
    if is_first():
        store.key_value_set('parallel_train/verdict', json.dumps(_verdict(store, timeout)))
    verdict = _await(store, 'parallel_train/verdict', 0, 'whether all processes agree', timeout + 30)
    late, different = json.loads(verdict)
    if late or different:
        if late:  # among them one that is to hear of it: not on every process
            raise Late(late)
        failure = UserError(different)
        failure.on_every_process = True
        raise failure
    return checked


def _verdict(store: Any, timeout: float) -> tuple[str, str]:
    """Returns who did not come, and else in what the processes differ: twice '' where all agree."""
    deadline = time.monotonic() + timeout
    all_facts, absent = [], []
    for process in range(count()):
        left = max(deadline - time.monotonic(), 0.1)
        try:
            text = store.blocking_key_value_get(f'parallel_train/facts/{process}', int(left * 1000))
            all_facts.append(json.loads(text))
        except Exception:  # a time-out, of jaxlib's own kind
            absent.append(process)
    if absent:
        names = ', '.join(map(str, absent))
        return f'process {names}: did not come within {timeout:g} s; see its own output', ''
    return '', differences(all_facts)


def differences(all_facts: list[dict[str, Any]]) -> str:
    """Returns what is wrong with the facts of processes 0, 1, ...: '' if nothing is."""
    for process, told in enumerate(all_facts):
        if 'error' in told:
            return told['error'] if process == 0 else f'process {process}: {told["error"]}'
    first = all_facts[0]
    for process, told in enumerate(all_facts):
        for field, value in first['facts'].items():
            if told['facts'].get(field) != value:
                return (
                    f'process {process}: {field} is {told["facts"].get(field)!r}, process 0 has {value!r}; '
                    'start all processes with the same code, command and data'
                )
    hosts = {told['address'][0] for told in all_facts}
    for process, told in enumerate(all_facts):
        name, address = told['address']
        if len(hosts) > 1 and address.startswith('127.'):
            return (
                f'process {process}: its host name {name!r} means {address} there, which other hosts cannot '
                f'reach; in /etc/hosts of {name}, give {name} the address of its network interface'
            )
    return ''


def _address() -> tuple[str, str]:
    try:
        return host(), socket.gethostbyname(host())
    except OSError:
        return host(), 'unknown'
