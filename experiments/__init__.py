"""Experiments: modules with `get_config()` and, if they define a sweep, `get_sweep()`.

The modules are imported as `dense_jax.experiments`, both from a clone (through a link in
dense_jax/) and from an installed package, so that a project may have a package `experiments` too.
"""
