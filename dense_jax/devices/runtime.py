"""Sets up logging, the compilation cache, memory allocation and devices for commands."""

import contextlib
import ctypes
import importlib.util
import logging
import os
import resource
import sys
import time
from collections.abc import Iterator

import jax

import dense_jax
from dense_jax import storage
from dense_jax.command import show_log_lines
from dense_jax.spelling import duration

_LOG = logging.getLogger("dense_jax")
# The default scheduler runs as much as possible at once. It needs up to 1.7 times the temporary
# memory. The default level of optimization, 3, takes up to 1.4 times as long to compile a step, and
# 7 times as long to compile random numbers. Steps are not faster, and their results the same.
XLA_CPU_FLAGS = (
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    "--xla_backend_optimization_level=2",
)


def prepare() -> None:
    """Sets up JAX and logging for a command. Must be called before JAX initializes its devices."""
    show_log_lines()
    keep_programs()
    keep_memory()
    check_devices()


def check_devices() -> None:
    """Raises ValueError if JAX_PLATFORMS names a platform that JAX cannot use on this machine."""
    wanted = jax.config.values["jax_platforms"]
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that the plug-in exists
        if not wanted:
            raise
        jax.config.update("jax_platforms", None)
        platforms = sorted({"cpu", jax.default_backend()})
        raise ValueError(
            f"JAX_PLATFORMS={wanted} cannot be used: {str(error) or 'its plug-in is missing'}. Here "
            f"JAX has: {', '.join(platforms)}. Unset JAX_PLATFORMS, or install what it names"
        ) from error


def keep_programs() -> None:
    """Caches compiled programs in the user's cache folder, so that later starts are faster.

    JAX keeps programs that took longer than jax_persistent_cache_min_compile_time_secs to compile.
    A folder set by the user (JAX_COMPILATION_CACHE_DIR) takes precedence.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = storage.cache_folder() / "programs"
        with contextlib.suppress(OSError):  # without a folder, programs are recompiled
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))


def keep_memory() -> None:
    """On machines without an accelerator, keeps freed memory for reuse by the next step.

    Configures glibc's malloc to reuse large blocks, and XLA:CPU by XLA_CPU_FLAGS. XLA_FLAGS set by
    the user take precedence.
    """
    # With an accelerator, threads that decode images benefit from separate malloc arenas.
    # jax.default_backend() would start threads, which have separate arenas.
    if any(importlib.util.find_spec(plugin) for plugin in ("jax_plugins", "libtpu")):
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if XLA_CPU_FLAGS[0] not in flags:
        os.environ["XLA_FLAGS"] = " ".join([*XLA_CPU_FLAGS, flags]).strip()
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    # XLA:CPU allocates temporary arrays anew in each step. glibc allocates such large blocks with
    # mmap and returns them to the operating system when they are freed, so each step triggers the
    # same page faults again. The faults take a sixth of the default network's step time. Without
    # mmap, there must be only one arena, because only the main arena can grow enough.
    if hasattr(libc, "mallopt"):  # glibc
        # malloc.h: M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD (-1: never)
        for option, value in ((-8, 1), (-4, 0), (-1, -1)):
            libc.mallopt(option, value)


def seconds_of_process() -> float:
    """Returns the time since this process imported dense_jax, in seconds."""
    return time.perf_counter() - dense_jax.IMPORTED


def process_bytes() -> int:
    """Returns the largest memory that this process has held so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Logs that the body does `what`, such as "compiling the training step", and how long it took."""
    _LOG.info("%s", what)
    start = time.perf_counter()
    yield
    _LOG.info("%s took %s", what, duration(time.perf_counter() - start))
