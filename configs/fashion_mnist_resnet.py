"""A small ResNet on Fashion-MNIST: BatchNorm by shard, augmentation on the device.

Command:  python -m parallel_train train --config=configs/fashion_mnist_resnet.py --workdir=runs/resnet
Hardware: 2 CPU cores, 4 XLA devices: 18.6 minutes of stepping at 860 images/s (the machine was not idle).
Result:   test accuracy 0.9450 after the last step, 16 epochs, seed 0 (not chosen by the test split);
          on other CPUs, whose last bits differ, 0.9440: AMD EPYC, family 25, after 17.5 minutes,
          and family 26 after 9.6.
"""

from ml_collections import config_dict

from parallel_train import default_config


def get_config() -> config_dict.ConfigDict:
    config = default_config()
    config.dataset = 'fashion_mnist'
    config.model = 'resnet_small'

    config.batch_size = 128
    config.shards = 4  # BatchNorm over 32 examples on 1, 2 and 4 devices (Goyal et al. 2017: n = 32)
    config.num_epochs = 16.0

    config.schedule = 'cosine'
    config.learning_rate = 0.1
    config.warmup_epochs = 2.0
    config.optimizer = 'sgd'
    config.momentum = 0.9
    config.nesterov = True
    config.weight_decay = 5e-4

    config.random_crop_padding = 1
    config.random_flip = True

    # For planning without the data.
    config.num_train_examples = 60_000
    config.num_eval_examples = 10_000
    config.input_shape = (28, 28, 1)
    config.num_classes = 10
    return config
