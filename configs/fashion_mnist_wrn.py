"""A wide residual network (Zagoruyko & Komodakis 2016) on Fashion-MNIST, for 2 CPU cores and an hour.

Command:  python -m parallel_train train --config=configs/fashion_mnist_wrn.py --workdir=runs/wrn
Hardware: 2 CPU cores, 4 XLA devices: 460 MFLOP an image, an hour at 92 GFLOP/s.
Result:   not run here in full. Meant for a test accuracy of 0.945 and more; the set's README lists 0.959 for
          WRN-28-10 and 0.967 for WRN-40-4, trained far longer on GPUs.
"""

from ml_collections import config_dict

from parallel_train import default_config


def get_config() -> config_dict.ConfigDict:
    config = default_config()
    config.dataset = 'fashion_mnist'
    config.model = 'wide_resnet_16_2'
    config.label_smoothing = 0.1

    config.batch_size = 128
    config.shards = 8  # the same result on 1, 2, 4 and 8 devices
    config.num_epochs = 12.0

    config.schedule = 'linear'
    config.learning_rate = 0.1
    config.warmup_epochs = 1.0
    config.optimizer = 'sgd'
    config.momentum = 0.9
    config.nesterov = True
    config.weight_decay = 5e-4

    config.random_crop_padding = 2
    config.random_flip = True
    config.random_erasing = 0.25

    # For planning without the data.
    config.num_train_examples = 60_000
    config.num_eval_examples = 10_000
    config.input_shape = (28, 28, 1)
    config.num_classes = 10
    return config
