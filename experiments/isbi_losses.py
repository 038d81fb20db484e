"""Compares losses for thin membranes over five folds of ISBI 2012 (15 runs).

python -m dense_jax.sweep --config=experiments/isbi_losses.py --workdir=runs/isbi_losses \
    --config.data.root=ISBI2012 --evaluate=fold

The losses are cross-entropy, its sum with soft Dice, and with the boundary loss. Four trials choose
the learning rate of each. A fold is a block of neighboring sections, so no section of a fold is
beside those that its network was trained on, but for its first and its last.
"""

from dense_jax import sweep
from dense_jax.experiments import isbi_unet


def get_config():
    """Returns a config at half the resolution, for two CPU cores."""
    config = isbi_unet.get_config()
    config.data.resolution = 0.5
    config.data.crop_size = (96, 96)
    config.data.folds = 5
    config.update(eval_every=200, checkpoint_every=200)
    return config


def get_sweep():
    """Returns the runs, fold by fold."""
    return sweep.grid(
        **{
            "data.fold": range(5),
            "loss": [
                "cross_entropy",
                "cross_entropy + 3 * soft_dice",
                "cross_entropy + 3 * soft_dice + 0.01 * boundary",
            ],
            "optimizer.learning_rate": [[0.002, 0.005, 0.01, 0.02]],
        }
    )
