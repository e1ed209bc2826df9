"""WRN-28-10 on CIFAR-10, the rate in steps (Zagoruyko & Komodakis 2016).

Command:  python -m parallel_train train --config=configs/cifar10_wrn28_10.py --workdir=runs/wrn
Hardware: an accelerator; 1, 2, 4 or 8 devices.
Result:   not trained here; the paper reports a test error of 4.00% (without dropout, median of 5 runs).
          Otherwise than there: crops bring black in where theirs mirror the edge, and BatchNorm is over 16
          examples (--config.shards=1 on one device: over all 128).
"""

from ml_collections import config_dict

from parallel_train import default_config


def get_config() -> config_dict.ConfigDict:
    config = default_config()
    config.dataset = 'cifar10'
    config.model = 'wide_resnet_28_10'

    config.batch_size = 128
    config.shards = 8  # BatchNorm over 16 examples on 1, 2, 4 and 8 devices
    config.num_epochs = 200.0

    config.schedule = 'steps'
    config.learning_rate = 0.1
    config.decay_epochs = (60.0, 120.0, 160.0)
    config.decay_factor = 0.2
    config.warmup_epochs = 0.0
    config.optimizer = 'sgd'
    config.momentum = 0.9
    config.nesterov = True
    config.weight_decay = 5e-4
    config.decay_norm_and_bias = True  # the paper's code decays every parameter

    config.random_crop_padding = 4
    config.random_flip = True
    config.pixel_mean = (0.491, 0.482, 0.447)  # of CIFAR's train images
    config.pixel_std = (0.247, 0.244, 0.262)

    # For planning without the data.
    config.num_train_examples = 50_000
    config.num_eval_examples = 10_000
    config.input_shape = (32, 32, 3)
    config.num_classes = 10
    return config
