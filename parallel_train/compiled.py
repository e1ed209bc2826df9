"""What does the compiler say of the train step? The program itself, and what it counted."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from parallel_train import batches
from parallel_train.examples import layout
from parallel_train.hlo import Collective, collectives
from parallel_train.mesh import is_cpu, replicated
from parallel_train.plan import Plan
from parallel_train.schedule import create_learning_rate_fn
from parallel_train.sizes import Sizes
from parallel_train.state import TrainState, abstract_state
from parallel_train.step import make_train_step
from parallel_train.traffic import hbm_bytes

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device's memory during a step; `outputs` are those that take no argument's place."""

    arguments: int
    temporaries: int
    outputs: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs + self.code


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step compiled for one topology; all counts are of one device.

    Attributes:
      plan: what was compiled.
      seconds: that the compiler took.
      needed_bytes: of memory; the compiler's own figure, also where it refuses.
      limit_bytes: that there are.
      memory: where those bytes go; None where the compiler refuses.
      arguments: the shapes that it was compiled for: state and data.
      program: the executable; None where the compiler refuses, and then there are no counts.
      flops: floating-point operations.
      hbm_bytes: that move between memory and chip.
      bytes_accessed: XLA's count of bytes, which takes no account of where they lie.
    """

    plan: Plan
    seconds: float
    needed_bytes: int
    limit_bytes: int
    arguments: tuple[TrainState, batches.Data]
    memory: Memory | None = None
    program: Any = None
    flops: float = 0.0
    hbm_bytes: int = 0
    bytes_accessed: float = 0.0
    collectives: tuple[Collective, ...] = ()

    @property
    def fits(self) -> bool:
        return self.program is not None and self.needed_bytes <= self.limit_bytes


def compile_step(config: Any, sizes: Sizes, plan: Plan, mesh: Mesh, limit_bytes: int) -> Compiled:
    """Compiles the step that `train` runs, from shapes alone.

    Args:
      config: a complete config.
      sizes: of the dataset.
      plan: for this mesh.
      mesh: of devices that need not exist.
      limit_bytes: the memory of one device.

    Raises whatever the compiler raises, but where it says that the program is too large.
    """
    step: Any = make_train_step(config, plan, mesh)
    arguments = step_shapes(config, sizes, plan, mesh, limit_bytes)
    start = time.perf_counter()
    try:
        program = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        return Compiled(plan, time.perf_counter() - start, *needed, arguments)
    seconds = time.perf_counter() - start
    memory = _memory(program)
    counted = program.cost_analysis()
    # XLA counts the body of a loop once; the loop over turns runs for all but the first.
    turns = 1 if is_cpu(mesh) else plan.accumulation_steps
    return Compiled(
        plan=plan,
        seconds=seconds,
        needed_bytes=memory.total,
        limit_bytes=limit_bytes,
        arguments=arguments,
        memory=memory,
        program=program,
        flops=counted['flops'] * max(turns, 2) / 2,
        hbm_bytes=_traffic(config, sizes, plan, mesh, arguments, program),
        bytes_accessed=counted['bytes accessed'] * max(turns, 2) / 2,
        collectives=tuple(collectives(program.as_text())),
    )


def _traffic(
    config: Any,
    sizes: Sizes,
    plan: Plan,
    mesh: Mesh,
    arguments: tuple[TrainState, batches.Data],
    program: Any,
) -> int:
    """Returns the bytes that a step moves between memory and chip."""
    if 'images' in arguments[1] and not is_cpu(mesh):
        # A gather counts as if it read the whole dataset: the same step is counted with its batch given.
        fed = config.copy_and_resolve_references().unlock()
        fed.data_placement = 'host'
        shapes = step_shapes(fed, sizes, plan, mesh, 0)
        step: Any = make_train_step(fed, plan, mesh)
        program = step.lower(*shapes).compile()
    return hbm_bytes(program.as_text())


def step_shapes(
    config: Any, sizes: Sizes, plan: Plan, mesh: Mesh, memory_bytes: int
) -> tuple[TrainState, batches.Data]:
    """Returns the arguments of the train step as shapes, dtypes and places; nothing is allocated.

    The data is what a feed of `batches.py` would give: the whole dataset and an epoch's order where it
    may stay on the devices, else one batch.
    """
    learning_rate_fn = create_learning_rate_fn(config, plan.peak_learning_rate, plan.steps_per_epoch)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
        abstract_state(config, learning_rate_fn),
    )
    count = sizes.num_train_examples
    parts = layout(sizes.input_shape, sizes.num_classes)
    (image, image_dtype), (label, label_dtype) = parts['image'], parts['label']
    image_bytes = count * math.prod(image) * image_dtype.itemsize
    shapes: dict[str, tuple[tuple[int, ...], Any]]
    if config.data_placement == 'device' or (
        config.data_placement == 'auto'
        and not config.image_size
        and batches.may_stay(image_bytes, memory_bytes)
    ):
        shapes = {
            'images': ((count, *image), image_dtype),
            'labels': ((count, *label), label_dtype),
            'order': ((plan.steps_per_epoch, plan.batch_size), jnp.int32),
        }
    else:
        shapes = {
            'image': ((plan.batch_size, *image), image_dtype),
            'label': ((plan.batch_size, *label), label_dtype),
            'index': ((plan.batch_size,), jnp.int32),
        }
    places = batches.specs(dict.fromkeys(shapes))  # type: ignore[arg-type]
    data = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, places[name]))
        for name, (shape, dtype) in shapes.items()
    }
    return state, data  # type: ignore[return-value]


def needed_bytes(message: str) -> tuple[int, int] | None:
    """Returns the bytes needed and those available, from a compiler's refusal; None if it is none.

    One form tells the whole need, the other that of the temporaries, where they alone are too large.
    """
    size = r'([\d.]+)([KMGT]?)'
    forms = (rf'Used {size} of {size} hbm', rf'\({size}\) exceeds available HBM \({size}\)')
    match = next(filter(None, (re.search(form, message) for form in forms)), None)
    if not match:
        return None
    needed, needed_unit, limit, limit_unit = match.groups()
    return round(float(needed) * _UNITS[needed_unit]), round(float(limit) * _UNITS[limit_unit])


def _memory(program: Any) -> Memory:
    counted = program.memory_analysis()
    return Memory(
        arguments=counted.argument_size_in_bytes,
        temporaries=counted.temp_size_in_bytes,
        outputs=counted.output_size_in_bytes - counted.alias_size_in_bytes,
        code=counted.generated_code_size_in_bytes,
    )
