"""WRN-28-10 on CIFAR-100, the rate in steps (Zagoruyko & Komodakis 2016).

Command:  python -m parallel_train train --config=configs/cifar100_wrn28_10.py --workdir=runs/wrn
Hardware: an accelerator; 1, 2, 4 or 8 devices.
Result:   not trained here; the paper reports a test error of 19.25% (without dropout, median of 5 runs).
          Otherwise than there: crops bring black in where theirs mirror the edge, and BatchNorm is over 16
          examples (--config.shards=1 on one device: over all 128).
"""

from pathlib import Path

from ml_collections import config_dict

from parallel_train.config import load


def get_config() -> config_dict.ConfigDict:
    config = load(Path(__file__).with_name('cifar10_wrn28_10.py'))
    config.dataset = 'cifar100'
    config.num_classes = 100
    return config
