"""Compares all decoders and auxiliary heads, with three seeds each (24 runs).

python -m dense_jax.sweep --config=experiments/ablation_decoders.py --workdir=runs/decoders

For other sizes and datasets, see `ablation`.
"""

from dense_jax import sweep
from dense_jax.experiments import ablation
from dense_jax.experiments.ablation import SEEDS


def get_config(size: str = "reduced"):
    """Returns the config. size: "reduced" (for two CPU cores) or "full"."""
    config = ablation.get_config(size)
    config.model.upsampling = "bilinear"
    with config.ignore_type():
        config.model.skips = (4, 2, 1)
    return config


CHANNELS = {"model.decoder_channels": 32}
VARIANTS = {
    "FCN": {"model.name": "fcn"},
    "U-Net": {"model.name": "unet"},
    # Half the weight at half the resolution, as in nnU-Net.
    "U-Net, deep supervision": {
        "model.name": "unet",
        "model.auxiliary.strides": (2, 4),
        "model.auxiliary.weights": (0.5, 0.25),
    },
    "FPN": {"model.name": "fpn"} | CHANNELS,
    # The default rates are larger than the deepest feature map, of 8 x 8 pixels.
    "DeepLabv3+": {"model.name": "deeplabv3plus", "model.atrous_rates": (1, 2, 3)} | CHANNELS,
    "UPerNet": {"model.name": "upernet"} | CHANNELS,
    "UPerNet, FCN head": {
        "model.name": "upernet",
        "model.auxiliary.strides": (4,),
        "model.auxiliary.weights": (0.4,),
    }
    | CHANNELS,
    "SegFormer": {"model.name": "segformer"} | CHANNELS,
}


def get_sweep():
    """Returns the runs. Every decoder fuses all strides."""
    return [
        {"label": label} | fields | seed
        for seed in sweep.grid(seed=SEEDS)
        for label, fields in VARIANTS.items()
    ]
