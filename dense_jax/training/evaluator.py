"""Evaluates during training: compiles the evaluation step for each shape of images."""

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from dense_jax.devices import runtime
from dense_jax.program import jit_eval_step
from dense_jax.training import steps
from dense_jax.training.task import Task


class Evaluator:
    """The evaluation step of a task, called as `scoring.score` calls it."""

    def __init__(self, task: Task, devices: Mesh):
        eval_step = functools.partial(
            steps.eval_step,
            logits_step=task.program.logits_step,
            num_classes=task.program.num_classes,
            regions=task.program.regions,
            loss_fn=task.training.loss_fn,
        )
        self._eval_step = jit_eval_step(task.program._replace(eval_step=eval_step), devices)
        self._compiled: dict[tuple[int, ...], Any] = {}  # by the shape of the batch's images
        self._compile_seconds = 0.0

    def __call__(self, variables: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
        """Starts the evaluation of a batch. Compiles the step for each new shape."""
        shape = batch["image"].shape
        if shape not in self._compiled:
            start = time.perf_counter()
            with runtime.announced(f"compiling the evaluation of {shape[1]} x {shape[2]} pixels"):
                self._compiled[shape] = self._eval_step.lower(variables, batch).compile()
            self._compile_seconds += time.perf_counter() - start
        return self._compiled[shape](variables, batch)

    def clock(self) -> float:
        """Returns a time in seconds that stands still during compilation."""
        return time.perf_counter() - self._compile_seconds
