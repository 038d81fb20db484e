"""Compares all upsampling methods, with and without skips, with three seeds each (60 runs).

python -m dense_jax.sweep --config=experiments/ablation_upsampling.py --workdir=runs/upsampling

For other sizes and datasets, see `ablation`.
"""

from dense_jax import sweep
from dense_jax.experiments.ablation import SEEDS, get_config

__all__ = ["get_config", "get_sweep"]

METHODS = (
    *("nearest", "bilinear", "bicubic", "bed_of_nails", "max_unpool"),
    *("transposed_conv", "pixel_shuffle", "resize_conv", "carafe", "dysample"),
)


def get_sweep():
    """Returns the runs. Without skips, only the upsampling can localize objects."""
    return sweep.grid(
        **{"seed": SEEDS, "model.upsampling": METHODS, "model.skips": [(4, 2, 1), ()]}
    )
