"""Compares optimizers, schedules and weight averaging, with three seeds each (18 runs).

python -m dense_jax.sweep --config=experiments/ablation_recipe.py --workdir=runs/recipe

For other sizes and datasets, see `ablation`.
"""

from dense_jax import sweep
from dense_jax.experiments.ablation import SEEDS, get_config

__all__ = ["get_config", "get_sweep"]

SGD = {"optimizer.name": "sgd", "optimizer.learning_rate": 0.1}

VARIANTS = {
    "AdamW, cosine": {},
    "AdamW, constant": {"optimizer.schedule": "constant"},
    "AdamW, constant, averaged": {"optimizer.schedule": "constant", "ema_decay": 0.98},
    "SGD, cosine": SGD,
    "SGD, poly": SGD | {"optimizer.schedule": "poly"},
    "SGD, poly, averaged": SGD | {"optimizer.schedule": "poly", "ema_decay": 0.98},
}


def get_sweep():
    """Returns the runs. "poly" is DeepLab's schedule. The weight average covers about 50 steps."""
    return [
        {"label": label} | fields | seed
        for seed in sweep.grid(seed=SEEDS)
        for label, fields in VARIANTS.items()
    ]
