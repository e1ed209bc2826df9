"""Image files for tests: pictures of several sizes and kinds whose class can be seen."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ('checks', 'rings', 'stripes')
SIZES = ((48, 64), (64, 48), (40, 40), (120, 90))


def picture(label: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a picture of a class, uint8 [height, width, 3], in a colour and with a phase of its own."""
    y, x = np.mgrid[:height, :width] / 8.0
    phase = rng.uniform(0, 2 * np.pi)
    wave = (
        np.sign(np.sin(x + phase) * np.sin(y + phase)),
        np.sin(2 * np.hypot(x - width / 16, y - height / 16) + phase),
        np.sin(2 * y + phase),
    )[label]
    colour = np.array([(1.0, 0.4, 0.4), (0.4, 1.0, 0.4), (0.4, 0.4, 1.0)][label])
    grey = 128 + 90 * wave[:, :, None] * colour + rng.normal(0, 8, (height, width, 3))
    return np.clip(grey, 0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = 'RGB', form: str = 'jpeg') -> bytes:
    """Returns a file with these pixels; `kind` is one of Pillow's modes: RGB, L, CMYK."""
    file = io.BytesIO()
    Image.fromarray(pixels).convert(kind).save(file, form, **({'quality': 90} if form == 'jpeg' else {}))
    return file.getvalue()


def write_folder(root: Path, train: int, val: int, corrupt: bool = True) -> Path:
    """Writes `train` and `val` pictures of each class under `root`; one in eight is grey, one in eight CMYK.

    With `corrupt`, there is one more in `train` and in `val` that ends after its first few pixels.
    """
    rng = np.random.default_rng(0)
    for split, count in (('train', train), ('val', val)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                kind = {3: 'L', 7: 'CMYK'}.get(i % 8, 'RGB')
                pixels = picture(label, *SIZES[i % len(SIZES)], rng)
                form = 'png' if i == 4 else 'jpeg'  # whatever the name says, as in ImageNet
                (root / split / name / f'{i:03}.jpg').write_bytes(encoded(pixels, kind, form))
        if corrupt:
            whole = encoded(picture(1, 64, 64, rng))
            head = whole.rindex(b'\xff\xda') + 14  # where the pixels begin
            (root / split / 'rings' / 'truncated.jpg').write_bytes(whole[: head + 40])
    return root
