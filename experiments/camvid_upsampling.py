"""Is learning the upsampling worth it? Compares seven methods on CamVid (84 runs).

python -m dense_jax.sweep --config=experiments/camvid_upsampling.py --workdir=runs/upsampling \
    --config.data.root=CAMVID --jobs=2 --evaluate=test

Each method has all skips or none, cross-entropy or soft Dice, and three seeds. The recipe is that of
`camvid_unet:reduced`, with half the channels, a level less, smaller crops and 2,000 steps. All runs
have its learning rate. The sweep is not finished yet.
"""

from dense_jax import sweep
from dense_jax.experiments import camvid_unet
from dense_jax.experiments.ablation import SEEDS

METHODS = (
    *("bilinear", "nearest", "max_unpool"),  # fixed
    *("transposed_conv", "pixel_shuffle", "resize_conv", "carafe"),  # learned
)


def get_config():
    config = camvid_unet.get_config("reduced")
    config.num_steps = 2000
    config.model.widths = (8, 16, 32, 64)
    config.data.crop_size = (96, 128)
    config.update(eval_every=1000, checkpoint_every=1000)
    return config


def get_sweep():
    """Returns the runs, seed by seed. The deepest stride is 8."""
    return sweep.grid(
        **{
            "seed": SEEDS,
            "loss": ["cross_entropy", "soft_dice"],
            "model.skips": [(4, 2, 1), ()],
            "model.upsampling": METHODS,
        }
    )
