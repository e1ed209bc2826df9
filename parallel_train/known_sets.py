"""Which datasets does TFDS know by name?"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from parallel_train.config_fields import nearest
from parallel_train.errors import UserError
from parallel_train.prepared import Features, parse_features, parse_name


def is_known(name: str) -> bool:
    """Whether TFDS has code for a dataset of that name."""
    import tensorflow_datasets as tfds

    return parse_name(name)[0] in tfds.list_builders(with_community_datasets=False)


def check_known(name: str) -> None:
    """Raises UserError, which names the nearest, if TFDS knows no dataset of that name."""
    base = parse_name(name)[0]
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    if base not in known:
        hint = nearest(base, known) or ' (see tensorflow.org/datasets/catalog)'
        raise UserError(
            f'dataset={name!r}: is unknown to TFDS{hint}; `prepare --from=DIR` makes a set of a folder of '
            'images'
        )


def tfds_builder(name: str, data_dir: Path) -> tuple[Any, Features]:
    """TFDS's builder of an image-classification set; UserError if the name or the set is none."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # of many kinds, each of which means that the name does not fit
        reason = ' '.join(str(error).split())[:300]
        raise UserError(f'dataset={name!r} is not accepted by TFDS: {reason}') from error
    content = builder.info.features.to_json()['content']
    return builder, parse_features(name, content.get('features', {}))


def stated_sizes(name: str, must_know: bool) -> tuple[dict[str, Any], str]:
    """What TFDS knows without the data: shape and classes, where its code states them; and who says so.

    TFDS no longer publishes split sizes, so no network is asked.
    """
    check_known(name)
    if not must_know:
        return {}, ''
    with tempfile.TemporaryDirectory() as nowhere:  # else TFDS would look into its default data_dir
        _, features = tfds_builder(name, Path(nowhere))
    known: dict[str, Any] = {}
    if None not in features.image_shape:
        known['input_shape'] = features.image_shape
    if features.num_classes:
        known['num_classes'] = features.num_classes
    return known, "TFDS's metadata"
