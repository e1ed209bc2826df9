"""WRN-28-10 on CIFAR-100, warm restarts (SGDR, Loshchilov & Hutter 2017).

Command:  python -m parallel_train train --config=configs/cifar100_wrn28_10_sgdr.py --workdir=runs/wrn
Hardware: an accelerator; 1, 2, 4 or 8 devices.
Result:   not trained here; the paper reports a test error of 19.58% (table 1,
          T_0 = 10, T_mult = 2, median of 5 runs), at epoch 150, where a cycle ends; restarts go on there to
          epoch 200. `evaluate --ensemble` averages the snapshots at the cycles' ends (its section 4.3).
          Crops and BatchNorm: see cifar100_wrn28_10.py.
"""

from pathlib import Path

from ml_collections import config_dict

from parallel_train.config import load


def get_config() -> config_dict.ConfigDict:
    config = load(Path(__file__).with_name('cifar10_wrn28_10_sgdr.py'))
    config.dataset = 'cifar100'
    config.num_classes = 100
    return config
