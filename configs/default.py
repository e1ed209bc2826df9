"""Every field of a config, with its default. A recipe starts from these and changes what it needs.

A recipe is a Python file with `get_config()`; fields it leaves out have the values below. On the
command line, `--config.KEY=VALUE` changes one field. Epochs may be fractions (`num_epochs=0.5`).
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Returns the defaults: the CNN and the hyperparameters of Flax's learning-rate-schedule guide."""
    config = config_dict.ConfigDict()

    # One integer decides everything random: initialisation, order, dropout, augmentation.
    config.seed = 0

    # What is trained. A name that is not built in is an import path, `my_package.my_module:MyModel`.
    # cnn | resnet_small | resnet18 | resnet50 | wide_resnet_28_10 | vit_s16 | import path of a Linen module
    config.model = 'cnn'
    config.dtype = 'float32'  # of matrix products: float32 | bfloat16; parameters are float32 either way
    config.loss = 'softmax_cross_entropy'  # or the import path of a loss function

    # On what. A TFDS name, or the import path of a function that returns arrays.
    config.dataset = 'fashion_mnist'
    config.train_split = 'train'  # TFDS split, slices too: 'train[:55000]'
    config.eval_split = 'test'

    # Used only where the dataset is not at hand (`plan` and `compile` need no data); 0 or () means:
    # not given. The counts are of the splits as sliced above.
    config.num_train_examples = 0
    config.num_eval_examples = 0
    config.input_shape = ()  # one image: (height, width, channels)
    config.num_classes = 0

    # Images of any size, read and decoded for each step (docs/data.md).
    config.image_size = (
        0  # the model sees squares of so many pixels, RGB; 0: images as they are, all of one size
    )
    config.random_resized_crop = (
        False  # training sees 8% to 100% of the area, of sides 3:4 to 4:3; else the centre
    )
    config.crop_fraction = 0.875  # of the shorter side: the square at the centre that evaluation sees
    config.max_corrupt_examples = 10  # so many images of a split may be undecodable; one more ends the run

    # On the device pixels in [0, 1] become (pixel - mean) / std, one number a channel.
    config.pixel_mean = ()  # (): 0
    config.pixel_std = ()  # (): 1

    # How long, in how large steps.
    config.batch_size = 128  # GLOBAL: examples in one optimizer step, over all devices
    config.eval_batch_size = 1000  # anything positive: the last batch is padded
    config.num_epochs = 10.0
    config.accumulation_steps = 1  # turns in which a device computes its part of one batch
    # The batch is `shards` equal parts. BatchNorm statistics and dropout keys belong to a shard, so with
    # `shards` fixed the result does not depend on the number of devices. 0: devices × accumulation_steps.
    config.shards = 0
    # How gradients are added over the devices: pmean (one all-reduce) | tree (the same bits on any number of
    # devices and processes; needs `shards`, a power of two).
    config.reduction = 'pmean'

    # The rate of each step.
    # cosine | steps (either after a linear warmup) | constant (no warmup)
    config.schedule = 'cosine'
    config.learning_rate = 0.1  # the peak rate
    config.learning_rate_scaling = 'none'  # none | linear | sqrt, in batch_size / reference_batch_size
    config.reference_batch_size = 256
    config.warmup_epochs = 2.0
    config.warmup_learning_rate = 0.0  # where the warmup starts, unscaled
    config.decay_epochs = ()  # steps: after each of these epochs the rate is multiplied by decay_factor
    config.decay_factor = 0.1

    # How an update is made from a gradient.
    config.optimizer = 'sgd'  # sgd | adamw
    config.momentum = 0.9  # sgd: momentum; adamw: beta 1
    config.nesterov = False  # sgd only
    config.weight_decay = 0.0  # of kernels only, not of biases and norm scales
    config.gradient_clip_norm = 0.0  # gradients of a larger norm are scaled down to it; 0: never

    # Augmentation on the device, a function of (seed, epoch, example).
    config.random_crop_padding = 0  # pixels of zeros around the image before a random crop; 0: no crop
    config.random_flip = False  # mirror left to right with probability 1/2

    # When something happens. Evaluation and checkpoint also come after the last step.
    config.log_every_steps = 50
    config.eval_every_epochs = 1.0  # 0: only at the end
    config.checkpoint_every_epochs = 1.0  # 0: only at the end
    config.checkpoint_every_steps = 0  # instead of so many epochs; 0: by epochs
    config.checkpoint_every_minutes = 0.0  # and besides, after so many minutes; 0: not
    config.keep_checkpoints = 3  # the latest so many, and the best on the eval split

    # How it runs on the hardware; the result is the same.
    config.data_placement = 'auto'  # auto | device (whole dataset on each device) | host (fed each step)
    config.steps_per_dispatch = 1  # steps in one program on GPUs and TPUs; CPUs always take 1
    config.divergence_check_steps = 500  # compares the devices' copies of the state; 0: only when saving
    return config
