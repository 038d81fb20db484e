"""Trains one run per seed, all at once. The runs stop, resume and fail together.

The methods of `Ensemble` follow four rules:
- The device never waits for the host. A step's metrics are recorded while the next step runs.
- A state is saved only after its metrics are recorded. Recording fails if a metric is NaN or
  infinite, and then the state is not saved.
- No seed is ever more than one checkpoint ahead of another seed.
- The checkpoint of the best evaluation is on disk before the next regular checkpoint is saved.
"""

import contextlib
import copy
import functools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dense_jax import class_colors, data, drawing, metrics, regions
from dense_jax.data import levels, pipeline
from dense_jax.data.cache import Cached
from dense_jax.data.tiles import tilings
from dense_jax.devices import cost, mesh, runtime
from dense_jax.devices.one_step_late import OneStepLate
from dense_jax.evaluation import baselines, scoring
from dense_jax.evaluation.worst import Worst
from dense_jax.training import device_cache, replicas
from dense_jax.training.evaluator import Evaluator
from dense_jax.training.initial import initial_weights
from dense_jax.training.pace import Pace
from dense_jax.training.steps import TrainState
from dense_jax.training.task import Task
from dense_jax.workdir import files
from dense_jax.workdir.record import RunFolder, RunRecord

_LOG = logging.getLogger("dense_jax")


def run_folders(
    config: ConfigDict, path: epath.Path, experiment: str | None = None
) -> list[RunFolder]:
    """Returns the folder of each run: `path` itself for one seed, or one subfolder per seed.

    The subfolder of seed 5, for example, is "seed=5". Seeds start at config.seed.

    Raises ValueError if `path` belongs to another config, or if only some runs were started.
    """
    seeds = [path / f"seed={seed}" for seed in range(config.seed, config.seed + config.num_seeds)]
    if config.num_seeds == 1:
        if not (path / "config.json").exists() and any(
            (seed / "config.json").exists() for seed in files.runs(path)
        ):
            raise ValueError(
                f"{path} has the workdirs of several seeds: use another --workdir for one"
            )
        folders = [RunFolder(path, config, experiment=experiment)]
    elif (path / "config.json").exists():
        raise ValueError(
            f"{path} is the workdir of one run: use another --workdir for num_seeds={config.num_seeds}"
        )
    else:
        folders = []
        for seed, folder in enumerate(seeds, config.seed):
            seed_config = copy.deepcopy(config)
            seed_config.update(seed=seed, num_seeds=1)
            folders.append(RunFolder(folder, seed_config, folder.name, experiment))
    for folder in folders:
        files.compare(folder.path, folder.config)
    new = [folder.path for folder in folders if not folder.is_begun]
    begun = [folder.path for folder in folders if folder.contents["latest"]]
    if config.num_seeds > 1 and new and begun:
        raise ValueError(
            f"{begun[0]} was begun without {new[0]}: they cannot train together. Use another "
            "--workdir, or train each in its own, with --config.num_seeds=1 and its --config.seed"
        )
    return folders


