"""Does Dice find a rare class better than cross-entropy? Five answers, five seeds each: 25 runs.

python -m dense_jax.sweep --config=experiments/rare_class_ce_vs_dice.py --workdir=runs/rare \
    --config.data.name=folder --config.data.root=ROOT --config.num_steps=2000

Made for two classes of which one is rare, such as the vessels of a retina or cracks; without a
dataset it is on the synthetic one, whose `speck` covers less than 1 % of the pixels. Read the
scores of the rare class: IoU, accuracy (what was found) and precision (what was right), for a
weighted cross-entropy buys the one with the other. Its Dice is 2 IoU / (1 + IoU).
"""

from dense_jax import sweep
from experiments import ablation_grid


def get_config(size: str = "quick"):
    """size: as in `ablation_grid`. Flipped and turned freely: such images have no up."""
    config = ablation_grid.get_config(size)
    config.augment.flip_vertical = 0.5
    config.augment.rotation = 180.0
    return config


def get_sweep():
    """inverse_frequency: both of two classes weigh the same in the sum."""
    answers = [
        {"loss": "cross_entropy"},
        {"loss": "cross_entropy", "loss_options.class_weights": "inverse_frequency"},
        {"loss": "soft_dice"},
        {"loss": "dice_ce"},
        {"loss": "focal"},
    ]
    return [seed | answer for seed in sweep.grid(seed=range(5)) for answer in answers]
