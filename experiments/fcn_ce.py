"""Trains an FCN with one skip and the plain encoder on cross-entropy, on the synthetic dataset.

python -m dense_jax.main --config=experiments/fcn_ce.py --workdir=runs/fcn_ce
"""

from dense_jax.experiments import base


def get_config():
    """Returns a config with bilinear upsampling, as initialized in arXiv 1411.4038, section 3.3."""
    config = base.get_config()
    config.model.name = "fcn"
    config.model.upsampling = "bilinear"
    config.model.skips = (4,)
    return config
