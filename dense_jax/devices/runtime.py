"""The setup of every command that computes: log lines, compiled programs, memory and devices."""

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
    """Called by the commands that compute, before they use a device."""
    show_own_lines()
    keep_programs()
    keep_memory()
    check_devices()


def show_own_lines() -> None:
    """Called by the commands: our lines from INFO on, those of libraries from WARNING on."""
    absl.logging.set_verbosity(absl.logging.WARNING)  # orbax tells too much
    logging.getLogger("dense_jax").setLevel(logging.INFO)


def check_devices() -> None:
    """Raises ValueError if JAX_PLATFORMS names what JAX cannot use here."""
    wanted = jax.config.values["jax_platforms"]
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that the plug-in is there
        if not wanted:
            raise
        jax.config.update("jax_platforms", None)
        there = sorted({"cpu", jax.default_backend()})
        raise ValueError(
            f"JAX_PLATFORMS={wanted} cannot be used: {str(error) or 'its plug-in is missing'}. Here "
            f"JAX has: {', '.join(there)}. Unset JAX_PLATFORMS, or install what it names"
        ) from error


def keep_programs() -> None:
    """Called by the commands: what XLA compiles is kept in the user's cache folder.

    JAX keeps what took longer than jax_persistent_cache_min_compile_time_secs. A folder that the
    user has set (JAX_COMPILATION_CACHE_DIR) is left alone, and so is JAX_ENABLE_COMPILATION_CACHE.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = storage.cache_folder() / "programs"
        with contextlib.suppress(OSError):  # it cannot be made: compiled again next time
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))


def keep_memory() -> None:
    """Called by the commands: where only a CPU can compute, freed memory stays for the next step.

    XLA:CPU allocates the temporaries of each step anew. Of so much at once, glibc asks the operating
    system, and gives it back: every page of it faults in every step, which was a sixth of the
    time of the default network's. Without its mmap it needs a single arena, as others cannot grow;
    with an accelerator, decoding threads are better off with their own.

    And XLA:CPU is to start operations in an order that needs little memory: its usual one does all
    that it can at once, and a training step has up to 1.7 times the temporaries. XLA_FLAGS that the
    user has set come after this, and win. Too late once JAX has asked for its devices.
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
    """Returns the seconds since the package was imported, the first thing that a command does."""
    return time.perf_counter() - dense_jax.IMPORTED
