"""Draws docs/augmentation.png: what each augmentation makes of the first test images of Fashion-MNIST.

python docs/draw_augmentation.py --data_dir=DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from parallel_train import augment, default_config, mix, randaugment
from parallel_train.dataset import default_data_dir, load_split

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

COLUMNS = 14


def rows(images: np.ndarray) -> dict[str, np.ndarray]:
    """Returns pictures [COLUMNS, height, width] by what was done."""
    same = jnp.asarray(np.repeat(images[:1], COLUMNS, axis=0))
    keys = jax.random.split(jax.random.key(1), COLUMNS)
    config = default_config()

    def mixed(**fields: float) -> np.ndarray:
        config.update({'mixup_alpha': 0.0, 'cutmix_alpha': 0.0, **fields})
        own = augment.normalise(jnp.asarray(images))
        pairs = {
            'image': jnp.stack([own, jnp.broadcast_to(own[0], own.shape)], axis=1),
            'label': jnp.tile(jnp.arange(2), (COLUMNS, 1)),
        }
        result = np.asarray(own)
        for key in keys[:6]:  # until all pairs have changed places
            some = mix.mix_shards(pairs, jax.random.split(key, COLUMNS), config)
            swapped = np.asarray(some['mixed_label'])[:, 0] == 1
            result = np.where(swapped[:, None, None, None], some['image'][:, 0], result)
        return result * 255

    operations = [
        randaugment.apply(same[0], jnp.int32(number), jnp.float32(-1), 9.0)
        for number in range(len(randaugment.OPERATIONS))
    ]
    return {
        'test images': images,
        'crop (padding 4) and flip': augment.random_crop_and_flip(same, keys, 4, True),
        'cutout (12)': augment.cutout(same, keys, 12),
        'random erasing (p = 0.7)': augment.random_erasing(same, keys, 0.7),
        "RandAugment's operations (M = 9, sign -)": np.stack(operations),
        'RandAugment (N = 2, M = 9)': randaugment.rand_augment(same, keys, 2, 9.0),
        'mixup (α = 1), with the first': mixed(mixup_alpha=1.0),
        'CutMix (α = 1), with the first': mixed(cutmix_alpha=1.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--data_dir')
    split = load_split('fashion_mnist', 'test', default_data_dir(parser.parse_args().data_dir))
    pictures = rows(np.asarray(split.images[:COLUMNS]))
    figure, axes = plt.subplots(len(pictures), 1, figsize=(11, 8.4), layout='constrained')
    for ax, (name, images) in zip(axes, pictures.items(), strict=True):
        framed = np.pad(np.asarray(images)[..., 0], ((0, 0), (0, 0), (1, 1)), constant_values=255)
        ax.imshow(np.hstack(framed), cmap='gray', vmin=0, vmax=255)
        ax.set_title(name, loc='left', fontsize=10)
        ax.axis('off')
    for i, name in enumerate(randaugment.OPERATIONS):
        axes[4].text(30 * i + 14.5, 34, name, ha='center', fontsize=8)
    figure.savefig(Path(__file__).with_name('augmentation.png'), dpi=80)


if __name__ == '__main__':
    main()
