"""Which skips are worth it: none, each alone, and more and more of them; 18 runs.

python -m dense_jax.sweep --config=experiments/ablation_skips.py --workdir=runs/skips

Sizes and other datasets are as in `ablation_grid`.
"""

from dense_jax import sweep
from experiments.ablation_grid import SEEDS, get_config

__all__ = ["get_config", "get_sweep"]


def get_sweep():
    """Skips are strides in pixels; the deepest features are at stride 8."""
    skips = [(), (4,), (2,), (1,), (4, 2), (4, 2, 1)]
    return sweep.grid(**{"seed": SEEDS, "model.skips": skips})
