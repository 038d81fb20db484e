"""Upsampling x skips x loss, three seeds each: 72 runs, on the synthetic dataset.

python -m dense_jax.sweep --config=experiments/ablation_grid.py --workdir=runs/grid --jobs=2 \
    --evaluate=test

As it stands each run is small; `--config=experiments/ablation_grid.py:full` trains wider networks
for longer. On your own images: --config.data.name=folder --config.data.root=ROOT, and as many
--config.num_steps as they need.
"""

from dense_jax import sweep
from experiments import base

SEEDS = (0, 1, 2)


def get_config(size: str = "quick"):
    """size: "quick", or "full" (`--config=experiments/ablation_grid.py:full`)."""
    config = base.get_config()
    config.data.cache = "host"
    if size == "quick":
        config.model.widths = (8, 16, 32, 64)
        config.eval_every = 50  # for a learning curve
        config.checkpoint_every = 300
    elif size == "full":
        config.num_steps = 2000
        config.optimizer.warmup_steps = 100
        config.eval_every = 200
        config.checkpoint_every = 200
    else:
        raise ValueError(f"the size {size!r} must be quick or full")
    return config


def get_sweep():
    """All with one seed before the next, so that there is a table early."""
    return sweep.grid(
        **{
            "seed": SEEDS,
            "model.upsampling": ["bilinear", "max_unpool", "transposed_conv", "pixel_shuffle"],
            "model.skips": [(), (4,), (4, 2, 1)],
            "loss": ["cross_entropy", "soft_dice"],
        }
    )
