"""Trains one model: python -m dense_jax.main --config=FILE --workdir=DIR [--config.x=y].

Every option of experiments/base.py is a flag, such as --config.batch_size=4; docs/configuration.md
lists the valid values.

Running the command again resumes the run. The exit status is 0 if the run has finished, and 75 if
the run was stopped and saved.
"""

import logging
import sys

from absl import flags

from dense_jax import command
from dense_jax.devices import distributed


def main(argv: list[str]) -> None:
    """Starts or resumes the run."""
    command.show_log_lines()
    logging.getLogger("dense_jax").info("loading JAX")
    from dense_jax import train  # imported here, because jax is slow to import
    from dense_jax.devices import runtime

    distributed.initialize()
    runtime.prepare()
    name, _ = command.split_config(sys.argv)
    experiment = command.experiment_file(name) if name else None
    train.train(flags.FLAGS.config, flags.FLAGS.workdir, experiment)


if __name__ == "__main__":
    command.define_config()
    command.define_folder(
        "workdir", "Folder for checkpoints and metrics.", required=True, bucket="output"
    )
    distributed.define_flags()
    command.run(main, flags_parser=command.parse_flags)
