"""The training loop, with its checkpoints and evaluations."""

import sys

from ml_collections import ConfigDict

from dense_jax.command import PREEMPTED
from dense_jax.config import check
from dense_jax.devices import distributed
from dense_jax.training.ensemble import Ensemble, run_folders
from dense_jax.training.pace import is_due
from dense_jax.training.preemption import Interrupts
from dense_jax.training.task import facts, open_task
from dense_jax.workdir import files
from dense_jax.workdir.record import summary


@distributed.together()
def train(config: ConfigDict, directory: str, experiment: str | None = None) -> None:
    """Trains the model of a config in the workdir `directory`, or resumes the run there.

    experiment: The file that the config is from, which is copied to the workdir.

    If config.num_seeds > 1, several seeds train at once. Each seed uses an equal part of the
    devices, and a separate subfolder of the workdir.

    All processes must have the same code, config, data and workdir. If one process fails, all fail.

    Exits with status PREEMPTED after SIGTERM or Ctrl-C. Raises ValueError for invalid input, before
    any compilation. Raises FloatingPointError if the loss or the gradient is not finite.
    """
    path = files.check_path(directory)
    folders = run_folders(config, path, experiment)
    distributed.agree(lambda: facts(config, folders))
    results = [folder.result for folder in folders]
    if results and all(results):
        for folder, result in zip(folders, results, strict=True):
            print(f"{folder.path} is finished: {summary(result or {})}")
        return
    check(config)
    task = open_task(config, folders)
    distributed.check_shared(path)
    with Ensemble(config, task, folders) as seeds, Interrupts() as interrupts:
        if seeds.step and is_due(seeds.step, config):
            seeds.evaluate()  # the run was killed between saving and scoring this step
        for step in range(seeds.step + 1, config.num_steps + 1):
            seeds.train_step()
            interrupted = interrupts.requested(step)
            evaluate_now = is_due(step, config)
            if interrupted or evaluate_now or step % config.checkpoint_every == 0:
                seeds.save()
            if interrupted:
                print(f"stopped after step {step}; the same command resumes", file=sys.stderr)
                sys.exit(PREEMPTED)
            if evaluate_now:
                seeds.evaluate()
        seeds.finish()
