"""Images that are read, decoded and cropped for each step: the same bytes wherever and whenever."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from parallel_train import start_devices
from parallel_train.config import complete, default_config
from parallel_train.dataset import open_split
from parallel_train.errors import UserError
from parallel_train.order import epoch_batches, eval_batches
from parallel_train.pixels import Corrupt, _sides_of_jpeg, sides_of
from parallel_train.plan import make_plan
from parallel_train.sizes import find_sizes
from parallel_train.stream import _canonical
from tests.conftest import (
    ROOT,
    ImageJob,
    checkpoint_steps,
    environment,
    read_rows,
    restore,
    run_cli,
    run_ok,
    without_timing,
)
from tests.pictures import CLASSES, encoded, picture
from tests.test_processes import free_port

SIZE = 32
TRAIN = 3 * 24 + 1
STEPS = 6  # beyond an epoch


def config_of(**changes: Any) -> Any:
    config = default_config()
    config.dataset, config.eval_split, config.image_size = 'pictures', 'validation', SIZE
    config.random_resized_crop, config.batch_size, config.num_epochs = True, 16, 3.0
    for name, value in changes.items():
        config[name] = value
    return complete(config)


def opened(image_job: ImageJob, split: str = 'train', training: bool = True, **changes: Any) -> Any:
    config = config_of(num_classes=3, **changes)
    return open_split(config, split, image_job.data_dir, training)


JPEGS: dict[str, tuple[str, dict[str, Any]]] = {
    'colour': ('RGB', {}),
    'grey': ('L', {}),
    'four inks': ('CMYK', {}),
    'progressive': ('RGB', {'progressive': True}),
    'with EXIF and a colour profile': (
        'RGB',
        {'exif': b'Exif\0\0' + b'x' * 4000, 'icc_profile': b'y' * 70_000},
    ),
    'optimised, with a comment': ('RGB', {'optimize': True, 'comment': b'\xff\xc0' * 40}),
}


@pytest.mark.parametrize('kind', JPEGS)
def test_the_sides_of_an_image_are_read_from_its_header(kind: str) -> None:
    mode, options = JPEGS[kind]
    file = io.BytesIO()
    Image.new(mode, (300, 201)).save(file, 'jpeg', **options)
    image = file.getvalue()
    assert _sides_of_jpeg(image) == sides_of(image) == (201, 300)
    start = next(at for at in range(len(image)) if _sides_of_jpeg(image[: at + 9]))  # the frame header
    for broken in (image[:start], b'', image[:2], image[1:], image[:2] + b'\xff\xff' + image[2:]):
        assert _sides_of_jpeg(broken) is None  # which leaves it to Pillow
    for end in range(min(start, 300)):
        with pytest.raises(Corrupt):
            sides_of(image[:end])


def test_the_sides_of_other_images_are_read_by_pillow() -> None:
    for form in ('png', 'gif', 'bmp'):
        file = io.BytesIO()
        Image.new('L', (30, 21)).save(file, form)
        assert sides_of(file.getvalue()) == (21, 30)


def all_of(split: Any) -> np.ndarray:
    return np.arange(len(split), dtype=np.int32)


def test_a_read_depends_on_seed_epoch_and_example_alone(image_job: ImageJob) -> None:
    split = opened(image_job)
    images, labels = split.read(all_of(split), epoch=3)
    assert images.shape == (TRAIN, SIZE, SIZE, 3) and images.dtype == np.uint8 and labels.dtype == np.int32
    some = np.array([70, 3, 41], np.int32)
    again, their_labels = opened(image_job).read(some, epoch=3)
    assert np.array_equal(again, images[some]) and np.array_equal(their_labels, labels[some])
    assert not np.array_equal(split.read(some, epoch=4)[0], images[some])
    assert not np.array_equal(opened(image_job, seed=1).read(some, epoch=3)[0], images[some])
    # A slice of the split: its examples are counted from its start.
    part = opened(image_job, 'train[40:72]')
    assert len(part) == 32 and part.name_of(1) == 'train[41]'
    assert np.array_equal(part.read(np.array([1]))[1], labels[41:42])
    joined = opened(image_job, 'validation+train[40:72]')
    assert joined.name_of(13) == 'train[40]' and np.array_equal(
        joined.read(np.array([14, 0]))[1][:1], labels[41:42]
    )


def batch_of(step: int, seed: int = 0) -> tuple[np.ndarray, int]:
    """Returns the examples of a step of 16, and its epoch."""
    epoch, row = divmod(step, TRAIN // 16)
    return epoch_batches(seed, epoch, TRAIN, 16)[row], epoch


def feeds(image_job: ImageJob, config: Any, devices: int) -> tuple[Any, Any]:
    start_devices(8)  # as every test that uses JAX in this process
    from parallel_train.batches import make_feed
    from parallel_train.mesh import make_mesh

    plan = make_plan(config, TRAIN, 13, devices)
    split = open_split(config, 'train', image_job.data_dir, training=True)
    return make_feed(split, config, plan, make_mesh(devices)), plan


def test_batches_are_the_same_on_1_2_and_4_devices(image_job: ImageJob) -> None:
    config = config_of(num_classes=3)
    split = opened(image_job)
    for devices in (1, 2, 4):
        feed, _ = feeds(image_job, config, devices)
        with contextlib.closing(feed):
            for step in range(STEPS):
                examples, epoch = batch_of(step)
                data = feed.at(step)
                want, labels = split.read(examples, epoch)
                assert np.array_equal(data['index'], examples) and np.array_equal(data['label'], labels)
                assert np.array_equal(data['image'], want)
                assert len(data['image'].addressable_shards) == devices


@pytest.mark.parametrize('count', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_process_reads_its_own_examples(count: int, image_job: ImageJob, tmp_path: Path) -> None:
    """Real processes of one device each: what one reads, and that together they have the batches."""
    code = """