class Ensemble:
    """A context manager that trains and evaluates all seeds of a config together.

    step: The number of optimizer steps done, which is the same for all seeds.
    """

    def __init__(self, config: ConfigDict, task: Task, folders: Sequence[RunFolder]):
        self._config, self._task = config, task
        self._devices, self._all_devices = task.placed.mesh, mesh.make_mesh()
        self._seeds_here, self._host, self._num_hosts = mesh.share(self._devices)
        self._late = OneStepLate(self._record)
        self._program: Any = None  # the compiled training step
        self._pace = Pace(config)
        self._counts: list[np.ndarray] = []  # each seed's confusion matrix in the last evaluation
        source, evaluated = self._load_data()
        self._tiles = tilings(
            *(evaluated, task.dataset["ladder"], config.eval.tile_size, config.eval.margin),
            task.program.context,
        )
        self._evaluator = Evaluator(task, self._all_devices)
        computed = sum(len(tiles) * int(tiles.tile_size.prod()) for tiles in self._tiles)
        _LOG.info(
            "an evaluation computes %.2f times the pixels of its images, by %d programs",
            *(computed / evaluated.sizes.prod(axis=1, dtype=np.int64).sum(), len(self._tiles)),
        )
        origin = task.initial.origin if task.initial else None
        with contextlib.ExitStack() as stack:
            self._records: list[RunRecord] = []
            for folder in folders:
                self._records.append(RunRecord(folder, task.dataset, origin))
                stack.callback(self._records[-1].close)  # even if the next folder cannot be opened
            self._start()
            self._batches = [self._open_batches(source, k) for k in self._seeds_here]
            for batches in self._batches:
                stack.callback(batches.close)
            self._opened = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def _load_data(self) -> tuple[Any, data.Examples]:
        """Returns the training source and the evaluation source, cached according to data.cache."""
        config, task = self._config, self._task
        source = task.source
        evaluated = levels.with_levels(task.eval_source, task.levels_of)
        self._resident: Mapping[str, jax.Array] = {}
        self._stream: dict[str, Any] = {"canvas": task.canvas, "workers": config.data.workers}
        if config.data.cache == "host":
            source = Cached(source)
        elif config.data.cache == "device":
            self._resident, source = device_cache.load(source, task.batch_shapes, self._devices)
            self._stream = {"canvas": None}  # only row numbers, so workers have nothing to do
        if config.data.cache != "none":
            evaluated = Cached(evaluated)
        return source, evaluated

    def _start(self) -> None:
        """Restores the states of all seeds, or initializes them if `restore` returns None.

        Sets `step`, and deletes the checkpoints and log records of later steps.
        """
        _LOG.info("initializing or restoring the weights")
        config, task = self._config, self._task
        whole, shardings = mesh.replicated(self._all_devices), task.placed.shardings
        keys = [
            jax.jit(functools.partial(jax.random.key, record.config.seed), out_shardings=whole)()
            for record in self._records
        ]
        shapes = task.training.shapes()
        states = restore(self._records, mesh.placed(shapes, shardings))
        if states is None:
            # If a run was killed before its first checkpoint, its config.json exists, so
            # `open_task` did not read the weights.
            initial = task.initial or initial_weights(config, task.program, task.dataset)
            init = jax.jit(task.training.init_state, out_shardings=shardings)
            states = [init(key, initial.arrays) for key in keys]
        self.step = int(states[0].step)
        self._states = replicas.stack(states, shardings, self._devices)
        self._state_of = replicas.unstacker(shardings, self._devices)
        self._keys = replicas.stack(keys, whole, self._devices)
        self._num_parameters = sum(x.size for x in jax.tree.leaves(shapes.params))
        num_seeds = len(self._records)
        _LOG.info(
            "%s: %d parameters, steps %d to %d, %d training and %d evaluation examples on %d %s%s",
            "resuming" if self.step else "starting",
            *(self._num_parameters, self.step + 1, config.num_steps),
            *(len(task.source), len(task.eval_source)),
            *(self._devices.size, jax.devices()[0].device_kind),
            f", shared by {num_seeds} seeds" if num_seeds > 1 else "",
        )
        for record in self._records:
            record.rewind(self.step)

    def _open_batches(self, source: Any, k: int) -> Any:
        """Returns an iterator over the batches of the k-th seed, from the next step on."""
        return pipeline.train_batches(
            source,
            seed=self._records[k].config.seed,
            batch_size=self._config.batch_size,
            step=self.step,
            host=self._host,
            num_hosts=self._num_hosts,
            repeats=self._task.repeats,
            **self._stream,
        )

    def train_step(self) -> None:
        """Starts the next step of all seeds, and records the previous step."""
        batches = [next(batches) for batches in self._batches]
        names = {k: batch["name"] for k, batch in zip(self._seeds_here, batches, strict=True)}
        batch = mesh.to_global(pipeline.join(batches), self._devices)
        arguments = self._states, batch, self._keys, self._resident
        is_first = self._program is None
        if is_first:
            with runtime.announced("compiling the training step"):
                self._program = self._task.placed.train_step.lower(*arguments).compile()
        self._states, values = self._program(*arguments)
        self.step += 1
        if is_first:
            jax.block_until_ready(values)
            _LOG.info(
                "the first step was done %.1f s after the start of the process",
                runtime.seconds_of_process(),
            )
        self._late.put(self.step, values, names)

    def _record(self, step: int, values: Mapping[str, jax.Array], names: Mapping[int, Any]) -> None:
        """Waits for the metrics of one step, and records them for all seeds."""
        shared = {}
        if step % self._config.log_every == 0:
            learning_rate = np.asarray(self._task.training.schedule(step - 1)).item()
            shared = {"train/learning_rate": learning_rate}
        arrays = {name: np.atleast_1d(np.asarray(value)) for name, value in values.items()}
        self._pace.end_step()
        pace = self._pace.text(step)
        for k, record in enumerate(self._records):
            seed_values = {name: array[k].item() for name, array in arrays.items()}
            record.record(step, seed_values | shared, names.get(k, ()), pace)

    def save(self) -> None:
        """Saves the states of all seeds."""
        self._late.flush()
        self._pace.pause()
        for record in self._records:
            record.best.wait()  # the best scores are on disk, so their state must be, too
            record.latest.wait()
        for k, record in enumerate(self._records):
            record.save(self.step, self._state_of(self._states, k))

    def evaluate(self) -> None:
        """Scores all seeds on the evaluation split."""
        start, began = self._evaluator.clock(), time.perf_counter()
        self._counts = [
            self._evaluate(self._state_of(self._states, k), record)
            for k, record in enumerate(self._records)
        ]
        self._pace.add_evaluation(self._evaluator.clock() - start, time.perf_counter() - began)
        _LOG.info("evaluations took %.0f %% of the time so far", 100 * self._pace.evaluation_share)

    def _evaluate(self, state: TrainState, record: RunRecord) -> np.ndarray:
        """Scores one seed, and returns its confusion matrix."""
        config, source = self._config, self._task.eval_source
        colors = class_colors.prediction_colors(source)
        palette = class_colors.to_palette(colors)
        rows, num_pictures = {}, config.eval.num_pictures
        worst = Worst(source) if self.step == config.num_steps else None
        start = self._evaluator.clock()

        def receive(i: int, classes: np.ndarray, label: np.ndarray) -> None:
            if worst:
                worst.add(i, classes, label)
            if i >= num_pictures:
                return
            example = source[i]
            image = levels.picture(example["image"], value_range=source.value_range)
            truth, guess = (regions.flat(x, source.regions) for x in (label, classes))
            pictures = drawing.comparison(image, truth, guess, palette)
            rows[i] = example["name"], pictures

        sums = scoring.score(
            self._evaluator,
            state.variables(),
            self._tiles,
            mesh=self._all_devices,
            per_image=False,
            receive=receive,
            num_received=None if worst else num_pictures,
            batch_size=config.eval.batch_size,
            workers=config.data.workers,
        )
        counts = sums["counts"]
        scores = metrics.named_scores(metrics.summarize(counts), source.output_names)
        # For a plain cross-entropy, this is the mean over pixels. For other losses, it is the mean
        # over tiles, weighted by their valid pixels. Most images are a single tile.
        scores["eval/loss"] = float(sums["loss"] / counts.sum()) if counts.any() else math.nan
        colors |= class_colors.MARKS
        picture = drawing.contact_sheet([rows[i] for i in sorted(rows)], colors) if rows else None
        record.score(self.step, state, scores, picture, self._evaluator.clock() - start)
        if worst and (sheet := worst.draw()) is not None:
            record.keep_worst(sheet)
        return counts

    def finish(self) -> None:
        """Closes the records, then writes the results of all seeds and the cost of training."""
        _LOG.info("writing the results")
        self._opened.close()  # first, so that a finished run has all its checkpoints on disk
        config, task = self._config, self._task
        # Unpadded convolutions need context around the crop. At other resolutions, the model
        # mirrors the border instead.
        context = 2 * task.program.context if config.data.resolution == 1.0 else 0
        size = [round(n / config.data.resolution) + context for n in config.data.crop_size]
        num_channels = task.dataset["num_channels"]
        image = jax.ShapeDtypeStruct((*size, num_channels), "uint8")
        variables = task.program.variables(num_channels)
        costs = {
            # The forward pass on one image of the crop size.
            "flops_per_image": cost.flops(task.program.predict_step, variables, image),
            "images_per_second": self._pace.images_per_second,
            "seconds_per_evaluation": self._pace.seconds_per_evaluation,
            # The largest memory that this process has held on the host.
            "process_bytes": runtime.process_bytes(),
            # The peak memory of each device in training.
            "peak_bytes": cost.memory(self._program)["peak"] if self._program else None,
            "evaluation_share": self._pace.evaluation_share,
        }
        histogram = baselines.gray_histogram(task.eval_source)
        for record, counts in zip(self._records, self._counts, strict=True):
            comparison = baselines.compare(counts, task.eval_source.class_names, histogram)
            about = {"num_eval_images": len(task.eval_source), **comparison}
            record.finish(self._num_parameters, costs, about)
            for sentence in baselines.sentences(comparison):
                print(sentence)


def restore(records: Sequence[RunRecord], like: Any) -> list[Any] | None:
    """Returns the states at the newest step saved by all runs, or None if there is no such step.

    like: The shapes of a state, with their shardings.

    Raises ValueError if one run was trained further without the others.
    """
    states = [record.latest.restore_latest(like) for record in records]
    steps = [0 if state is None else int(state.step) for state in states]
    first = min(steps)
    for k, (record, step) in enumerate(zip(records, steps, strict=True)):
        # A command that was killed while saving leaves some runs one checkpoint ahead.
        saved = record.latest.steps
        finished = (record.path / "result.json").exists()
        if step > first and (finished or first not in (saved if len(saved) > 1 else [0])):
            raise ValueError(
                f"{record.path} is at step {step}, but another seed at {first}: they no longer train "
                f"together. Finish each in its workdir, with --config.seed={record.config.seed} and so on"
            )
        if step > first > 0:
            states[k] = record.latest.restore(first, like)
    return states if first else None
