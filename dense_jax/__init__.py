"""Semantic segmentation research in JAX: encoder x decoder x upsampling x skips x loss."""

import time

__version__ = "0.1.0"
IMPORTED = time.perf_counter()  # seconds


def __getattr__(name: str):
    """`from dense_jax import load`, which imports jax only for those who ask for it."""
    if name == "load":
        from dense_jax.inference.predictor import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