import sys
from pathlib import Path
import numpy as np
from parallel_train import processes
from parallel_train.cluster import find_cluster
port, index, count, data_dir, out = sys.argv[1:]
count = int(count)
processes.start(find_cluster(f'127.0.0.1:{port}', count, int(index)), 60, 60, lambda line: None)
from parallel_train.mesh import make_mesh, start_devices
start_devices(count)
from parallel_train.batches import gather, make_feed
from parallel_train.plan import make_plan
from tests.test_stream import STEPS, TRAIN, config_of, open_split
config, mesh = config_of(num_classes=3), make_mesh(count)
split = open_split(config, 'train', Path(data_dir), training=True)
feed = make_feed(split, config, make_plan(config, TRAIN, 13, count, count), mesh)
data = [feed.at(step) for step in range(STEPS)]
feed.close()
asked, read = [], split.read
split.read = lambda examples, epoch: asked.append(examples) or read(examples, epoch)
data.append(gather(split, np.arange(7, 23, dtype=np.int32), mesh, epoch=2))
parts = {name: [np.asarray(batch[name].addressable_shards[0].data) for batch in data] for name in data[0]}
np.savez(f'{out}/{index}', asked=asked[0], **parts)
"""
    words = [str(count), str(image_job.data_dir), str(tmp_path)]
    port = str(free_port())
    running = [
        subprocess.Popen([sys.executable, '-c', code, port, str(i), *words], env=environment(), cwd=ROOT)
        for i in range(count)
    ]
    assert [process.wait(120) for process in running] == [0] * count
    split, each = opened(image_job), 16 // count
    wanted = [*map(batch_of, range(STEPS)), (np.arange(7, 23, dtype=np.int32), 2)]
    for step, (examples, epoch) in enumerate(wanted):
        images, labels = split.read(examples, epoch)
        for i in range(count):
            got, mine = np.load(tmp_path / f'{i}.npz'), slice(each * i, each * (i + 1))
            assert np.array_equal(got['index'][step], examples[mine])
            assert np.array_equal(got['image'][step], images[mine])
            assert np.array_equal(got['label'][step], labels[mine])
            assert got['asked'].tolist() == list(range(7, 23))[mine]


class Counted:
    """The records of a split; notes which are read."""

    def __init__(self, source: Any, read: list[int]):
        self._source, self._read = source, read

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        self._read.append(index)
        return self._source[index]

    def __getitems__(self, indices: Any) -> Any:
        self._read += list(indices)
        return self._source.__getitems__(indices)


def test_a_resume_reads_its_own_batch_and_nothing_else_at_any_step(
    image_job: ImageJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    from parallel_train import stream

    read: list[int] = []
    open_records = stream.open_records
    monkeypatch.setattr(stream, 'open_records', lambda *of: Counted(open_records(*of), read))
    seed = 1  # neither batch holds the corrupt image, in whose stead another would be read
    plain = opened(image_job, seed=seed)
    for step in (0, 1_000_000):
        # The last step of its run, so that no later batch is read ahead.
        config = config_of(num_classes=3, num_epochs=(step + 1) / (TRAIN // 16), seed=seed)
        feed, plan = feeds(image_job, config, 2)
        assert plan.num_steps == step + 1
        examples, epoch = batch_of(step, seed)
        read.clear()
        with contextlib.closing(feed):
            data = feed.at(step)
        assert sorted(read) == sorted(examples.tolist())
        assert np.array_equal(data['image'], plain.read(examples, epoch)[0])


def windows(height: int, width: int, count: int, **view: Any) -> np.ndarray:
    from parallel_train.pixels import View, windows_of

    seen = View(**{'size': 224, 'crop_fraction': 0.875, 'seed': 3, **view})
    return windows_of(seen, np.tile([height, width], (count, 1)), np.arange(count), 5)


def test_random_resized_crops_are_those_of_the_paper() -> None:
    height, width = 375, 500
    top, left, tall, wide = windows(height, width, 2000).T
    assert (top >= 0).all() and (left >= 0).all() and (tall > 0).all() and (wide > 0).all()
    assert (top + tall <= height).all() and (left + wide <= width).all()
    area, ratio = tall * wide / (height * width), wide / tall
    assert 0.078 < area.min() < 0.1 and area.max() > 0.85
    assert 0.74 < ratio.min() < 0.78 and 1.29 < ratio.max() < 1.35
    # The area is uniform where all shapes fit; larger ones are drawn again when they do not.
    small = np.sort(area[area < 0.5])
    assert abs(small.mean() - 0.29) < 0.01
    assert abs(np.log(ratio).mean()) < 0.05
    free = (height - tall) > 50
    assert abs((top[free] / (height - tall[free])).mean() - 0.5) < 0.03


def test_no_crop_fits_a_sliver_and_then_it_is_the_centre() -> None:
    assert windows(10, 1000, 1).tolist() == [[0, 495, 9, 9]]  # 0.875 of 10 pixels, rounded
    assert windows(256, 341, 1, seed=None).tolist() == [[16, 58, 224, 224]]
    assert windows(1, 1, 5).tolist() == [[0, 0, 1, 1]] * 5


def test_a_crop_is_a_function_of_its_own_example_and_epoch_and_never_changes() -> None:
    from parallel_train.pixels import View, windows_of

    view, sides = View(224, 0.875, seed=3), np.array([[375, 500], [500, 375], [333, 500], [375, 500]])
    all_at_once = windows_of(view, sides, np.array([7, 8, 9, 7]), 5)
    each = [windows_of(view, sides[i : i + 1], np.array([n]), 5)[0] for i, n in enumerate((7, 8, 9, 7))]
    assert np.array_equal(all_at_once, each)
    assert np.array_equal(all_at_once[0], all_at_once[3])
    assert not np.array_equal(all_at_once[0], windows_of(view, sides[:1], np.array([7]), 6)[0])
    # Pinned: a checkpoint's run goes on with the crops that it began with.
    assert all_at_once.tolist() == [
        [77, 166, 187, 213],
        [78, 19, 405, 327],
        [0, 206, 242, 230],
        [77, 166, 187, 213],
    ]


def record_of(image: bytes) -> bytes:
    """Returns a record with an image and the label 7, as it is stored."""
    import tensorflow as tf

    features = {
        'image': tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
        'label': tf.train.Feature(int64_list=tf.train.Int64List(value=[7])),
    }
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def test_an_image_whose_header_is_refused_is_corrupt_and_told_why() -> None:
    from PIL.PngImagePlugin import PngInfo

    from parallel_train.pixels import Corrupt, Decoder, View

    text, file = PngInfo(), io.BytesIO()
    text.add_text('comment', 'x' * 2**21, zip=True)  # more than Pillow unpacks
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, 'png', pnginfo=text)
    decoder, record = Decoder(View(4, 1.0), at_once=1), record_of(file.getvalue())
    with pytest.raises(Corrupt):
        decoder([record], np.array([0]), 0)
    label, file_name, reason = decoder.explain(record)
    assert label == 7 and file_name == '' and reason.startswith('ValueError: '), reason


@pytest.mark.parametrize(
    'kind, form, factor',
    [
        ('RGB', 'jpeg', 1),
        ('L', 'jpeg', 1),
        ('CMYK', 'jpeg', 1),
        ('RGB', 'jpeg', 5),
        ('CMYK', 'jpeg', 5),
        ('RGB', 'png', 1),
        ('L', 'png', 1),
    ],
)
def test_pixels_are_those_of_an_independent_decoder(kind: str, form: str, factor: int) -> None:
    """Pillow's decoder and resampling; at 5 times the size, the JPEG is decoded at a quarter of its scale."""
    from parallel_train.pixels import Decoder, View

    smooth = Image.fromarray(picture(1, 40, 48, np.random.default_rng(0))).resize((96 * factor, 80 * factor))
    data = encoded(np.asarray(smooth), kind, form)
    record = record_of(data)
    images, labels = Decoder(View(64, 0.8), at_once=2)([record], np.array([0]), 0)
    assert labels.tolist() == [7]
    with Image.open(io.BytesIO(data)) as image:
        side = 64 * factor
        left, top = 16 * factor, 8 * factor
        box = (left, top, left + side, top + side)
        want = np.asarray(image.convert('RGB').resize((64, 64), Image.Resampling.BOX, box=box), np.float32)
    off = np.abs(images[0].astype(np.float32) - want)
    assert off.mean() < 4 and np.percentile(off, 99) < 24, (off.mean(), off.max())


