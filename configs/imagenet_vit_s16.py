"""ViT-S/16 on ImageNet for 90 epochs (Beyer et al. 2022): model, optimizer and schedule.

Plan:     python -m parallel_train plan --config=configs/imagenet_vit_s16.py --devices=64
Compile:  python -m parallel_train compile --config=configs/imagenet_vit_s16.py --topology=v5e:8x8
Hardware: any number of devices that divides 1,024; docs/foresight.md says what fits.
Result:   not trained here, where there is no ImageNet; the paper reports more than 76% top-1 accuracy.
          Its RandAugment and mixup are not part of this recipe yet.
Data:     docs/data.md
"""

from ml_collections import config_dict

from parallel_train import default_config


def get_config() -> config_dict.ConfigDict:
    config = default_config()
    config.dataset = 'imagenet2012'
    config.train_split = 'train'
    config.eval_split = 'validation'
    config.model = 'vit_s16'  # sin-cos positions, average over places, one dense layer as the head
    config.dtype = 'bfloat16'

    config.batch_size = 1024
    config.eval_batch_size = 1000
    config.num_epochs = 90.0

    config.schedule = 'cosine'
    config.learning_rate = 1e-3
    config.warmup_epochs = 8.0  # the paper's 10,000 steps are 7.99 epochs

    config.optimizer = 'adamw'
    config.momentum = 0.9
    config.weight_decay = 0.1  # times the rate; the paper's 1e-4 is that product at the peak rate
    config.gradient_clip_norm = 1.0
    config.image_size = 224
    config.random_resized_crop = True
    config.random_flip = True
    config.pixel_mean = (0.5,)
    config.pixel_std = (0.5,)

    # For planning without the data.
    config.num_train_examples = 1_281_167
    config.num_eval_examples = 50_000
    config.input_shape = (224, 224, 3)
    config.num_classes = 1000
    return config
