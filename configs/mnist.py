"""The recipe of Flax's guides: their CNN on MNIST, SGD with momentum, linear warmup, then cosine.

Command:  python -m parallel_train prepare --config=configs/mnist.py   (--from=DIR for IDX files)
          python -m parallel_train train --config=configs/mnist.py --workdir=runs/mnist
Hardware: any; a CPU with 2 cores takes a few minutes.
Result:   not run here, where MNIST cannot be downloaded; Flax reports about 0.99 test accuracy for
          this CNN. `schedule='constant'` gives the guide's other column.
"""

from ml_collections import config_dict

from parallel_train import default_config


def get_config() -> config_dict.ConfigDict:
    config = default_config()
    config.dataset = 'mnist'
    config.model = 'cnn'

    config.batch_size = 128
    config.shards = 8  # the same result on 1, 2, 4 and 8 devices
    config.num_epochs = 10.0

    config.schedule = 'cosine'
    config.learning_rate = 0.1
    config.warmup_epochs = 2.0
    config.optimizer = 'sgd'
    config.momentum = 0.9

    # For planning without the data.
    config.num_train_examples = 60_000
    config.num_eval_examples = 10_000
    config.input_shape = (28, 28, 1)
    config.num_classes = 10
    return config
