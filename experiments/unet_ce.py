"""U-Net trained on cross-entropy, on the synthetic dataset.

python -m dense_jax.main --config=experiments/unet_ce.py --workdir=runs/unet_ce
"""

from experiments import base


def get_config():
    """`base` is this experiment; `unet_dice` differs from it in the loss alone."""
    return base.get_config()
