"""Runs a sweep; see `dense_jax.sweep`."""

from dense_jax import command
from dense_jax.sweep import define_flags, main, parse_flags

if __name__ == "__main__":
    define_flags()
    command.run(main, flags_parser=parse_flags)
