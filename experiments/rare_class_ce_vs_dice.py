"""Does Dice find a rare class better than cross-entropy? Five answers, five seeds each: 25 runs.

python -m dense_jax.sweep --config=experiments/rare_class_ce_vs_dice.py --workdir=runs/rare \
    --config.data.name=folder --config.data.root=ROOT --config.num_steps=2000

Made for two classes of which one is rare, such as the vessels of a retina, or cracks. Without a
dataset it runs on the synthetic one, whose `speck` covers less than 1 % of the pixels. Read the
rare class's IoU, accuracy (how much of it was found) and precision (how much of the found was
right), because a weighted cross-entropy gains accuracy at the cost of precision. The class's Dice
is 2 IoU / (1 + IoU).
"""

from dense_jax import sweep
from dense_jax.experiments import ablation


def get_config(size: str = "reduced"):
    """Flips and turns images freely, because they have no up. size: see `ablation`."""
    config = ablation.get_config(size)
    config.augment.flip_vertical = 0.5
    config.augment.rotation = 180.0
    return config


def get_sweep():
    """By inverse frequency, both classes have the same total weight."""
    answers = [
        {"loss": "cross_entropy"},
        {"loss": "cross_entropy", "loss_options.class_weights": "inverse_frequency"},
        {"loss": "soft_dice"},
        {"loss": "dice_ce"},
        {"loss": "focal"},
    ]
    return [seed | answer for seed in sweep.grid(seed=range(5)) for answer in answers]
