"""All upsampling methods, with all skips and with none, three seeds each: 42 runs.

python -m dense_jax.sweep --config=experiments/ablation_upsampling.py --workdir=runs/upsampling

Sizes and other datasets are as in `ablation_grid`.
"""

from dense_jax import sweep
from experiments.ablation_grid import SEEDS, get_config

__all__ = ["get_config", "get_sweep"]

METHODS = (
    *("nearest", "bilinear", "bed_of_nails", "max_unpool"),
    *("transposed_conv", "pixel_shuffle", "resize_conv"),
)


def get_sweep():
    """Without skips, what the upsampling cannot place is lost."""
    return sweep.grid(
        **{"seed": SEEDS, "model.upsampling": METHODS, "model.skips": [(4, 2, 1), ()]}
    )
