"""How fast is the JPEG pipeline? Its images/s at 224 × 224 ÷ those of bare decoding and cropping.

All decode the same pictures, 500 × 375 and the like at about 108 kB (those of ImageNet have 110), with
random-resized crops, on the same threads, one a core:

    bare    decode, crop and resize, of images that lie in memory; nothing is read, batched or kept
    ours    `train`'s own feed: order, ArrayRecord, decode and crop, batch, and on to the device
    pillow  a Grain pipeline: the same reads and crops, decoded by Pillow
    opencv  the same, decoded by OpenCV

They take turns in one process; ratios are formed within each round. CPU seconds count too: on a machine that
does other things besides, their ratio says more than that of the rates.

    pip install grain opencv-python-headless    # optional: the last two
    python benchmarks/jpeg.py [--images=512] [--batch_size=128] [--rounds=7]
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np

TARGET, SIZE = 0.9, 224
SHAPES = ((375, 500), (333, 500), (500, 375))


def write_pictures(root: Path, count: int) -> None:
    """Writes JPEG files of pictures whose spectrum falls as that of photographs does."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, class_name, i in itertools.product(('train', 'val'), 'ab', range(count // 2)):
        if split == 'val' and i:
            continue
        height, width = SHAPES[i % len(SHAPES)]
        frequency = np.fft.rfftfreq(width) ** 2 + np.fft.fftfreq(height)[:, None] ** 2
        frequency[0, 0] = 1
        noise = rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))
        channels = np.fft.irfft2(noise / frequency**0.55, s=(height, width))
        picture = 0.7 * channels.mean(0) + 0.3 * channels
        picture = (picture - picture.mean()) / picture.std() * 50 + 120
        folder = root / split / class_name
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(picture, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / f'{i}.jpg', quality=90)


