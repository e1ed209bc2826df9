"""How fast are the ImageNet recipes on one GPU? Images/s, MFU, and what the loop costs.

The model, optimizer, precision and augmentation of `imagenet_resnet50.py` and `imagenet_vit_s16.py`, in a
batch that one GPU holds, on made-up images of 224 × 224 that lie on the device as uint8. These take turns in
one process:

    bare     the compiled step, called again and again on one resident batch
    loop     `train`'s own loop
    loop ×N  the same with config.steps_per_dispatch=N: so many steps in one `lax.scan`

MFU is of the model's products alone, 3 × those of a forward pass (two for the gradients of it),
as a share of the chip's peak in bfloat16 (parallel_train/topologies.py).

    python benchmarks/gpu.py [--models=resnet50,vit_s16] [--batch_size=256] [--steps=40] [--rounds=5]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np

RECIPES = {'resnet50': 'imagenet_resnet50.py', 'vit_s16': 'imagenet_vit_s16.py'}
SIZE, CLASSES, IMAGES = 224, 1000, 10_240
# Multiply-adds of one image's forward pass (torchvision's table of weights; DeiT's table 1).
MULTIPLY_ADDS = {'resnet50': 4.09e9, 'vit_s16': 4.6e9}


def made_up(split: str, data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images of noise, in which each class has a colour of its own: uint8 [n, 224, 224, 3], int32 [n]."""
    rng = np.random.default_rng(0)
    count = IMAGES if split == 'train' else 64
    labels = rng.integers(CLASSES, size=count).astype(np.int32)
    labels[-1] = CLASSES - 1
    colours = rng.integers(64, 192, size=(CLASSES, 1, 1, 3))
    noise = rng.integers(-64, 64, size=(64, SIZE, SIZE, 3))
    return (colours[labels] + noise[np.arange(count) % 64]).astype(np.uint8), labels


def recipe(model: str, batch_size: int, **overrides: Any) -> Any:
    from parallel_train import config as config_lib

    config = config_lib.load(measure.ROOT / 'configs' / RECIPES[model])
    per_shard = config.batch_size // config.shards
    config.update({'dataset': 'gpu:made_up', 'image_size': 0, 'random_resized_crop': False})
    config.update({'num_train_examples': IMAGES, 'num_eval_examples': 64, 'eval_batch_size': 64})
    config.update({'batch_size': batch_size, 'shards': batch_size // per_shard})
    # For longer than is measured, and at a rate at which nothing runs off.
    config.update(
        {'num_epochs': 1e5, 'warmup_epochs': 10.0, 'learning_rate': 1e-4, 'warmup_learning_rate': 0.0}
    )
    config.update({'schedule': 'cosine', 'learning_rate_scaling': 'none', 'log_every_steps': 20})
    config.update({'eval_every_epochs': 0.0, 'checkpoint_every_epochs': 0.0, **overrides})
    return config_lib.complete(config)


def bare_step(config: Any, loop: measure.Loop) -> Callable[[int], float]:
    """Returns a function that calls the bare step so many times and returns images/s."""
    from parallel_train.batches import gather
    from parallel_train.mesh import make_mesh
    from parallel_train.state import initialise
    from parallel_train.step import make_train_step

    plan = loop.run.plan
    mesh = make_mesh(plan.num_devices)
    data = gather(loop.run.train_split, np.arange(plan.batch_size, dtype=np.int32), mesh)
    step, state = make_train_step(config, plan, mesh), initialise(config, 1e-4, mesh)

    def stretch(steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state = step(state, data)
        measure.wait_for(state)
        return steps * plan.batch_size / (time.perf_counter() - start)

    return stretch


def measure_model(model: str, args: argparse.Namespace, workdir: Path) -> dict[str, Any]:
    import jax

    from parallel_train.chip_here import chip_name
    from parallel_train.topologies import CHIPS

    config = recipe(model, args.batch_size)
    at_once = recipe(model, args.batch_size, steps_per_dispatch=args.dispatch)
    loops = {
        'loop': measure.open_loop(config, workdir, 1, workdir / 'one'),
        f'loop ×{args.dispatch}': measure.open_loop(at_once, workdir, 1, workdir / 'many'),
    }
    bare = bare_step(config, loops['loop'])
    things = {'bare': lambda: bare(args.steps)}
    things |= {name: (lambda loop=loop: loop.stretch(args.steps)) for name, loop in loops.items()}
    measure.interleave(1, things)  # compiles
    rounds = measure.interleave(args.rounds, things)
    for loop in reversed(loops.values()):
        loop.close()
    kind = jax.devices()[0].device_kind
    chip, flops = chip_name(kind), 3 * 2 * MULTIPLY_ADDS[model]
    memory = jax.devices()[0].memory_stats() or {}
    return {
        'model': model,
        'device': kind,
        'flops_per_image': flops,
        'images_per_second': {name: measure.Spread.of(rates) for name, rates in rounds.items()},
        'to_bare': {name: measure.ratio(rates, rounds['bare']) for name, rates in rounds.items()},
        'mfu': measure.Spread.of(rounds['bare']).median * flops / CHIPS[chip].flops_per_second
        if chip
        else None,
        'peak_memory_bytes': memory.get('peak_bytes_in_use'),
        'rounds': rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--models', default='resnet50,vit_s16')
    parser.add_argument('--batch_size', type=int, default=256)
    parser.add_argument('--steps', type=int, default=40, help='in one stretch')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--dispatch', type=int, default=10, help='steps in one dispatch')
    args = parser.parse_args()
    if args.steps * args.batch_size > IMAGES:  # a stretch ends with an epoch
        parser.error(
            f'--steps={args.steps}: at most {IMAGES // args.batch_size} in batches of {args.batch_size}'
        )
    facts = measure.environment(('jax', 'jaxlib', 'flax', 'optax', 'numpy'))
    measure.show_environment(facts)
    with tempfile.TemporaryDirectory() as folder:
        results = [measure_model(model, args, Path(folder) / model) for model in args.models.split(',')]
    rows = [
        [
            f'{result["model"]}, {name}',
            spread.text(),
            result['to_bare'][name].text('.3f'),
            f'{result["mfu"]:.0%}' if name == 'bare' and result['mfu'] else '',
        ]
        for result in results
        for name, spread in result['images_per_second'].items()
    ]
    title = (
        f'{results[0]["device"]}, batch {args.batch_size}, bfloat16, {args.rounds} rounds: median (quartiles)'
    )
    print(measure.table(title, ['', 'images/s', '÷ bare', 'MFU'], rows))
    measure.write_results('gpu', facts, {'batch_size': args.batch_size, 'results': results})


if __name__ == '__main__':
    main()
