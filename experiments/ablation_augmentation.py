"""Which augmentation helps? Compares seven settings with three seeds each (21 runs).

python -m dense_jax.sweep --config=experiments/ablation_augmentation.py --workdir=runs/augmentation

For other sizes and datasets, see `ablation`. The color changes require RGB images.
docs/augmentation.md explains and shows each augmentation.
"""

from dense_jax import sweep
from dense_jax.experiments.ablation import SEEDS, get_config

__all__ = ["get_config", "get_sweep"]

FLIP = {"augment.flip": 0.5}
GEOMETRY = {
    "augment.scale": 0.5,
    "augment.rotation": 15.0,
    "augment.shear": 10.0,
    "augment.elastic": 3.0,
}
COLORS = {
    "augment.brightness": 0.2,
    "augment.contrast": 0.2,
    "augment.saturation": 0.3,
    "augment.hue": 10.0,
    "augment.gamma": 0.3,
    "augment.offset": 20.0,
}
QUALITY = {"augment.blur": 1.0, "augment.noise": 10.0}

VARIANTS = {
    "none": {"augment.flip": 0.0},
    "flip": FLIP,
    "flip, geometry": FLIP | GEOMETRY,
    "flip, colors": FLIP | COLORS,
    "flip, blur and noise": FLIP | QUALITY,
    "flip, mixed crops": FLIP | {"augment.max_class_fraction": 0.75},
    "all": FLIP | GEOMETRY | COLORS | QUALITY | {"augment.max_class_fraction": 0.75},
}


def get_sweep():
    """Returns the runs. The strengths are moderate, for photographs."""
    return [
        {"label": label} | fields | seed
        for seed in sweep.grid(seed=SEEDS)
        for label, fields in VARIANTS.items()
    ]
