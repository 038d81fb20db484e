"""Does Dice improve on cross-entropy? Compares cross-entropy and its sum with soft Dice (6 runs).

python -m dense_jax.sweep --config=experiments/ce_plus_dice.py --workdir=runs/ce_plus_dice \
    --config.data.root=ROOT --jobs=2 --evaluate=test

The weight 3 of Dice is that of MMSegmentation's U-Nets for retinal vessels. Four trials choose the
learning rate of each loss. The dataset is any folder whose images have no upper side, such as
magnetic_tile or cwfid. docs/results.md has the results of these two.
"""

from dense_jax import sweep
from dense_jax.experiments import camvid_upsampling
from dense_jax.experiments.ablation import SEEDS


def get_config():
    """Returns a config at half the resolution, for two CPU cores."""
    config = camvid_upsampling.get_config()
    config.data.name = "folder"
    config.data.crop_size = (96, 96)
    config.augment.flip_vertical = 0.5
    return config


def get_sweep():
    """Returns the runs, seed by seed."""
    return sweep.grid(
        **{
            "seed": SEEDS,
            "loss": ["cross_entropy", "cross_entropy + 3 * soft_dice"],
            "optimizer.learning_rate": [[0.001, 0.003, 0.01, 0.03]],
        }
    )
