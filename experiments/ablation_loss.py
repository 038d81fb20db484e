"""Compares losses with and without class balancing, with three seeds each (24 runs).

python -m dense_jax.sweep --config=experiments/ablation_loss.py --workdir=runs/loss

For other sizes and datasets, see `ablation`.
"""

from dense_jax import sweep
from dense_jax.experiments.ablation import SEEDS, get_config

__all__ = ["get_config", "get_sweep"]


def get_sweep():
    """Returns runs with each loss, with equal class weights and with median-frequency weights."""
    losses = ["cross_entropy", "soft_dice", "dice_ce", "focal"]
    return [
        run | balancing
        for run in sweep.grid(seed=SEEDS, loss=losses)
        for balancing in ({}, {"loss_options.class_weights": "median_frequency"})
    ]
