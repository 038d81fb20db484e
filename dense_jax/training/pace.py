"""When a run evaluates, how fast it is, and how long it will take."""

import time

import numpy as np
from ml_collections import ConfigDict

from dense_jax.spelling import duration, speed

RECENT = 100  # the number of steps whose mean duration predicts that of the next steps


def is_due(step: int, config: ConfigDict) -> bool:
    """Returns whether to evaluate after a step."""
    return step % config.eval_every == 0 or step == config.num_steps


class Pace:
    """Measures the durations of steps and evaluations, and predicts when a run will end."""

    def __init__(self, config: ConfigDict):
        self._config = config
        self._steps: list[float] = []  # seconds
        self._evaluations: list[float] = []  # seconds, without compilation
        self._step_ended: float | None = None
        self._started = time.perf_counter()
        self._evaluating = 0.0  # seconds, with compilation

    def end_step(self) -> None:
        """Measures the time since the last call. After `pause`, only notes the time."""
        now = time.perf_counter()
        if self._step_ended is not None:
            self._steps.append(now - self._step_ended)
        self._step_ended = now

    def pause(self) -> None:
        """Excludes the time until the next step ends from the measurements."""
        self._step_ended = None

    def add_evaluation(self, seconds: float, with_compilation: float) -> None:
        """Adds the duration of an evaluation of all seeds, without and with compilation."""
        self._evaluations.append(seconds)
        self._evaluating += with_compilation

    @property
    def evaluation_share(self) -> float:
        """Returns the share of evaluations in the time since the start of this process's training."""
        return self._evaluating / (time.perf_counter() - self._started)

    @property
    def seconds_per_evaluation(self) -> float | None:
        """Returns the median duration of an evaluation of all seeds. None without evaluations."""
        return float(np.median(self._evaluations)) if self._evaluations else None

    @property
    def images_per_second(self) -> float | None:
        """Returns the median training speed of each seed. None if no step was measured."""
        return self._config.batch_size / float(np.median(self._steps)) if self._steps else None

    def text(self, step: int) -> str:
        """Returns the recent speed and the time left after `step`, as in "35.2 images/s, ETA 4.2 s".

        The time includes that of all evaluations after `step` - 1. If no evaluation was measured yet,
        their number is shown instead. Returns "" if no step was measured.
        """
        if not self._steps:
            return ""
        config, seconds = self._config, float(np.mean(self._steps[-RECENT:]))
        last_is_extra = config.num_steps % config.eval_every > 0
        num_evaluations = (
            config.num_steps // config.eval_every - (step - 1) // config.eval_every + last_is_extra
        )
        left, more = (config.num_steps - step) * seconds, ""
        if self._evaluations:
            left += num_evaluations * float(np.mean(self._evaluations))
        else:
            more = f" + {num_evaluations} evaluation{'s' if num_evaluations > 1 else ''}"
        return f"{speed(config.batch_size / seconds)}, ETA {duration(left)}{more}"
