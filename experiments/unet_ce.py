"""Trains a U-Net on cross-entropy, on the synthetic dataset.

python -m dense_jax.main --config=experiments/unet_ce.py --workdir=runs/unet_ce
"""

from dense_jax.experiments import base


def get_config():
    """Returns the unchanged `base` config. `unet_dice` differs only in the loss."""
    return base.get_config()
