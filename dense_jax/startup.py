"""What makes a command start sooner, and how long it took: `jit`'s programs are kept on disk."""

import os
import pathlib
import time

import jax

from dense_jax.data import verify


def keep_programs() -> None:
    """Called by the commands: what XLA compiles is kept in the user's cache folder.

    JAX keeps what took longer than jax_persistent_cache_min_compile_time_secs. A folder that the
    user has set (JAX_COMPILATION_CACHE_DIR) is left alone, and so is JAX_ENABLE_COMPILATION_CACHE.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(verify.cache_folder() / "programs"))


def seconds_of_process() -> float:
    """Since this process was started by the operating system, Linux: before any import."""
    fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # proc(5): starttime, since boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
