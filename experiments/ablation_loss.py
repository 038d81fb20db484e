"""Loss x class balancing, three seeds each: 24 runs.

python -m dense_jax.sweep --config=experiments/ablation_loss.py --workdir=runs/loss

For sizes and other datasets, see `ablation`.
"""

from dense_jax import sweep
from dense_jax.experiments.ablation import SEEDS, get_config

__all__ = ["get_config", "get_sweep"]


def get_sweep():
    """Each loss comes with equal class weights and with median frequency balancing."""
    losses = ["cross_entropy", "soft_dice", "dice_ce", "focal"]
    return [
        run | balancing
        for run in sweep.grid(seed=SEEDS, loss=losses)
        for balancing in ({}, {"loss_options.class_weights": "median_frequency"})
    ]
