"""Several processes as one run: how they find each other, agree, and fail together.

Uses jax only after joining, because `sweep` passes the flags on without it.
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

TIMEOUT = 60  # seconds after which the others stop when a process is gone
START_TIMEOUT = 600  # seconds for which the first process waits for the last: hosts install first
GRACE = 3  # seconds in which a process may end with its own error after another has failed
_EXPLICIT = ("coordinator", "num_processes", "process_id")
_FAILURE = "dense_jax/failure"  # key of the message of the first process that fails
_FOREVER = 10**9  # milliseconds; JAX ends a process that waits for a dead one
_exchanges = itertools.count()  # the same in all processes


def define_flags() -> None:
    """Defines the flags; parsing refuses a set of them that is incomplete."""
    flags.DEFINE_bool(
        "multihost", False, "Join the other processes that TPU, SLURM or Kubernetes name."
    )
    flags.DEFINE_string(
        "coordinator", None, "Join other processes: HOST:PORT where process 0 listens."
    )
    flags.DEFINE_integer("num_processes", None, "With --coordinator: the number of processes.")
    flags.DEFINE_integer("process_id", None, "With --coordinator: the number of this one, from 0.")
    flags.register_multi_flags_validator(_EXPLICIT, _check)


def given() -> list[str]:
    """Returns these flags as they were given, for another command."""
    names = ("multihost", *_EXPLICIT)
    return [flags.FLAGS[name].serialize() for name in names if flags.FLAGS[name].present]


def initialize() -> None:
    """Joins the other processes, if the flags name any. Call it before any other use of jax.

    Raises ValueError if the coordinator's address cannot be used, and exits if not all processes
    have joined within START_TIMEOUT. From then on, when a process dies or can no longer be reached,
    JAX aborts the others (SIGABRT) after TIMEOUT at the latest, even in the middle of a step. When a
    process raises an error, `together` ends the others faster, with the error's message.
    """
    args = flags.FLAGS
    if not args.multihost and args.coordinator is None:
        return
    if args.coordinator:
        _check_address(args.coordinator, args.process_id)
    import jax

    # JAX itself would abort with a dump. Process 0 waits longer, so that the others give up first.
    patience = START_TIMEOUT + (TIMEOUT if args.process_id == 0 else 0)
    timer = threading.Timer(patience, _give_up, [patience])
    timer.daemon = True
    timer.start()
    # While JAX waits, Python does not see Ctrl-C.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    jax.distributed.initialize(
        args.coordinator,
        args.num_processes,
        args.process_id,
        cluster_detection_method="deactivate" if args.coordinator else None,
        initialization_timeout=patience + TIMEOUT,
        heartbeat_timeout_seconds=TIMEOUT,
        shutdown_timeout_seconds=TIMEOUT,  # a failed process waits so long for the others
    )
    signal.signal(signal.SIGINT, handler)
    timer.cancel()


def agree(facts: Callable[[], Mapping[str, Any]]) -> None:
    """Raises ValueError, with the same message on all processes, unless their facts are equal.

    facts: returns JSON values by their names for a user. It is not called in a single process.
    """
    if _joined() and (different := differences(_exchange(facts()))):
        raise ValueError(f"the processes must be alike, but differ in {'; '.join(different)}")


def differences(all_facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line for each fact that differs, with the first process that differs from 0."""
    names = dict.fromkeys(name for facts in all_facts for name in facts)
    lines = []
    for name in names:
        values = [json.dumps(facts.get(name)) for facts in all_facts]
        if other := next((k for k, value in enumerate(values) if value != values[0]), 0):
            lines.append(f"{name}: {values[0]} in process 0, {values[other]} in process {other}")
    return lines


def check_shared(folder: epath.PathLike) -> None:
    """Makes a folder. Raises ValueError, on all processes, unless it is the same for all."""
    jax = _joined()
    if jax is None:
        return
    path = epath.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    # The name is new: no file system can remember that it was missing.
    mark = path / _exchange(f".shared-{uuid.uuid4().hex}")[0]
    if jax.process_id == 0:
        mark.touch()
    _exchange(None)  # the mark exists
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
    """Ends all processes, with one line each, when one raises an error inside. Also a decorator."""
    jax = _joined()
    if jax is None:
        yield
        return
    client, done = jax.client, threading.Event()

    def failure() -> str | None:
        """Returns the message of another process that has failed, or None."""
        try:
            return client.key_value_try_get(_FAILURE)
        except RuntimeError:  # not set
            return None

    def leave(message: str) -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        try:
            jax.shutdown()  # the process that failed waits there for this one
        finally:
            os._exit(1)  # the main thread may wait for what never comes

    def watch() -> None:
        while not done.wait(0.5):
            # All may fail at the same time, each with its own error.
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
            leave(message)  # JAX says only that the other process is gone
        with contextlib.suppress(RuntimeError):  # another process was first, or none can be told
            what = str(error) if isinstance(error, ValueError | OSError) else repr(error)
            client.key_value_set(_FAILURE, f"process {jax.process_id}: {what}")
        raise
    finally:
        done.set()
        watcher.join()


def _exchange(value: Any) -> list[Any]:
    """Returns the JSON values that all processes gave, in the order of their numbers.

    Uses no device, so it works before any compilation, and with devices that do not match.
    """
    jax, key = _joined(), f"dense_jax/exchange/{next(_exchanges)}"
    jax.client.key_value_set(f"{key}/{jax.process_id}", json.dumps(value))
    keys = (f"{key}/{k}" for k in range(jax.num_processes))
    return [json.loads(jax.client.blocking_key_value_get(name, _FOREVER)) for name in keys]


def _joined() -> Any:
    """Returns JAX's record of the processes, or None where there is a single one.

    Its `client` has keys and values that all processes share. JAX has no public name for it.
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
    os._exit(1)  # JAX is still waiting


def _check_address(coordinator: str, process_id: int) -> None:
    """Raises ValueError for an address with which JAX would crash, or wait in silence."""
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
    """Raises flags.ValidationError unless all explicit flags are set and valid, or none is."""
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
