"""Which skips are worth it? Compares no skips, single skips and growing sets of skips (18 runs).

python -m dense_jax.sweep --config=experiments/ablation_skips.py --workdir=runs/skips

For other sizes and datasets, see `ablation`.
"""

from dense_jax import sweep
from dense_jax.experiments.ablation import SEEDS, get_config

__all__ = ["get_config", "get_sweep"]


def get_sweep():
    """Returns the runs. A skip is named by its stride in pixels. The deepest stride is 8."""
    skips = [(), (4,), (2,), (1,), (4, 2), (4, 2, 1)]
    return sweep.grid(**{"seed": SEEDS, "model.skips": skips})
