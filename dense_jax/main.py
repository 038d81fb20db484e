"""Trains one model: python -m dense_jax.main --config=FILE --workdir=DIR [--config.x=y].

The same command on the same workdir resumes. Exit status: 0 finished, 75 interrupted and saved.
"""

import logging

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from dense_jax import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go.", required=True)
_MULTIHOST = flags.DEFINE_bool("multihost", False, "One of several processes (TPU pod, SLURM).")


def main(argv: list[str]) -> None:
    """Starts or resumes the run."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if _MULTIHOST.value:
        jax.distributed.initialize()  # finds its peers on TPU, SLURM and Kubernetes
    absl_logging.set_verbosity(absl_logging.WARNING)  # orbax tells too much
    logging.getLogger("dense_jax").setLevel(logging.INFO)
    train.train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
