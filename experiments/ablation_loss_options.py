"""Which details of a loss matter? Compares fifteen losses with three seeds each (45 runs).

python -m dense_jax.sweep --config=experiments/ablation_loss_options.py --workdir=runs/loss_options

Papers call each of the first seven losses "Dice loss". For other sizes and datasets, see
`ablation`.
"""

from dense_jax import sweep
from dense_jax.experiments.ablation import SEEDS, get_config

__all__ = ["get_config", "get_sweep"]

VARIANTS = {
    "Dice": {"loss": "soft_dice"},
    "Dice, per image": {"loss": "soft_dice", "loss_options.per": "image"},
    "Dice, absent classes 0": {"loss": "soft_dice", "loss_options.absent": "zero"},
    "Dice, absent classes 1": {"loss": "soft_dice", "loss_options.absent": "one"},
    "Dice, smooth 1": {"loss": "soft_dice", "loss_options.smooth": 1.0},
    "Dice, squared": {"loss": "soft_dice", "loss_options.squared": True},
    "Dice, no background": {"loss": "soft_dice", "loss_options.include_background": False},
    "Jaccard": {"loss": "soft_jaccard"},
    "Lovasz": {"loss": "lovasz_softmax"},
    "Tversky": {"loss": "tversky", "loss_options.alpha": 0.3, "loss_options.beta": 0.7},
    "focal Tversky": {
        "loss": "tversky",
        "loss_options.alpha": 0.3,
        "loss_options.beta": 0.7,
        "loss_options.gamma": 0.75,
    },
    "Dice + half CE": {
        "loss": "dice_ce",
        "loss_options.ce_weight": 0.5,
        "loss_options.dice_weight": 1.0,
    },
    "CE": {"loss": "cross_entropy"},
    "CE, smoothed labels": {"loss": "cross_entropy", "loss_options.label_smoothing": 0.1},
    "CE, hardest quarter": {"loss": "cross_entropy", "loss_options.top_k_fraction": 0.25},
}


def get_sweep():
    """Returns the runs, seed by seed, so that a table with one seed is available early."""
    return [
        {"label": label} | fields | seed
        for seed in sweep.grid(seed=SEEDS)
        for label, fields in VARIANTS.items()
    ]
