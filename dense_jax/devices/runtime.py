"""The runtime setup of the commands: log lines, compiled programs, memory and devices."""

import contextlib
import ctypes
import importlib.util
import logging
import os
import time

import absl.logging
import jax

import dense_jax
from dense_jax import storage

IN_LITTLE_MEMORY = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def prepare() -> None:
    """Sets up a command that computes. Call it before JAX is asked for its devices."""
    show_own_lines()
    keep_programs()
    keep_memory()
    check_devices()


def show_own_lines() -> None:
    """Shows our log lines from INFO on, and those of libraries from WARNING on."""
    absl.logging.set_verbosity(absl.logging.WARNING)  # orbax logs much
    logging.getLogger("dense_jax").setLevel(logging.INFO)


def check_devices() -> None:
    """Raises ValueError if JAX_PLATFORMS names a platform that JAX cannot use here."""
    wanted = jax.config.values["jax_platforms"]
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that the plug-in is there
        if not wanted:
            raise
        jax.config.update("jax_platforms", None)
        platforms = sorted({"cpu", jax.default_backend()})
        raise ValueError(
            f"JAX_PLATFORMS={wanted} cannot be used: {str(error) or 'its plug-in is missing'}. Here "
            f"JAX has: {', '.join(platforms)}. Unset JAX_PLATFORMS, or install what it names"
        ) from error


def keep_programs() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next start is faster.

    JAX keeps programs that took longer than jax_persistent_cache_min_compile_time_secs. A folder
    that the user has set (JAX_COMPILATION_CACHE_DIR) wins.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = storage.cache_folder() / "programs"
        with contextlib.suppress(OSError):  # a folder that cannot be made: compiled again next time
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))


def keep_memory() -> None:
    """Keeps freed memory for the next step, where only a CPU can compute.

    XLA:CPU allocates the temporaries of each step anew. glibc serves blocks this large with mmap and
    returns them to the operating system, so every page faults again in every step: a sixth of the
    step time of the default network. We turn mmap off. That requires a single malloc arena, because
    other arenas cannot grow. With an accelerator we change nothing, because decoding threads profit
    from arenas of their own.

    We also select XLA:CPU's memory-saving scheduler. The default scheduler runs everything it can at
    once and needs up to 1.7 times the temporary memory. XLA_FLAGS set by the user take precedence.
    """
    # jax.default_backend() would start threads, with arenas of their own.
    if any(importlib.util.find_spec(plugin) for plugin in ("jax_plugins", "libtpu")):
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if IN_LITTLE_MEMORY not in flags:
        os.environ["XLA_FLAGS"] = f"{IN_LITTLE_MEMORY} {flags}".strip()
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(libc, "mallopt"):  # glibc
        # malloc.h: M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD (-1: never)
        for option, value in ((-8, 1), (-4, 0), (-1, -1)):
            libc.mallopt(option, value)


def seconds_of_process() -> float:
    """Returns the seconds since a command imported the package, its first action."""
    return time.perf_counter() - dense_jax.IMPORTED
