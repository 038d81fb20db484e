"""Experiments: `get_config()`, and `get_sweep()` where there is something to sweep."""
