"""Runs a command by its name: python -m dense_jax COMMAND [--flag=value ...], or dense-jax COMMAND.

Without a name, lists the commands. With --version, prints the version.
"""

import runpy
import sys

import dense_jax
from dense_jax.command import COMMANDS
from dense_jax.spelling import suggestion

USAGE = """\
usage: dense-jax COMMAND [--flag=value ...], the same as python -m dense_jax.COMMAND

{commands}

dense-jax COMMAND --help shows an example and the flags of a command, dense-jax --version the
version."""


def main() -> None:
    """Runs the command that the first argument names, or lists the commands."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name == "--version":
        print(f"dense_jax {dense_jax.__version__}")
        return
    if name in ("--help", "-help", "-h"):
        lines = [f"  {name:14}{command.about}" for name, command in COMMANDS.items()]
        print(USAGE.format(commands="\n".join(lines)))
        return
    # The last part of a name is enough: doctor for data.doctor.
    names = {alias: full for full in COMMANDS for alias in (full, full.split(".")[-1])}
    if name not in names:
        known = suggestion(name, names) or f"; there are: {', '.join(COMMANDS)}"
        sys.exit(f"error: no command {name!r}{known}")
    sys.argv = [sys.argv[0], *arguments]
    runpy.run_module(f"dense_jax.{names[name]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
