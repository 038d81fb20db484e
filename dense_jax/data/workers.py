"""The processor cores, and worker processes that end with their parent. Never uses jax."""

import multiprocessing
import multiprocessing.connection
import os
import threading


def processor_cores() -> list[int]:
    """Returns the ids of the processor cores that this process may use; on macOS, of all cores."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def end_with_parent() -> None:
    """Makes this process end when its parent process ends, for any reason."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