def recipe(batch_size: int, steps: int, images: int) -> Any:
    from parallel_train.config import complete, default_config

    config = default_config()
    config.dataset, config.eval_split, config.image_size = 'bench_jpeg', 'validation', SIZE
    config.random_resized_crop, config.batch_size, config.num_classes = True, batch_size, 2
    config.num_epochs = steps / (images // batch_size)  # so that nothing is read ahead of the last step
    return complete(config)


def ours(config: Any, data_dir: Path, steps: int) -> Callable[[], int]:
    """Returns a function that takes the next steps from the feed, and returns how many images those are."""
    import jax

    from parallel_train.batches import make_feed
    from parallel_train.dataset import open_split
    from parallel_train.mesh import make_mesh, start_devices
    from parallel_train.plan import make_plan

    start_devices(1)
    split = open_split(config, 'train', data_dir, training=True)
    plan, mesh = make_plan(config, len(split), 2, 1), make_mesh(1)
    assert plan.num_steps == steps, plan.num_steps

    def stretch() -> int:
        feed = make_feed(split, config, plan, mesh)
        for step in range(steps):
            jax.block_until_ready(feed.at(step))
        feed.close()
        return steps * config.batch_size

    return stretch


def bare(config: Any, data_dir: Path, steps: int) -> Callable[[], int]:
    """Returns a function that decodes and crops what `ours` does, of images that lie in memory."""
    from parallel_train import order
    from parallel_train.dataset import open_split
    from parallel_train.machine import cores
    from parallel_train.pixels import View, load_tensorflow, sides_of, windows_of

    tf = load_tensorflow()  # in the threads that it has when training: what starts it first decides
    split = open_split(config, 'train', data_dir, training=True)
    records = split._records(np.arange(len(split)))
    features = {'image': tf.io.FixedLenFeature((), tf.string)}
    images = [tf.io.parse_single_example(record, features)['image'].numpy() for record in records]
    view = View(SIZE, config.crop_fraction, config.seed)
    sides = np.array([sides_of(image) for image in images])
    rows = [*rows_of(config, len(images), steps, order)]
    indices = np.concatenate([row for _, row in rows])
    windows = np.concatenate([windows_of(view, sides[row], row, epoch) for epoch, row in rows])
    held = tf.constant(images)

    def decode(i: Any, window: Any) -> Any:
        pixels = tf.io.decode_and_crop_jpeg(tf.gather(held, i), window, channels=3)
        return tf.cast(tf.image.resize(pixels, (SIZE, SIZE)) + 0.5, tf.uint8)[0, 0, 0]

    options = tf.data.Options()
    options.threading.private_threadpool_size = cores()
    options.autotune.enabled = False
    data = tf.data.Dataset.from_tensor_slices((indices, windows))
    data = data.map(decode, num_parallel_calls=cores(), deterministic=False).with_options(options)
    # Counted by TensorFlow too: Python's own iteration would add a thirtieth of CPU time to what is bare.
    return lambda: int(data.reduce(np.int64(0), lambda counted, _: counted + 1))


def with_grain(
    config: Any, data_dir: Path, steps: int, decode: Callable[..., np.ndarray]
) -> Callable[[], int]:
    """Returns a function that takes `steps` batches from a Grain pipeline, in threads."""
    import grain
    import tensorflow_datasets as tfds

    from parallel_train import order
    from parallel_train.machine import cores

    as_stored = {'image': tfds.decode.SkipDecoding()}
    source = tfds.data_source(config.dataset, split='train', data_dir=data_dir, decoders=as_stored)
    rows = np.concatenate([row for _, row in rows_of(config, len(source), steps, order)])

    def load(pair: tuple[int, int]) -> dict[str, np.ndarray]:
        place, example = pair
        rng = np.random.Generator(np.random.Philox(key=place))
        record = source[int(example)]
        return {'image': decode(record['image'], rng), 'label': record['label']}

    def stretch() -> int:
        pipeline = (
            grain.MapDataset.source(list(enumerate(rows)))
            .map(load)
            .batch(config.batch_size)
            .to_iter_dataset(grain.ReadOptions(num_threads=cores(), prefetch_buffer_size=4 * cores()))
        )
        return sum(len(batch['label']) for batch in pipeline)

    return stretch


def rows_of(config: Any, count: int, steps: int, order: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the epoch and the examples of each step."""
    per_epoch = count // config.batch_size
    for step in range(steps):
        epoch, row = divmod(step, per_epoch)
        yield epoch, order.epoch_batches(config.seed, epoch, count, config.batch_size)[row]


def random_window(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Returns left, top, width and height of a random-resized crop."""
    for _ in range(10):
        area = rng.uniform(0.08, 1) * width * height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            return int(rng.integers(width - wide + 1)), int(rng.integers(height - tall + 1)), wide, tall
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def by_pillow(data: bytes, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        left, top, wide, tall = random_window(*image.size, rng)
        box = (left, top, left + wide, top + tall)
        return np.asarray(image.convert('RGB').resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))


def by_opencv(data: bytes, rng: np.random.Generator) -> np.ndarray:
    import cv2

    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    left, top, wide, tall = random_window(image.shape[1], image.shape[0], rng)
    return cv2.resize(image[top : top + tall, left : left + wide], (SIZE, SIZE))


def timed(stretch: Callable[[], int]) -> tuple[float, float]:
    """Returns images a second, and images a second of all cores' time."""
    start, cpu = time.perf_counter(), time.process_time()
    images = stretch()
    return images / (time.perf_counter() - start), images / (time.process_time() - cpu)


def contestants(config: Any, data_dir: Path, steps: int) -> dict[str, Callable[[], int]]:
    things = {
        'ours': ours(config, data_dir, steps),
        'bare': bare(config, data_dir, steps),
    }
    for name, package, decode in (('pillow', 'PIL', by_pillow), ('opencv', 'cv2', by_opencv)):
        try:
            __import__('grain')
            __import__(package)
        except ImportError as error:
            print(f'{name}: left out ({error})')
            continue
        if name == 'opencv':
            import cv2

            cv2.setNumThreads(1)  # the threads are Grain's
        things[name] = with_grain(config, data_dir, steps, decode)
    return things


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--images', type=int, default=512, help='pictures in the set')
    parser.add_argument('--batch_size', type=int, default=128)
    parser.add_argument('--steps', type=int, default=8, help='batches in one stretch')
    parser.add_argument('--rounds', type=int, default=7)
    args = parser.parse_args()
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    facts = measure.environment(('jax', 'tensorflow', 'grain', 'pillow', 'opencv-python-headless', 'numpy'))
    measure.show_environment(facts)
    config = recipe(args.batch_size, args.steps, args.images)
    with tempfile.TemporaryDirectory() as folder:
        from parallel_train.prepare import prepare

        data_dir = Path(folder) / 'data'
        write_pictures(Path(folder) / 'pictures', args.images)
        prepare(config.dataset, data_dir, Path(folder) / 'pictures')
        things = contestants(config, data_dir, args.steps)
        for stretch in things.values():
            stretch()  # what is made at first use is made
        rounds = measure.interleave(args.rounds, {name: (lambda s=s: timed(s)) for name, s in things.items()})  # type: ignore[misc]
    rates = {name: [rate for rate, _ in values] for name, values in rounds.items()}
    of_cpu = {name: [rate for _, rate in values] for name, values in rounds.items()}
    results = {
        name: {
            'images_per_second': measure.Spread.of(rates[name]),
            'images_per_cpu_second': measure.Spread.of(of_cpu[name]),
            'ratio': measure.ratio(rates[name], rates['bare']),
            'cpu_ratio': measure.ratio(of_cpu[name], of_cpu['bare']),
        }
        for name in rounds
    }
    rows = [
        [
            name,
            result['images_per_second'].text(),
            result['ratio'].text('.2f'),
            result['images_per_cpu_second'].text(),
            result['cpu_ratio'].text('.2f'),
            f'≥ {TARGET}' if name == 'ours' else '',
        ]
        for name, result in results.items()
    ]
    header = ['pipeline', 'images/s', '÷ bare', 'images/CPU s', '÷ bare', 'target']
    title = f'JPEG at {SIZE}, batches of {args.batch_size}, {args.rounds} rounds: median (quartiles)'
    print(measure.table(title, header, rows))
    measure.write_results('jpeg', facts, {'images': args.images, 'results': results, 'rounds': rounds})


if __name__ == '__main__':
    main()
