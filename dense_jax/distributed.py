"""Several processes as one run: the flags by which they find each other, and how they join.

Shared by the commands that train. Never uses jax before joining: `sweep` only passes the flags on.
"""

import re
from collections.abc import Mapping
from typing import Any

from absl import flags

TIMEOUT = 60  # seconds, after which the others stop when one is gone
START_TIMEOUT = 600  # seconds, for which the first waits for the last: each host installs first
_EXPLICIT = ("coordinator", "num_processes", "process_id")


def define_flags() -> None:
    """Defines the flags; parsing them fails with one line where they do not fit together."""
    flags.DEFINE_bool(
        "multihost", False, "One of several processes, found by themselves: TPU, SLURM, Kubernetes."
    )
    flags.DEFINE_string("coordinator", None, "One of several: HOST:PORT where process 0 listens.")
    flags.DEFINE_integer("num_processes", None, "With --coordinator: of how many.")
    flags.DEFINE_integer("process_id", None, "With --coordinator: which, counted from 0.")
    flags.register_multi_flags_validator(_EXPLICIT, _check)


def given() -> list[str]:
    """These flags as they were given, for another command."""
    names = ("multihost", *_EXPLICIT)
    return [flags.FLAGS[name].serialize() for name in names if flags.FLAGS[name].present]


def initialize() -> None:
    """Joins the other processes, if the flags tell of any; before any other use of jax.

    Fails when not all have joined within START_TIMEOUT. From then on, when a process fails, dies or
    can no longer be reached, JAX aborts the others (SIGABRT) about TIMEOUT later at the latest, also
    those that wait for it in the middle of a step.
    """
    args = flags.FLAGS
    if not args.multihost and args.coordinator is None:
        return
    import jax

    jax.distributed.initialize(
        args.coordinator,
        args.num_processes,
        args.process_id,
        cluster_detection_method="deactivate" if args.coordinator else None,
        initialization_timeout=START_TIMEOUT,
        heartbeat_timeout_seconds=TIMEOUT,
        shutdown_timeout_seconds=TIMEOUT,  # for which one that failed waits for the others
    )


def _check(values: Mapping[str, Any]) -> bool:
    """Raises flags.ValidationError unless the explicit flags are a process, or not there."""
    missing = [f"--{name}" for name in _EXPLICIT if values[name] is None]
    if len(missing) == len(_EXPLICIT):
        return True
    if missing:
        raise flags.ValidationError(
            "--coordinator, --num_processes and --process_id go together; missing: "
            f"{', '.join(missing)}"
        )
    if not re.fullmatch(r".+:\d+", values["coordinator"]):
        raise flags.ValidationError(f"--coordinator={values['coordinator']} must be HOST:PORT")
    if not 0 <= values["process_id"] < values["num_processes"]:
        raise flags.ValidationError(
            f"--process_id={values['process_id']} must be from 0 to --num_processes="
            f"{values['num_processes']} minus 1"
        )
    return True
