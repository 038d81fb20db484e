"""Semantic segmentation in JAX, for comparing encoders, decoders, upsampling, skips and losses."""

import time

__version__ = "0.1.0"
IMPORTED = time.perf_counter()  # time of the import, in seconds


def __getattr__(name: str):
    """Imports `load` on first access, so that importing dense_jax does not import jax."""
    if name == "load":
        from dense_jax.inference.predictor import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
