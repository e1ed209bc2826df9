"""ViT-S/16 on ImageNet for 90 epochs (Beyer et al. 2022): model, augmentation, optimizer and schedule.

Command:  python -m parallel_train prepare --config=configs/imagenet_vit_s16.py --from=DIR
          python -m parallel_train train --config=configs/imagenet_vit_s16.py --workdir=runs/vit
Plan:     python -m parallel_train plan --config=configs/imagenet_vit_s16.py --devices=64
Compile:  python -m parallel_train compile --config=configs/imagenet_vit_s16.py --topology=v5e:8x8
Hardware: any number of devices that divides 64; docs/foresight.md says what fits.
Result:   not trained here, where there is no ImageNet; the paper reports a top-1 accuracy of 76.5%.
          Otherwise than there (big_vision's vit_s16_i1k.py): all of train is trained on, not 99% of it; no
          representation layer in the head; partners of mixup are of one shard of 16, not of one device.
Data:     DIR holds train/CLASS/FILE and val/CLASS/FILE; docs/data.md
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
    config.shards = 64  # 16 examples, among which mixup finds partners, on any number of devices
    config.num_epochs = 90.0

    config.schedule = 'cosine'
    config.learning_rate = 1e-3
    config.warmup_epochs = 10_000 / 1_251  # 10,000 steps, of 1,251 an epoch

    config.optimizer = 'adamw'
    config.momentum = 0.9
    config.weight_decay = 0.1  # times the rate; the paper's 1e-4 is that product at the peak rate
    config.gradient_clip_norm = 1.0
    config.image_size = 224
    config.random_resized_crop = True
    config.random_flip = True
    config.randaugment_layers = 2
    config.randaugment_magnitude = 10.0
    config.mixup_alpha = 0.2
    config.pixel_mean = (0.5,)
    config.pixel_std = (0.5,)

    # For planning without the data.
    config.num_train_examples = 1_281_167
    config.num_eval_examples = 50_000
    config.input_shape = (224, 224, 3)
    config.num_classes = 1000
    return config
