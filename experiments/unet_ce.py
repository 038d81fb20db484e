"""U-Net trained on cross-entropy, on the synthetic dataset.

python -m dense_jax.main --config=experiments/unet_ce.py --workdir=runs/unet_ce
"""

from dense_jax.experiments import base


def get_config():
    """Returns `base` as it is. `unet_dice` differs in the loss alone."""
    return base.get_config()
