"""U-Net with a ResNet34 encoder, the usual choice for a new dataset.

python -m dense_jax.main --config=experiments/unet_resnet34.py --config.data.root=ROOT \
    --config.model.pretrained=imagenet --workdir=runs/resnet34

The recipe is not from a single paper. The decoder resembles segmentation_models.pytorch (nearest
upsampling, concatenated skips at strides 2 to 16, two 3x3 convolutions with 256, 128, 64, 32 and 16
channels), but projects features before concatenation. Training uses AdamW with a cosine schedule on
cross-entropy + soft Dice. With few images, try --config.optimizer.encoder_lr_multiplier=0.1 or
--config.model.freeze_encoder. If a few images are much larger than the others, set
data.canvas_size. It keeps a random window of this size from each image, which saves memory.
"""

from dense_jax.experiments import base


def get_config():
    config = base.get_config()
    config.num_steps = 10_000
    config.batch_size = 16
    config.loss = "dice_ce"
    config.model.encoder = "resnet34"
    config.model.upsampling = "nearest"
    config.model.widths = (16, 32, 64, 128, 256)
    config.data.name = "folder"
    config.data.crop_size = (320, 320)
    config.augment.scale = 0.5
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 500
    config.optimizer.weight_decay = 1e-2
    config.update(eval_every=1000, checkpoint_every=1000, log_every=50)
    return config
