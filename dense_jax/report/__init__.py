"""Many runs -> tables and one page: python -m dense_jax.report --workdir=DIR."""
