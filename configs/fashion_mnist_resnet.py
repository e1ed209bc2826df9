from parallel_train.config import default_config


def get_config():
    config = default_config()
    config.model = 'resnet_small'
    config.batch_size = 256
    config.shards = 8
    config.learning_rate = 0.2
    config.warmup_epochs = 2.0
    config.num_epochs = 14.0
    config.nesterov = True
    config.weight_decay = 5e-4
    config.random_crop_padding = 2
    config.random_flip = True
    return config
