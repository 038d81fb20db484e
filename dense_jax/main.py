"""Trains one model: python -m dense_jax.main --config=FILE --workdir=DIR [--config.x=y].

The same command on the same workdir resumes. Exit status: 0 finished, 75 interrupted and saved.
"""

import runpy
import sys

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from dense_jax import distributed, logger, startup, train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go.", required=True)
distributed.define_flags()


def main(argv: list[str]) -> None:
    """Starts or resumes the run."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    distributed.initialize()
    logger.show_own_lines()
    startup.keep_programs()
    startup.keep_memory()
    train.train(_CONFIG.value, _WORKDIR.value)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing, where an unknown config field is one line that lists the valid ones."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError):  # of ml_collections, on a field that is not there
        words = " ".join(argv).replace("--config ", "--config=").split()
        file = next(word for word in words if word.startswith("--config="))
        file, _, argument = file.removeprefix("--config=").partition(":")
        config = runpy.run_path(file)["get_config"](*filter(None, [argument]))
        for flag in (word.partition("=")[0] for word in words if word.startswith("--config.")):
            fields = config
            for name in flag.split(".")[1:]:
                valid = list(fields) if isinstance(fields, ConfigDict) else []
                if name not in valid:
                    sys.exit(f"{flag}: no such field. Valid there: {', '.join(valid) or 'none'}")
                fields = fields[name]
        raise


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
