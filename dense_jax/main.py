"""Trains one model: python -m dense_jax.main --config=FILE --workdir=DIR [--config.x=y].

The same command on the same workdir resumes. Exit status: 0 finished, 75 interrupted and saved.
"""

from absl import flags
from ml_collections import config_flags

from dense_jax import command, train
from dense_jax.command import parse_flags
from dense_jax.devices import distributed, runtime

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment file.", lock_config=True)
_WORKDIR = command.define_folder("workdir", "Where checkpoints and metrics go.", required=True)
distributed.define_flags()


def main(argv: list[str]) -> None:
    """Starts or resumes the run."""
    distributed.initialize()
    runtime.prepare()
    train.train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command.run(main, flags_parser=parse_flags)
