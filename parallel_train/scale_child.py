"""How fast is one size? A program: a request on stdin, then a line for each turn; answers on stdout.

All are JSON objects, one a line. The first answer is {'ready': what is known before the first turn},
{'error': the user's mistake} or {'diverged': why}; each turn is answered by {'turn': what was measured}.
What libraries print goes to stderr. It ends when stdin does, so it never outlives its parent by more than
a turn.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from parallel_train import config as config_lib
from parallel_train import processes
from parallel_train.cluster import Cluster
from parallel_train.errors import Diverged, UserError
from parallel_train.paths import opened
from parallel_train.scale_sizes import LEAD

_QUEUED = 2  # steps, while the host waits for the clock to start


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), 'w')
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(**message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    request = json.loads(sys.stdin.readline())
    config = config_lib.complete(config_lib.Config(request['config']))
    try:
        if 'size' not in request:
            answer(ready=machine_facts(config, request['most_devices'], request['most_processes']))
            return
        if request['num_processes'] > 1:
            cluster = Cluster(
                'scale', request['num_processes'], request['process_id'], request['coordinator']
            )
            processes.start(cluster, 60, 120, lambda _: None)
        data_dir = opened('data_dir', request['data_dir'])
        bench = Bench(config, data_dir, request['size']['num_devices'], request['steps'])
        answer(ready=bench.facts())
    except UserError as error:
        answer(error=str(error))
        return
    except Diverged as error:
        answer(diverged=str(error))
        return
    used, since = time.process_time(), time.perf_counter()
    for line in sys.stdin:
        idle = (time.process_time() - used) / (time.perf_counter() - since)
        answer(turn={**bench.turn(**json.loads(line)), 'idle_cpu': idle})
        used, since = time.process_time(), time.perf_counter()
    bench.close()


def machine_facts(config: Any, most_devices: int, num_processes: int) -> dict[str, Any]:
    """Returns what this machine is, once it is known to have as many devices and to take the model.

    Raises:
      UserError: it has fewer devices, or model or loss cannot be used.
    """
    import jax

    from parallel_train.forward import check_model_and_loss
    from parallel_train.machine import cores
    from parallel_train.mesh import MAX_CPU_DEVICES
    from parallel_train.preflight import code_version

    device, there = jax.devices()[0], len(jax.devices())
    if device.platform == 'cpu':
        there = MAX_CPU_DEVICES
    if most_devices > there:
        raise UserError(f'device_counts={most_devices}: there are {there} {device.platform} devices')
    if num_processes > 1 and device.platform not in ('cpu', 'gpu'):
        raise UserError(
            f'processes={num_processes}: the {device.platform} devices of a machine belong to one process; '
            'leave it out'
        )
    check_model_and_loss(config)
    return {
        'platform': device.platform,
        'device_kind': device.device_kind,
        'cores': cores(),
        'jax': jax.__version__,
        'jaxlib': jax.lib.__version__,
        'code of parallel_train': code_version(),
    }


class Bench:
    """The real step on the real feed, and what it is compared with, compiled and warmed up.

    Args:
      config: of this size, complete.
      data_dir: where the dataset was prepared.
      num_devices: over all processes.
      steps: timed, in each stretch.
    """

    def __init__(self, config: Any, data_dir: Path, num_devices: int, steps: int):
        from parallel_train import dataset
        from parallel_train.batches import make_feed
        from parallel_train.devices import tree_shards
        from parallel_train.mesh import is_cpu, make_mesh, start_devices
        from parallel_train.plan import make_plan
        from parallel_train.schedule import create_learning_rate_fn
        from parallel_train.sizes import find_sizes
        from parallel_train.state import initialise
        from parallel_train.step import make_train_step

        start_devices(num_devices, tree_shards(config))
        import jax
        import jax.numpy as jnp

        # The state is donated to each step, so a stretch starts from a copy of it.
        self._copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
        self._config, self._steps = config, steps
        self._sizes = find_sizes(config, data_dir)
        self._split = dataset.open_split(config, config.train_split, data_dir, training=True)
        self._mesh = make_mesh(num_devices)
        self._plan = make_plan(
            config,
            self._sizes.num_train_examples,
            self._sizes.num_eval_examples,
            num_devices,
            processes.count(),
        )
        rate = create_learning_rate_fn(config, self._plan.peak_learning_rate, self._plan.steps_per_epoch)
        self._initial = initialise(config, rate, self._mesh)
        self._feed = make_feed(self._split, config, self._plan, self._mesh)
        self._step = make_train_step(config, self._plan, self._mesh)
        start = time.perf_counter()
        self._fed_state, self._losses = self._train_from_the_start()
        self._stretches = {'resident': self._resident_stretch(config)}
        if num_devices > 1:
            self._stretches['alone'] = self._resident_stretch(config, exchange=False)
        self._predicted, self._why_not = None, ''
        if is_cpu(self._mesh):
            self._stretches |= self._stretches_of_other_batches()
        else:
            self._predicted, self._why_not = self._prediction()
        self._seconds = time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        """Returns what is known before the first turn."""
        return {
            'losses': self._losses,
            'warm_up_seconds': self._seconds,
            'per_device_batch_size': self._plan.per_device_batch_size,
            'accumulation_steps': self._plan.accumulation_steps,
            'shards': self._plan.shards,
            'predicted_step_seconds': self._predicted,
            'not_predicted': self._why_not,
        }

    def turn(self, backwards: bool) -> dict[str, Any]:
        """Measures every stretch once. Times are the seconds of one step.

        Returns:
          'fed': with the real feed, and 'data_wait', the share of it in which the host waited for data;
          'resident': on one batch that lies on the devices; 'alone': the same without the all-reduce;
          'batch N': the same as 'resident' with a batch of N.
        """
        measured: dict[str, Any] = {}
        names = ['fed', *self._stretches]
        for name in reversed(names) if backwards else names:
            if name == 'fed':
                measured |= self._fed_stretch()
            else:
                measured[name] = self._stretches[name]()
        return measured

    def close(self) -> None:
        self._feed.close()

    def _train_from_the_start(self) -> tuple[Any, list[float]]:
        """Trains the first steps as `train` does; returns the state after them, and the loss of each."""
        import jax

        from parallel_train.state import take_sums

        state, sums = self._copy(self._initial), []
        for i in range(self._steps):
            state = self._step(state, self._feed.at(i))
            state, of_step = take_sums(state, self._mesh)
            sums.append(of_step)
        self._next = self._steps
        if int(state.skipped):
            raise Diverged(
                f'training diverged: loss or gradient is not finite within the first {self._steps} steps on '
                f'{self._plan.num_devices} devices; lower config.learning_rate={self._config.learning_rate:g}'
            )
        return state, [float(s['loss']) for s in jax.device_get(sums)]

    def _fed_stretch(self) -> dict[str, float]:
        waited_at: list[float] = []

        def data(i: int) -> Any:
            waited_at.append(self._feed.wait_seconds)
            return self._feed.at(self._next + i)

        self._fed_state, seconds = self._timed(self._step, self._fed_state, data, self._steps, LEAD)
        self._next += LEAD + self._steps
        waited = self._feed.wait_seconds - waited_at[LEAD]
        return {'fed': seconds, 'data_wait': min(waited / (seconds * self._steps), 1.0)}

    def _resident_stretch(self, config: Any, exchange: bool = True, share: int = 1) -> Any:
        """Returns a function that measures the step on one batch that stays on the devices: seconds a step.

        Args:
          config: complete.
          exchange: whether gradients are exchanged.
          share: of a stretch's steps, one in so many.
        """
        import numpy as np

        from parallel_train.batches import gather
        from parallel_train.plan import make_plan
        from parallel_train.step import make_train_step

        plan = self._plan
        if config is not self._config:
            of_dataset = self._sizes.num_train_examples, self._sizes.num_eval_examples
            plan = make_plan(config, *of_dataset, plan.num_devices, plan.num_processes)
        step = make_train_step(config, plan, self._mesh, exchange=exchange)
        data = gather(self._split, np.arange(plan.batch_size, dtype=np.int32), self._mesh)
        steps = max(1, self._steps // share)

        def stretch() -> float:
            return self._timed(step, self._copy(self._initial), lambda _: data, steps, lead=1)[1]

        self._timed(step, self._copy(self._initial), lambda _: data, 1, lead=1)  # compiles
        return stretch

    def _stretches_of_other_batches(self) -> dict[str, Any]:
        """Two other batch sizes, from which a CPU's step of this one is predicted; {} if no two fit."""
        from parallel_train.measure_cpu import other_batch_sizes

        fitting = [
            size
            for size in other_batch_sizes(self._config, self._plan)
            if size <= self._sizes.num_train_examples
        ][:2]
        stretches = {}
        for size in fitting if len(fitting) == 2 else []:
            changed = self._config.copy_and_resolve_references().unlock()
            changed.batch_size = size
            stretches[f'batch {size}'] = self._resident_stretch(changed.lock(), share=5)
        return stretches

    def _prediction(self) -> tuple[float | None, str]:
        from parallel_train.chip_here import predicted_step_seconds

        return predicted_step_seconds(self._config, self._sizes, self._plan, self._mesh)

    def _timed(self, step: Any, state: Any, data: Any, steps: int, lead: int) -> tuple[Any, float]:
        """Runs `lead` steps and `steps` timed ones without a stop between; returns the state, seconds a step.

        The clock starts when the devices are done with the lead. The host waits for that with more steps
        queued, so that the devices have work and a feed that is late stays so.
        """
        import jax

        queued = min(_QUEUED, steps - 1)
        for i in range(lead + steps):
            if i == lead:
                mark = self._copy(state.step)
            state = step(state, data(i))
            if i == lead + queued:
                mark.block_until_ready()
                start = time.perf_counter()
        jax.block_until_ready(state)
        return state, (time.perf_counter() - start) / steps


if __name__ == '__main__':
    main()
