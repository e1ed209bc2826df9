"""Which processes make up this job, and do they agree?

A job of several processes is JAX's: one coordinator, run by process 0, and a key-value store there.
The store carries what is said before and beside the collectives; nothing here waits for ever.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from parallel_train.cluster import Cluster
from parallel_train.errors import USER_ERROR, UserError

START_TIMEOUT = 300.0  # seconds
Checked = TypeVar('Checked')


def start(cluster: Cluster, heartbeat_timeout: float, timeout: float, say: Callable[[str], None]) -> None:
    """Joins the job; JAX's backend must not run yet.

    Raises:
      UserError: the coordinator cannot be reached, or not all processes came in time.
    """
    # XLA's warnings of what is done here on purpose; read when JAX is imported.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    import jax

    # Our own watch (lifeline.py) ends a job with a message that names the process that is gone; JAX's
    # would abort with a stack trace. JAX's stays as the last resort, a good deal later.
    jax.config.update('jax_enable_preemption_service', False)
    where = cluster.coordinator or 'found by JAX'
    if cluster.process_id:
        _await_coordinator(cluster.coordinator, timeout)
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
            heartbeat_timeout_seconds=int(max(100, 3 * heartbeat_timeout)),
            shutdown_timeout_seconds=300,  # process 0 writes the report while the others wait
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f'{_missing(where)} ({str(error).strip().splitlines()[0]})') from error
    finally:
        too_late.cancel()
    if is_first():
        say(f'{count()} processes, found by {cluster.found_by}; coordinator {where}')


def _missing(where: str) -> str:
    return (
        f'coordinator={where}: not all processes joined the job; start all of them, with the same '
        '--num_processes (on a TPU pod: the command on every worker, --worker=all)'
    )


def _give_up(message: str) -> None:
    print(f'error: {message}', file=sys.stderr, flush=True)
    os._exit(USER_ERROR)


def _listen_at(address: str | None) -> str | None:
    """Returns where process 0 listens: a job of one machine is not to be reached from others.

    None is JAX's default, every interface: what a name means here may be another address than elsewhere.
    """
    if address and address.rpartition(':')[0] in ('127.0.0.1', 'localhost', '[::1]'):
        return address
    return None


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
                raise UserError(
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


def share(value: Callable[[], Any], timeout: float = START_TIMEOUT) -> Any:
    """Returns on every process what `value()` gives on process 0 (as JSON can hold it).

    Every process calls it, in the same order.
    """
    global _shared
    store = client()
    if store is None:
        return value()
    key, _shared = f'parallel_train/shared/{_shared}', _shared + 1
    if is_first():
        store.key_value_set(key, json.dumps(value()))
    return json.loads(store.blocking_key_value_get(key, int(timeout * 1000)))


def gather(topic: str, value: Any, timeout: float = START_TIMEOUT) -> list[Any]:
    """Returns on every process what each gives for a topic (as JSON can hold it), by their numbers.

    Every process calls it, each topic once.

    Raises:
      UserError: names the process that did not answer in time.
    """
    store = client()
    if store is None:
        return [value]
    store.key_value_set(f'parallel_train/gather/{topic}/{index()}', json.dumps(value))
    values = []
    for process in range(count()):
        key = f'parallel_train/gather/{topic}/{process}'
        try:
            values.append(json.loads(store.blocking_key_value_get(key, int(timeout * 1000))))
        except Exception as error:  # a time-out, of jaxlib's own kind
            raise UserError(f'process {process}: did not answer ({topic}) within {timeout:g} s') from error
    return values


def agree(
    check: Callable[[], Checked], facts: Callable[[Checked], dict[str, Any]], timeout: float
) -> Checked:
    """Returns what `check` gives here, once all processes are here and the facts of what it gives are equal.

    Args:
      check: what each process does by itself. A UserError that it raises is known to all, and raised there.
      facts: what must be equal.
      timeout: seconds to wait for the last process.

    Raises:
      UserError: on every process; names the processes that did not come, or process and field that differ.
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
        store.key_value_set('parallel_train/verdict', _verdict(store, timeout))
    try:
        verdict = store.blocking_key_value_get('parallel_train/verdict', int((timeout + 30) * 1000))
    except Exception as error:  # of jaxlib's own kind
        raise UserError(f'process 0: did not say within {timeout:g} s whether all processes agree') from error
    if verdict:
        failure = UserError(verdict)
        failure.on_every_process = True
        raise failure
    return checked


def _verdict(store: Any, timeout: float) -> str:
    """Returns '' where all processes agree with process 0, else what is wrong."""
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
        return f'process {names}: did not come within {timeout:g} s; see its own output'
    return differences(all_facts)


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
