"""Connects the processes of a run, compares their settings, and ends all of them if one fails.

Imports jax lazily, because `sweep` uses the flags without jax.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath  # like pathlib, also for gs://

TIMEOUT = 60  # seconds until the other processes stop after a process dies
START_TIMEOUT = 600  # seconds for all processes to join, because hosts may install packages
GRACE = 3  # seconds for a process to end with its own error after another has failed
_EXPLICIT = ("coordinator", "num_processes", "process_id")
_FAILURE = "dense_jax/failure"  # key for the message of the first process that fails
_FOREVER = 10**9  # milliseconds; JAX aborts a process that waits for a dead process
_exchanges = itertools.count()  # the next number is equal in all processes

flags.disclaim_key_flags()  # lists the flags defined here in the calling command's --help


def define_flags() -> None:
    """Defines the flags of this module. Invalid combinations fail when flags are parsed."""
    flags.DEFINE_bool(
        "multihost", False, "Join the other processes of the TPU, SLURM or Kubernetes job."
    )
    flags.DEFINE_string(
        "coordinator", None, "Join other processes: the HOST:PORT at which process 0 listens."
    )
    flags.DEFINE_integer("num_processes", None, "With --coordinator: the number of processes.")
    flags.DEFINE_integer("process_id", None, "With --coordinator: the ID of this process, from 0.")
    flags.register_multi_flags_validator(_EXPLICIT, _check)


def given() -> list[str]:
    """Returns the flags of this module that the user set, as command-line arguments."""
    names = ("multihost", *_EXPLICIT)
    return [flags.FLAGS[name].serialize() for name in names if flags.FLAGS[name].present]


def initialize() -> None:
    """Connects to the run's other processes if --multihost or --coordinator is set.

    Must be called before any other use of jax. Raises ValueError if the coordinator's address
    cannot be used. Exits if a process has not joined within START_TIMEOUT (process 0 waits TIMEOUT
    longer). If a process dies or becomes unreachable later, JAX aborts all remaining processes
    (SIGABRT) within TIMEOUT, even in the middle of a step.
    """
    args = flags.FLAGS
    if not args.multihost and args.coordinator is None:
        return
    if args.coordinator:
        _check_address(args.coordinator, args.process_id)
    import jax

    # JAX itself would abort with a stack dump. Process 0 waits longer, so the others exit first.
    patience = START_TIMEOUT + (TIMEOUT if args.process_id == 0 else 0)
    timer = threading.Timer(patience, _give_up, [patience])
    timer.daemon = True
    timer.start()
    # While JAX waits, Python cannot handle Ctrl-C.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    jax.distributed.initialize(
        args.coordinator,
        args.num_processes,
        args.process_id,
        cluster_detection_method="deactivate" if args.coordinator else None,
        initialization_timeout=patience + TIMEOUT,
        heartbeat_timeout_seconds=TIMEOUT,
        shutdown_timeout_seconds=TIMEOUT,  # how long a failed process waits for the others
    )
    signal.signal(signal.SIGINT, handler)
    timer.cancel()


def agree(facts: Callable[[], Mapping[str, Any]]) -> None:
    """Raises the same ValueError in all processes if the result of `facts` differs between them.

    facts: A function that returns {user-facing name: JSON value}. Not called if there is only one
      process.
    """
    if _joined() and (different := differences(_exchange(facts()))):
        raise ValueError(f"the processes must be alike, but differ in {'; '.join(different)}")


def differences(all_facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line of text for each fact that differs between processes, showing two values."""
    names = dict.fromkeys(name for facts in all_facts for name in facts)
    lines = []
    for name in names:
        values = [json.dumps(facts.get(name)) for facts in all_facts]
        if other := next((k for k, value in enumerate(values) if value != values[0]), 0):
            lines.append(f"{name}: {values[0]} in process 0, {values[other]} in process {other}")
    return lines


