"""Upsampling x skips x loss on the synthetic dataset, three seeds each.

python -m dense_jax.sweep --config=experiments/ablation.py --workdir=runs/ablation
"""

from dense_jax import sweep
from experiments import base


def get_config():
    """A single run of it is `base`."""
    return base.get_config()


def get_sweep():
    """36 runs."""
    return sweep.grid(
        **{
            "model.upsampling": ["bilinear", "transposed_conv"],
            "model.skips": [(), (4,), (4, 2, 1)],
            "loss": ["cross_entropy", "soft_dice"],
            "seed": [0, 1, 2],
        }
    )
