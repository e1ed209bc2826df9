"""What becomes of the train step on one topology? A program: a request on stdin, answers on stdout.

They are JSON objects, one a line: {'say': progress}, and at the end {'row': result} or {'error': the
user's mistake}. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from parallel_train import config as config_lib
from parallel_train import topologies
from parallel_train.errors import UserError
from parallel_train.plan import make_plan
from parallel_train.sizes import Sizes

GIB = topologies.GIB
_WITHOUT_SHARDS_UNIT = 8  # images: what a device's memory is laid out in


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), 'w')
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(**message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    config = config_lib.complete(config_lib.Config(request['config']))
    sizes = Sizes(**{**request['sizes'], 'input_shape': tuple(request['sizes']['input_shape'])})
    topology = topologies.parse(request['topology'])
    try:
        answer(row=_row(config, sizes, topology, request['fit'], lambda text: answer(say=text)))
    except UserError as error:
        answer(error=str(error))


def _end_with_parent() -> None:
    """Ends the process when stdin is closed, however the parent ended."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _row(
    config: Any, sizes: Sizes, topology: topologies.Topology, fit: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Compiles the config as it stands, or the largest batch of it that fits."""
    mesh, limit = _mesh_and_limit(topology)
    from parallel_train.compile_row import row_of
    from parallel_train.compiled import Compiled, compile_step
    from parallel_train.forward import check_model_and_loss

    check_model_and_loss(config)

    def compile_config(changed: Any) -> Compiled:
        plan = make_plan(changed, sizes.num_train_examples, sizes.num_eval_examples, topology.num_devices)
        say(f'compiling for {plan.num_devices} devices, {plan.per_device_batch_size} examples a device')
        compiled = compile_step(changed, sizes, plan, mesh, limit)
        say(
            f'{"fits" if compiled.fits else "does not fit"}: {compiled.needed_bytes / GIB:.2f} of '
            f'{compiled.limit_bytes / GIB:.2f} GiB a device ({compiled.seconds:.0f} s)'
        )
        return compiled

    if fit:
        config, compiled = _largest(config, sizes, topology.num_devices, limit, compile_config)
    else:
        compiled = compile_config(config)
    return row_of(config, sizes, topology, mesh, compiled, say)


def _mesh_and_limit(topology: topologies.Topology) -> tuple[Any, int]:
    """Returns a mesh of the topology's devices and the memory of each, in bytes."""
    if topology.is_cpu:
        import psutil

        from parallel_train.mesh import make_mesh, start_devices

        start_devices(topology.num_devices)
        memory = psutil.virtual_memory().total
        return make_mesh(topology.num_devices), memory // topology.num_devices
    import jax
    from jax.experimental import topologies as jax_topologies

    from parallel_train.reduce import DATA_AXIS

    assert topology.chip is not None
    # libtpu's default for v4 is a device a core; JAX on a v4 VM has one a chip ("megacore").
    options = {'chip_config_name': 'megacore'} if topology.name.startswith('v4') else {}
    devices = jax_topologies.get_topology_desc(topology.name, 'tpu', **options).devices
    assert len(devices) == topology.num_devices, (topology.name, len(devices))
    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), (DATA_AXIS,), axis_types=automatic, devices=devices)
    return mesh, topology.chip.hbm_limit_bytes


def _largest(
    config: Any, sizes: Sizes, devices: int, limit: int, compile_config: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """Returns the config with the largest batch that fits, and its program; where none does, the smallest.

    The batch grows by whole shards of as many examples as the config's. Without shards of its own, by a few
    examples a device.
    """
    from parallel_train.fit import largest_that_fits

    turns = devices * config.accumulation_steps
    unit = config.batch_size // config.shards if config.shards else _WITHOUT_SHARDS_UNIT
    most = sizes.num_train_examples // (turns * unit)
    if most < 1:
        raise UserError(
            f'config.batch_size={config.batch_size}: {turns} devices × accumulation steps of {unit} '
            f'examples are more than the train split holds, {sizes.num_train_examples}; use fewer devices'
        )
    compiled: dict[int, Any] = {}

    def of_size(size: int) -> Any:
        changed = config.copy_and_resolve_references().unlock()
        changed.batch_size = size * unit * turns
        changed.shards = size * turns if config.shards else 0
        return changed

    def measure(size: int) -> tuple[bool, int]:
        compiled[size] = compile_config(of_size(size))
        return compiled[size].fits, compiled[size].needed_bytes

    start = config.batch_size // (unit * turns)
    largest = largest_that_fits(measure, start, most, limit) or min(compiled)
    return of_size(largest), compiled[largest]


if __name__ == '__main__':
    main()
