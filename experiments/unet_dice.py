"""Trains a U-Net on soft Dice, on the synthetic dataset.

python -m dense_jax.main --config=experiments/unet_dice.py --workdir=runs/unet_dice
Expect: mean IoU 0.95 on val after 300 steps, 2 minutes on 2 CPU cores.
"""

from dense_jax.experiments import base


def get_config():
    """Returns a config that differs from `unet_ce` only in the loss."""
    config = base.get_config()
    config.loss = "soft_dice"
    return config
