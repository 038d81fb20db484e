"""Summarizes many runs in tables and one HTML page: python -m dense_jax.report --workdir=DIR."""
