"""Runs a sweep: a list of runs that an experiment file defines, for example with `grid`.

    python -m dense_jax.sweep --config=experiments/ablation.py --workdir=DIR
    python -m dense_jax.sweep ... --jobs=2                   # two runs at once, on this machine
    python -m dense_jax.sweep ... --evaluate=test            # also scores each run on split `test`
    python -m dense_jax.sweep ... --list                     # prints runs, flags and statuses
    python -m dense_jax.sweep ... --index=3                  # runs only the run with this index
    python -m dense_jax.sweep ... --config.data.name=folder  # passed on to every run
    python -m dense_jax.sweep ... --kept=benchmarks/results/ablation

A sweep is the list that an experiment's `get_sweep()` returns. Each item is a dict
{dotted.path: value} that overrides the config for one run. Each run is a separate process,
`python -m dense_jax.main`, with the workdir DIR/RUN_NAME and the log DIR/RUN_NAME/log.txt.
Running the command again skips finished runs, resumes unfinished runs and retries failed runs.
DIR/sweep.json records the runs.

With --kept=KEPT, the small files of each finished run are copied to KEPT/RUN_NAME (see `keep`), and
the runs there are taken as finished, if their configs are those of the sweep: the sweep goes on in
another DIR or on another machine. DIR then has these files, too, so that `report` reads them.

If an override has a list of learning rates, trials choose one of them first (see `tuning`):

    {"label": "U-Net", "optimizer.learning_rate": [0.001, 0.003, 0.01], "seed": 0}

Never imports jax or defines flags, because every command may import this module.
"""

import itertools
from collections.abc import Sequence
from typing import Any


def grid(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns every combination of the axes' values. The last axis varies fastest.

    Pass dotted paths as `grid(**{"model.upsampling": ["bilinear", "nearest"], "seed": [0, 1]})`.
    Cross-validation is `{"data.folds": [5], "data.fold": range(5)}`.
    """
    for path, values in axes.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(f"axis {path!r} needs a list of values, got {values!r}")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
