"""Compares all combinations of upsampling, skips and loss on the synthetic dataset (72 runs).

python -m dense_jax.sweep --config=experiments/ablation.py --workdir=runs/ablation --jobs=2 \
    --evaluate=test

Each combination has three seeds. Each run is small. `--config=experiments/ablation.py:full` trains
wider networks for longer. For your own images, add --config.data.name=folder
--config.data.root=ROOT and set --config.num_steps.
"""

from dense_jax import sweep
from dense_jax.experiments import base

SEEDS = (0, 1, 2)


def get_config(size: str = "reduced"):
    """Returns the config. size: "reduced" (for two CPU cores) or "full"."""
    if size not in ("reduced", "full"):
        raise ValueError(f"the size {size!r} must be reduced or full")
    config = base.get_config()
    config.data.cache = "host"
    if size == "full":
        config.num_steps = 2000
        config.optimizer.warmup_steps = 100
        config.update(eval_every=200, checkpoint_every=200)
    else:
        config.model.widths = (8, 16, 32, 64)
        config.update(eval_every=50, checkpoint_every=300)  # often enough for a learning curve
    return config


def get_sweep():
    """Returns the runs, seed by seed, so that a table with one seed is available early."""
    return sweep.grid(
        **{
            "seed": SEEDS,
            "model.upsampling": ["bilinear", "max_unpool", "transposed_conv", "pixel_shuffle"],
            "model.skips": [(), (4,), (4, 2, 1)],
            "loss": ["cross_entropy", "soft_dice"],
        }
    )
