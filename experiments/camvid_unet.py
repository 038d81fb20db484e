"""Trains a U-Net on CamVid, with 11 classes, on cross-entropy + soft Dice.

python -m dense_jax.main --config=experiments/camvid_unet.py --config.data.root=CAMVID \
    --workdir=runs/camvid_unet

The default size reaches a mean IoU of 0.41 on test (0.45 on val) after 1200 steps, which take 20
minutes on 2 CPU cores. `--config=experiments/camvid_unet.py:full` is for an accelerator and has not
been run yet.
"""

from dense_jax.experiments import base


def get_config(size: str = "reduced"):
    """Returns the config. size: "reduced" (for two CPU cores) or "full"."""
    if size not in ("reduced", "full"):
        raise ValueError(f"the size {size!r} must be reduced or full")
    config = base.get_config()
    config.num_steps = 20_000
    config.loss = "dice_ce"
    config.model.widths = (32, 64, 128, 256, 512)
    config.data.name = "camvid"
    config.data.crop_size = (352, 480)
    config.data.cache = "host"
    config.augment.scale = 0.5
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 500
    config.optimizer.weight_decay = 1e-2
    config.update(eval_every=1000, checkpoint_every=1000, log_every=50)
    if size == "reduced":
        config.num_steps = 1200
        config.batch_size = 4
        config.model.widths = (16, 32, 64, 128, 128)
        config.data.resolution = 0.5
        config.data.crop_size = (160, 208)
        config.optimizer.learning_rate = 5e-3
        config.optimizer.warmup_steps = 50
        config.update(eval_every=200, checkpoint_every=200)
    return config
