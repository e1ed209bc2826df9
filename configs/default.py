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
    # cnn | fast_net | resnet_small | resnet18 | resnet34 | resnet50 | resnet101 | wide_resnet_16_2 |
    # wide_resnet_28_10 | wide_resnet_40_4 | vit_ti16 | vit_s16 | vit_b16 | transformer_small | import path of
    # a Linen module
    config.model = 'cnn'
    config.dtype = 'float32'  # of matrix products: float32 | bfloat16; parameters are float32 either way
    config.remat = False  # the backward pass computes each block's activations again: less memory
    # Over what BatchNorm takes statistics in training: shard | global (the whole batch, as SyncBN does).
    config.batch_norm = 'shard'
    # softmax_cross_entropy | next_byte_cross_entropy (rows of bytes) | import path of a loss function
    config.loss = 'softmax_cross_entropy'
    config.label_smoothing = 0.0  # this part of each label goes to all classes alike, in training alone

    # On what. A TFDS name, or the import path of a function that returns arrays.
    config.dataset = 'fashion_mnist'
    config.train_split = 'train'  # TFDS split, slices too: 'train[:55000]'
    config.eval_split = 'test'

    # Used only where the dataset is not at hand (`plan` and `compile` need no data); 0 or () means:
    # not given. The counts are of the splits as sliced above.
    config.num_train_examples = 0
    config.num_eval_examples = 0
    config.input_shape = ()  # one image: (height, width, channels); one row of tokens: (length,)
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
    config.gradient_dtype = (
        'float32'  # that gradients travel in between devices: float32 | bfloat16 (half the bytes)
    )

    # The rate of each step: docs/schedules.md draws them all. Rates at the ends are not scaled.
    # After a linear warmup: cosine | cosine_restarts (SGDR) | linear | polynomial | steps | rsqrt (with a
    # cooldown) | warmup_stable_decay | one_cycle (down again as in the warmup, then on); without: constant
    config.schedule = 'cosine'
    config.learning_rate = 0.1  # the peak rate
    config.learning_rate_scaling = 'none'  # none | linear | sqrt, in batch_size / reference_batch_size
    config.reference_batch_size = 256
    config.warmup_epochs = 2.0
    config.warmup_learning_rate = 0.0  # where the warmup starts
    config.end_learning_rate = 0.0  # where the decay ends; not of steps and constant
    config.decay_epochs = ()  # steps: after each of these epochs the rate is multiplied by decay_factor
    config.decay_factor = 0.1
    config.decay_power = 2.0  # polynomial: (1 - t) to this power
    # cosine_restarts: the first cycle's length (T_0); each next one is restart_multiplier (T_mult) times as
    # long. At the end of each the run is evaluated, and saved as a snapshot that is kept.
    config.restart_epochs = 0.0
    config.restart_multiplier = 1.0
    config.timescale_epochs = 0.0  # rsqrt: peak / √(1 + epochs since the warmup / this); 0: warmup_epochs
    config.cooldown_epochs = 0.0  # rsqrt, warmup_stable_decay: the last epochs, in which it falls linearly

    # How an update is made from a gradient (optimizers.py has the formulas and their sources).
    config.optimizer = 'sgd'  # sgd | adamw | lars | lamb | lion | muon (not with reduction tree)
    config.momentum = 0.9  # sgd, lars, muon: momentum (0.95 is usual for muon); adamw, lamb, lion: beta 1
    config.nesterov = False  # sgd and lars; muon always does
    config.beta2 = 0.0  # 0: as published: adamw, lamb, muon (for what is no matrix) 0.999, lion 0.99
    config.epsilon = 0.0  # 0: as published: adamw, muon 1e-8, lamb 1e-6
    config.trust_coefficient = 0.001  # lars
    config.weight_decay = 0.0  # of kernels only, not of biases and norm scales
    config.decay_norm_and_bias = False  # of these too
    config.gradient_clip_norm = 0.0  # gradients of a larger norm are scaled down to it; 0: never
    # A moving average of parameters and batch statistics, of this decay a step (less in the first ones). Then
    # evaluations and `load_model` use it; checkpoints hold both. 0: none.
    config.ema_decay = 0.0

    # Augmentation on the device, a function of (seed, epoch, example).
    config.random_crop_padding = 0  # pixels of zeros around the image before a random crop; 0: no crop
    config.random_flip = False  # mirror left to right with probability 1/2
    config.randaugment_layers = 0  # RandAugment's N, operations on each image; 0: none
    config.randaugment_magnitude = 9.0  # its M; 10 is AutoAugment's largest
    config.cutout_size = 0  # side of a square in pixels that gets the image's mean; 0: none
    config.random_erasing = 0.0  # probability that a random box becomes noise
    # Of two examples of one shard, a function of (seed, step, shard); if both are on, either, by chance.
    config.mixup_alpha = 0.0  # shares of a shard's pairs from Beta(α, α); 0: none
    config.cutmix_alpha = 0.0  # likewise, of a box
    config.mix_probability = 1.0  # that a shard is mixed at all

    # When something happens. Evaluation and checkpoint also come after the last step.
    config.log_every_steps = 50
    config.eval_every_epochs = 1.0  # 0: only at the end
    config.checkpoint_every_epochs = 1.0  # 0: only at the end
    config.checkpoint_every_steps = 0  # instead of so many epochs; 0: by epochs
    config.checkpoint_every_minutes = 0.0  # and besides, after so many minutes; 0: not
    config.keep_checkpoints = 3  # the latest so many, the best on the eval split, and all snapshots

    # How it runs on the hardware; the result is the same.
    config.data_placement = 'auto'  # auto | device (whole dataset on each device) | host (fed each step)
    config.steps_per_dispatch = 1  # steps in one program on GPUs and TPUs; CPUs always take 1
    config.divergence_check_steps = 500  # compares the devices' copies of the state; 0: only when saving
    return config
