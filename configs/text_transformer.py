"""A small decoder-only transformer on the bytes of text files: an example that reproduces no publication.

Command:  python -m parallel_train train --config=configs/text_transformer.py --workdir=runs/t --data_dir=DIR
          DIR: any folder of text files; here the sources of Python's unittest,
          $(python -c 'import unittest; print(unittest.__path__[0])')
Hardware: any number of devices that divides 64.
Result:   not measured yet.
"""

from ml_collections import config_dict

from parallel_train import default_config


def get_config() -> config_dict.ConfigDict:
    config = default_config()
    config.dataset = 'parallel_train.text:folder'  # rows of 128 bytes; one file in ten is for evaluation
    config.train_split = 'train'
    config.eval_split = 'test'
    config.model = 'transformer_small'
    config.loss = 'next_byte_cross_entropy'

    config.batch_size = 64
    config.eval_batch_size = 256
    config.num_epochs = 10.0

    config.schedule = 'cosine'
    config.learning_rate = 1e-3
    config.warmup_epochs = 1.0
    config.optimizer = 'adamw'
    config.momentum = 0.9
    config.weight_decay = 0.1
    config.gradient_clip_norm = 1.0

    # For planning without the data.
    config.num_train_examples = 6_521
    config.num_eval_examples = 581
    config.input_shape = (128,)
    config.num_classes = 256
    return config
