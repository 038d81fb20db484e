"""Compares ways to find a rare class: five losses, class-aware crops and ClassMix (70 runs).

python -m dense_jax.sweep --config=experiments/rare_class_ce_vs_dice.py --workdir=runs/rare \
    --config.data.name=folder --config.data.root=ROOT --config.num_steps=2000

Each has ten seeds. Before, four trials choose its learning rate. The sweep is for datasets with
two classes, one of them rare, such as retinal vessels or cracks. By default, it runs on the
synthetic dataset, whose class `speck` covers less than 1 % of the pixels. Compare the IoU of the
rare class, its accuracy (the fraction of its pixels that are found) and its precision (the fraction
of found pixels that are correct), because a weighted cross-entropy gains accuracy at the cost of
precision. The Dice of the class is 2 IoU / (1 + IoU).
"""

from dense_jax import sweep
from dense_jax.experiments import ablation


def get_config(size: str = "reduced"):
    """Returns a config with free flips and rotations, because the images have no orientation.

    size: See `ablation`.
    """
    config = ablation.get_config(size)
    config.augment.flip_vertical = 0.5
    config.augment.rotation = 180.0
    return config


def get_sweep():
    """Returns the runs. Inverse-frequency weights give both classes the same total weight."""
    rates = {"optimizer.learning_rate": [0.003, 0.01, 0.03, 0.1]}
    answers = [
        {"loss": "cross_entropy"},
        {"loss": "cross_entropy", "loss_options.class_weights": "inverse_frequency"},
        {"loss": "soft_dice"},
        {"loss": "dice_ce"},
        {"loss": "focal"},
        {"loss": "cross_entropy", "augment.class_crop": 1.0},
        {"loss": "cross_entropy", "augment.class_mix": 0.5},
    ]
    return [seed | answer | rates for seed in sweep.grid(seed=range(10)) for answer in answers]
