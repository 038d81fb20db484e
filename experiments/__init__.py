"""Experiments: `get_config()`, and `get_sweep()` where there is something to sweep.

They are imported as `dense_jax.experiments`, in a clone (by a link in dense_jax/) as well as from an
installed package, so that a project may have an `experiments` of its own.
"""
