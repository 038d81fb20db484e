"""U-Net trained on soft Dice, on the synthetic dataset.

python -m dense_jax.main --config=experiments/unet_dice.py --workdir=runs/unet_dice
Expect: mean IoU 0.95 on val after 300 steps, 2 minutes on 2 CPU cores.
"""

from dense_jax.experiments import base


def get_config():
    """Differs from `unet_ce` in the loss alone."""
    config = base.get_config()
    config.loss = "soft_dice"
    return config
