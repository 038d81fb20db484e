"""Where do skips help? Compares FCN-32s, 16s and 8s, and U-Nets of 0 to 5 skips, on CamVid (27 runs).

python -m dense_jax.sweep --config=experiments/camvid_skips.py --workdir=runs/camvid_skips \
    --config.data.root=CAMVID --jobs=2 --evaluate=test

Everything else is as in `camvid_upsampling`, with two levels more, so that the deepest stride is 32
as in the FCN paper. docs/results.md has the results.
"""

from dense_jax import sweep
from dense_jax.experiments import camvid_upsampling
from dense_jax.experiments.ablation import SEEDS


def get_config():
    config = camvid_upsampling.get_config()
    config.model.widths = (8, 16, 32, 64, 64, 64)
    return config


VARIANTS = {
    "FCN-32s": {"model.name": "fcn", "model.skips": ()},
    "FCN-16s": {"model.name": "fcn", "model.skips": (16,)},
    "FCN-8s": {"model.name": "fcn", "model.skips": (16, 8)},
    "U-Net, no skips": {"model.skips": ()},
    "U-Net, skip 16": {"model.skips": (16,)},
    "U-Net, skips 16, 8": {"model.skips": (16, 8)},
    "U-Net, skips 16, 8, 4": {"model.skips": (16, 8, 4)},
    "U-Net, skips 16, 8, 4, 2": {"model.skips": (16, 8, 4, 2)},
    "U-Net, skips 16, 8, 4, 2, 1": {"model.skips": (16, 8, 4, 2, 1)},
}


def get_sweep():
    """Returns the runs, seed by seed."""
    return [
        {"label": label} | fields | seed
        for seed in sweep.grid(seed=SEEDS)
        for label, fields in VARIANTS.items()
    ]