def test_a_corrupt_image_is_named_and_the_next_one_stands_in(
    image_job: ImageJob, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger('parallel_train').propagate = True
    split = opened(image_job)
    with caplog.at_level('WARNING', logger='parallel_train'):
        images, labels = split.read(all_of(split))
        split.read(all_of(split), epoch=1)
    [line] = [record.getMessage() for record in caplog.records]  # once, however often it is met
    named = (
        r'pictures: train\[\d+\] \(rings/truncated\.jpg\) does not decode, the next one stands in \(.*JPEG'
    )
    assert re.match(named, line)
    example = int(line.partition('[')[2].partition(']')[0])
    assert labels[example] == labels[(example + 1) % TRAIN]
    assert images[example].std() > 10  # no blank
    # Alone, or among others: the same.
    assert np.array_equal(opened(image_job).read(np.array([example]))[0][0], images[example])

    caplog.clear()
    validation = opened(image_job, 'validation', training=False)
    with caplog.at_level('WARNING', logger='parallel_train'):
        images, labels = validation.read(all_of(validation))
    assert '(rings/truncated.jpg) does not decode, it counts as a black image' in caplog.text
    [black] = np.flatnonzero(~images.any(axis=(1, 2, 3)))
    assert CLASSES[labels[black]] == 'rings'  # its own label


def test_too_many_corrupt_images_end_the_run(image_job: ImageJob) -> None:
    split = opened(image_job, max_corrupt_examples=0)
    named = r'train\[\d+\] \(rings/truncated.jpg\): '
    with pytest.raises(UserError, match=f'config.max_corrupt_examples=0: 1 images of pictures .*, {named}'):
        split.read(all_of(split))


def test_many_threads_read_at_once_on_one_core(image_job: ImageJob) -> None:
    """Nothing waits in one of TensorFlow's threads, here a single one, for what needs another."""
    code = (
        'import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n'
        'from concurrent.futures import ThreadPoolExecutor; from pathlib import Path; import numpy as np\n'
        'from tests.test_stream import config_of, open_split\n'
        f'data_dir = Path({str(image_job.data_dir)!r})\n'
        'train, validation = (open_split(config_of(num_classes=3), name, data_dir, name == "train")'
        ' for name in ("train", "validation"))\n'
        'def read(i): return (train, validation)[i % 2].read(np.arange(13, dtype=np.int32), i)[1].sum()\n'
        'with ThreadPoolExecutor(8) as pool: sums = list(pool.map(read, range(64)))\n'
        'assert len(set(sums[::2])) == len(set(sums[1::2])) == 1'
    )
    command = [sys.executable, '-c', code]
    assert subprocess.run(command, cwd=ROOT, env=environment(), timeout=200, check=False).returncode == 0


def test_evaluation_sees_each_example_once(image_job: ImageJob) -> None:
    split = opened(image_job, 'validation', training=False)
    whole, _ = split.read(all_of(split), epoch=9)
    rows, weights = eval_batches(len(split), 8, multiple_of=4)
    seen = np.concatenate([split.read(row)[0] for row in rows])[weights.reshape(-1) > 0]
    assert np.array_equal(seen, whole)


@pytest.mark.parametrize(
    'changes, said',
    [
        ({'image_size': 0}, 'config.random_resized_crop=True: needs config.image_size'),
        ({'input_shape': (64, 64, 3)}, 'contradicts config.image_size=32; set it to (32, 32, 3)'),
        ({'data_placement': 'device'}, "use 'auto' or 'host'"),
        ({'dataset': 'tests.models_for_tests:noise'}, 'is for prepared sets'),
    ],
)
def test_fields_that_do_not_go_together(changes: dict[str, Any], said: str, image_job: ImageJob) -> None:
    with pytest.raises(UserError) as error:
        find_sizes(config_of(**changes), image_job.data_dir)
    assert said in str(error.value)


def test_the_plan_knows_the_sizes_with_and_without_the_set(image_job: ImageJob, tmp_path: Path) -> None:
    sizes = find_sizes(config_of(), image_job.data_dir)
    assert (sizes.num_train_examples, sizes.num_eval_examples) == (TRAIN, 13)
    assert sizes.input_shape == (SIZE, SIZE, 3) and sizes.num_classes == 3
    given = {
        'num_train_examples': 900,
        'num_eval_examples': 9,
        'num_classes': 1000,
        'dataset': 'imagenet2012',
    }
    absent = find_sizes(config_of(**given), tmp_path)
    assert absent.input_shape == (SIZE, SIZE, 3) and absent.num_train_examples == 900


def test_a_slow_loader_shows(
    image_job: ImageJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start_devices(8)
    from parallel_train.stream import StreamedSplit
    from parallel_train.train import train_and_evaluate

    read = StreamedSplit.read

    def late(*args: Any) -> Any:
        time.sleep(0.8)  # in each of the feed's four threads: a fifth of a second a step
        return read(*args)

    monkeypatch.setattr(StreamedSplit, 'read', late)
    # Nothing but steps until the end, so that the loader cannot catch up.
    at_end = {'eval_every_epochs': 0.0, 'checkpoint_every_epochs': 0.0}
    config = config_of(model='tests.models_for_tests:Linear', log_every_steps=4, **at_end)
    train_and_evaluate(config, tmp_path / 'run', image_job.data_dir, devices=2)
    rows = [row for row in read_rows(tmp_path / 'run') if row['split'] == 'train']
    fractions = [row['data_wait_fraction'] for row in rows[1:]]  # the first four batches come at once
    assert len(fractions) == 2 and min(fractions) > 0.5, fractions
    waited = re.search(r'data wait ([\d.]+) s', capsys.readouterr().out)
    assert waited and float(waited[1]) > 1.6


@pytest.mark.slow
def test_it_trains_by_the_command_line_and_resumes_as_if_never_stopped(
    image_job: ImageJob, tmp_path: Path
) -> None:
    done = run_ok(*image_job.train(tmp_path / 'a'), env=image_job.env)
    assert 'does not decode' in done.stdout
    rows = read_rows(tmp_path / 'a')
    last = [row for row in rows if row['split'] == 'eval'][-1]
    assert last['num_examples'] == 13 and last['accuracy'] > 0.6
    assert all(0 <= row['data_wait_fraction'] <= 1 for row in rows if row['split'] == 'train')
    steps = checkpoint_steps(tmp_path / 'a')
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    for step in steps[1:]:
        shutil.rmtree(tmp_path / 'b' / 'checkpoints' / str(step))
    (tmp_path / 'b' / 'report.html').unlink()
    resumed = run_ok(*image_job.train(tmp_path / 'b'), env=image_job.env)
    assert f'resuming from step {steps[0]}' in resumed.stdout
    assert without_timing(read_rows(tmp_path / 'b')) == without_timing(rows)
    one, other = (restore(tmp_path / name, steps[-1]) for name in 'ab')
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_tree_gives_the_same_bits_on_1_and_4_devices_and_in_2_processes(
    image_job: ImageJob, tmp_path: Path
) -> None:
    tree = ('--config.reduction=tree', '--config.num_epochs=1')
    sums = []
    for name, devices in (('one', 1), ('four', 4)):
        done = run_ok(*image_job.train(tmp_path / name, *tree, devices=devices), env=image_job.env)
        sums.append(done.stdout.partition('sha256 of the parameters: ')[2].split()[0])
    job = image_job.train(tmp_path / 'two', *tree, devices=4)
    local = [sys.executable, str(ROOT / 'launch/local.py'), '--processes=2', '--devices_per_process=2', '--']
    line = [word for word in job if not word.startswith('--devices')]
    done = subprocess.run(
        [*local, *line], env=image_job.env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    sums.append(done.stdout.partition('sha256 of the parameters: ')[2].split()[0])
    assert len(set(sums)) == 1, sums
    rows = [without_timing(read_rows(tmp_path / name)) for name in ('one', 'four', 'two')]
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.slow
def test_a_run_on_too_many_corrupt_images_ends_with_code_2(image_job: ImageJob, tmp_path: Path) -> None:
    line = image_job.train(tmp_path / 'run', '--config.max_corrupt_examples=0')
    result = run_cli(*line, env=image_job.env)
    assert result.code == 2 and 'error: config.max_corrupt_examples=0' in result.stderr, result.stderr
    assert 'Traceback' not in result.stderr


def test_without_images_of_several_sizes_tensorflow_is_not_imported(image_job: ImageJob) -> None:
    """Opening a streamed split, counting and digesting it needs none either."""
    code = (
        'import sys; from pathlib import Path; from tests.test_stream import config_of, open_split\n'
        f'split = open_split(config_of(num_classes=3), "train", Path({str(image_job.data_dir)!r}), True)\n'
        'split.digest(); print(len(split)); sys.exit("tensorflow" in sys.modules)'
    )
    command = [sys.executable, '-c', code]
    assert subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode == 0


def test_a_set_that_is_prepared_twice_is_the_same() -> None:
    """Protocol buffers write a map in any order, on another host in another: the features of a record."""
    from tensorflow_datasets.proto import tf_example_pb2

    image, label, other = (tf_example_pb2.Example() for _ in range(3))
    image.features.feature['image'].bytes_list.value.append(b'pixels')
    label.features.feature['label'].int64_list.value.append(1)
    other.features.feature['label'].int64_list.value.append(2)
    first, second, third = (part.SerializeToString() for part in (image, label, other))  # joined, they merge
    assert first + second != second + first
    assert _canonical(first + second) == _canonical(second + first) != _canonical(first + third)
    assert _canonical(b'no record') == b'no record'
