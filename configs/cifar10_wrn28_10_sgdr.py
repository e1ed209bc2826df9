"""WRN-28-10 on CIFAR-10, warm restarts (SGDR, Loshchilov & Hutter 2017).

Command:  python -m parallel_train train --config=configs/cifar10_wrn28_10_sgdr.py --workdir=runs/wrn
Hardware: an accelerator; 1, 2, 4 or 8 devices.
Result:   not trained here; the paper reports a test error of 4.03% (table 1,
          T_0 = 10, T_mult = 2, median of 5 runs), at epoch 150, where a cycle ends; restarts go on there to
          epoch 200. `evaluate --ensemble` averages the snapshots at the cycles' ends (its section 4.3).
          Crops and BatchNorm: see cifar10_wrn28_10.py.
"""

from pathlib import Path

from ml_collections import config_dict

from parallel_train.config import default_config, load


def get_config() -> config_dict.ConfigDict:
    config = load(Path(__file__).with_name('cifar10_wrn28_10.py'))
    config.num_epochs = 150.0
    config.schedule = 'cosine_restarts'
    config.learning_rate = 0.05
    config.restart_epochs = 10.0  # T_0: cycles end after epochs 10, 30, 70 and 150
    config.restart_multiplier = 2.0  # T_mult
    config.decay_epochs, config.decay_factor = (), default_config().decay_factor  # of the rate in steps
    return config
