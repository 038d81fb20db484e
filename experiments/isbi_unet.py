"""Trains a U-Net on the electron-microscopy membranes of ISBI 2012, the U-Net paper's task.

python -m dense_jax.main --config=experiments/isbi_unet.py --config.data.root=ISBI2012 \
    --workdir=runs/isbi_unet
Expect: mean IoU 0.77 on val after 400 steps, about 10 minutes on 2 CPU cores.

The network is narrower than the paper's, with batch norm and without border weights.
"""

from dense_jax.experiments import base


def get_config():
    """Returns a config with flips in both directions, because sections have no orientation."""
    config = base.get_config()
    config.num_steps = 400
    config.batch_size = 4
    config.data.name = "folder"
    config.data.crop_size = (192, 192)
    config.data.cache = "host"
    config.augment.flip_vertical = 0.5
    config.augment.scale = 0.2
    config.optimizer.learning_rate = 5e-3
    return config
