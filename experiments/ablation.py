"""The ablation to begin with: that of `ablation_grid`, under a short name.

python -m dense_jax.sweep --config=experiments/ablation.py --workdir=runs/ablation
"""

from experiments.ablation_grid import get_config, get_sweep

__all__ = ["get_config", "get_sweep"]