def check_shared(folder: epath.PathLike) -> None:
    """Raises ValueError in all processes if they do not share the folder.

    Creates the folder if it is missing. Does nothing if there is a single process.
    """
    jax = _joined()
    if jax is None:
        return
    path = epath.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    # The name is new, so no file system can have cached its absence.
    mark = path / _exchange(f".shared-{uuid.uuid4().hex}")[0]
    if jax.process_id == 0:
        mark.touch()
    _exchange(None)  # waits until the mark exists
    seen = _exchange(mark.exists())
    if jax.process_id == 0:
        mark.unlink()
    if not all(seen):
        raise ValueError(
            f"--workdir={folder} is not the same folder for process {seen.index(False)} as for "
            "process 0: it must be on a file system that all share"
        )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A context manager that ends all processes if its body fails in one of them."""
    jax = _joined()
    if jax is None:
        yield
        return
    client, done = jax.client, threading.Event()

    def failure() -> str | None:
        """Returns the error message of another process that has failed, or None."""
        try:
            return client.key_value_try_get(_FAILURE)
        except RuntimeError:  # not set
            return None

    def leave(message: str) -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        try:
            jax.shutdown()  # the failed process waits in its shutdown for this process
        finally:
            os._exit(1)  # the main thread may be waiting forever

    def watch() -> None:
        while not done.wait(0.5):
            # All processes may fail at the same time, each with its own error.
            if (message := failure()) and not done.wait(GRACE):
                leave(message)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        done.set()
        watcher.join()
        if isinstance(error, RuntimeError) and (message := failure()):
            leave(message)  # JAX's error says only that the other process is gone
        with contextlib.suppress(RuntimeError):  # another failed first, or the store is gone
            what = str(error) if isinstance(error, ValueError | OSError) else repr(error)
            client.key_value_set(_FAILURE, f"process {jax.process_id}: {what}")
        raise
    finally:
        done.set()
        watcher.join()


def _exchange(value: Any) -> list[Any]:
    """Returns the JSON `value` of every process, in the order of the process IDs.

    Uses no device, so the exchange also works if the processes have different devices.
    """
    jax, key = _joined(), f"dense_jax/exchange/{next(_exchanges)}"
    jax.client.key_value_set(f"{key}/{jax.process_id}", json.dumps(value))
    keys = (f"{key}/{k}" for k in range(jax.num_processes))
    return [json.loads(jax.client.blocking_key_value_get(name, _FOREVER)) for name in keys]


def _joined() -> Any:
    """Returns JAX's distributed state, or None if there is only one process.

    The state's `client` is a key-value store shared by all processes. The API is not public.
    """
    from jax._src import distributed

    return distributed.global_state if distributed.is_initialized() else None


def _give_up(seconds: int) -> None:
    args = flags.FLAGS
    expected = f"all {args.num_processes} processes" if args.num_processes else "all processes"
    print(
        f"error: after {seconds} s, not {expected} have joined. Start each process with the same "
        "--coordinator and --num_processes and its own --process_id, and look at the logs of those "
        "that ended",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # the main thread is still waiting in JAX


def _check_address(coordinator: str, process_id: int) -> None:
    """Raises ValueError if the coordinator's address would make JAX crash or wait silently."""
    host, _, port = coordinator.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"--coordinator={coordinator}: the host {host!r} is not known: {error}"
        ) from error
    if process_id:
        return
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", int(port)), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        raise ValueError(
            f"--coordinator={coordinator}: process 0 cannot listen on port {port}; use a free one, and "
            f"start --process_id=0 once: {error.strerror}"
        ) from error


def _check(values: Mapping[str, Any]) -> bool:
    """Raises flags.ValidationError if a flag is invalid or only some flags are set."""
    missing = [f"--{name}" for name in _EXPLICIT if values[name] is None]
    if len(missing) == len(_EXPLICIT):
        return True
    if missing:
        raise flags.ValidationError(
            "--coordinator, --num_processes and --process_id go together; missing: "
            f"{', '.join(missing)}"
        )
    address = re.fullmatch(r".+:(\d+)", values["coordinator"])
    if not address or not 0 < int(address[1]) < 2**16:
        raise flags.ValidationError(
            f"--coordinator={values['coordinator']} must be HOST:PORT, with a port from 1 to 65535"
        )
    if not 0 <= values["process_id"] < values["num_processes"]:
        raise flags.ValidationError(
            f"--process_id={values['process_id']} must be from 0 to --num_processes="
            f"{values['num_processes']} minus 1"
        )
    return True
