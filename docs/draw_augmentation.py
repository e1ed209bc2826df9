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

    def mixed(seed: int, **fields: float) -> np.ndarray:
        config.update({'mixup_alpha': 0.0, 'cutmix_alpha': 0.0, **fields})
        batch = {'image': augment.normalise(jnp.asarray(images))[:, None].repeat(2, axis=1)}
        batch['image'] = batch['image'].at[:, 1].set(batch['image'][0, 0])
        batch['label'] = jnp.zeros((COLUMNS, 2), jnp.int32)
        # Only shards whose two examples change places, so that each picture shows a mix.
        return np.asarray(
            mix.mix_shards(batch, jax.random.split(jax.random.key(seed), COLUMNS), config)['image'][:, 0]
            * 255
        )

    each = [(number, 1.0) for number in range(len(randaugment.OPERATIONS))]
    operations = [randaugment.apply(same[0], jnp.int32(number), sign, 9.0) for number, sign in each]
    return {
        'test images': images,
        'crop (padding 4) and flip': augment.random_crop_and_flip(same, keys, 4, True),
        'cutout (12)': augment.cutout(same, keys, 12),
        'random erasing (p = 0.7)': augment.random_erasing(same, keys, 0.7),
        "RandAugment's operations (M = 9)": np.stack(operations),
        'RandAugment (N = 2, M = 9)': randaugment.rand_augment(same, keys, 2, 9.0),
        'mixup (α = 1), with the first': mixed(2, mixup_alpha=1.0),
        'CutMix (α = 1), with the first': mixed(3, cutmix_alpha=1.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--data_dir')
    split = load_split('fashion_mnist', 'test', default_data_dir(parser.parse_args().data_dir))
    pictures = rows(np.asarray(split.images[:COLUMNS]))
    figure, axes = plt.subplots(len(pictures), COLUMNS, figsize=(COLUMNS, 1.32 * len(pictures)))
    for line, (name, images) in zip(axes, pictures.items(), strict=True):
        line[0].set_title(name, loc='left', fontsize=11)
        for ax, image in zip(line, np.asarray(images), strict=True):
            ax.imshow(image[:, :, 0], cmap='gray', vmin=0, vmax=255)
            ax.axis('off')
    for ax, name in zip(axes[4], randaugment.OPERATIONS, strict=True):
        ax.text(14, 33, name, ha='center', fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.savefig(Path(__file__).with_name('augmentation.png'), dpi=70)


if __name__ == '__main__':
    main()
