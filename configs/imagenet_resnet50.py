"""ResNet-50 on ImageNet in batches of 8,192 (Goyal et al. 2017): model, optimizer and schedule.

Command:  python -m parallel_train prepare --config=configs/imagenet_resnet50.py --from=DIR
          python -m parallel_train train --config=configs/imagenet_resnet50.py --workdir=runs/resnet50
Plan:     python -m parallel_train plan --config=configs/imagenet_resnet50.py --devices=256
Compile:  python -m parallel_train compile --config=configs/imagenet_resnet50.py --topology=v5e:16x16
Hardware: any number of devices that divides 256; docs/foresight.md says what fits.
Result:   not trained here, where there is no ImageNet; the paper reports a top-1 error of 23.74 ± 0.09%.
Data:     DIR holds train/CLASS/FILE and val/CLASS/FILE; docs/data.md
"""

from ml_collections import config_dict

from parallel_train import default_config


def get_config() -> config_dict.ConfigDict:
    config = default_config()
    config.dataset = 'imagenet2012'
    config.train_split = 'train'
    config.eval_split = 'validation'
    config.model = 'resnet50'  # the last BatchNorm scale of a block starts at 0 (section 5.1)
    config.dtype = 'bfloat16'  # of products and activations; the paper's are float32

    config.batch_size = 8192
    config.eval_batch_size = 2048
    # BatchNorm over n = 32 examples (section 3.1), on any number of devices: shards = batch_size / 32.
    config.shards = 256
    config.num_epochs = 90.0

    config.schedule = 'steps'
    config.learning_rate = 0.1
    config.learning_rate_scaling = 'linear'
    config.reference_batch_size = 256
    config.warmup_epochs = 5.0
    config.warmup_learning_rate = 0.1  # from the reference rate, not from 0 (section 2.2)
    config.decay_epochs = (30.0, 60.0, 80.0)
    config.decay_factor = 0.1

    config.optimizer = 'sgd'
    config.momentum = 0.9
    config.nesterov = True
    config.weight_decay = 1e-4
    config.image_size = 224
    config.random_resized_crop = True  # as its reference code crops; evaluation: the centre of 256 pixels
    config.random_flip = True
    config.pixel_mean = (0.485, 0.456, 0.406)
    config.pixel_std = (0.229, 0.224, 0.225)

    # For planning without the data.
    config.num_train_examples = 1_281_167
    config.num_eval_examples = 50_000
    config.input_shape = (224, 224, 3)
    config.num_classes = 1000
    return config
