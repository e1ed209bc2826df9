from parallel_train.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 256
    config.shards = 8
    config.learning_rate = 0.2
    config.warmup_epochs = 1.0
    config.num_train_examples = 60_000
    config.num_eval_examples = 10_000
    config.input_shape = (28, 28, 1)
    config.num_classes = 10
    return config
