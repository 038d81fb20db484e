"""Training: from a config and a workdir to a scored checkpoint.

With `run`, the only reader of the whole config; every other room takes plain arguments.
"""

import contextlib
import functools
import hashlib
import logging
import pathlib
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dense_jax import data, metrics, plots, storage
from dense_jax.command import PREEMPTED
from dense_jax.config import check
from dense_jax.data import balance, borders, pipeline, verify
from dense_jax.data.cache import Cached
from dense_jax.data.tiles import tilings
from dense_jax.devices import cost, distributed, mesh
from dense_jax.devices import runtime as startup
from dense_jax.evaluation import scoring
from dense_jax.models import pretrained
from dense_jax.program import (
    assemble,
    batch_shapes,
    jit_eval_step,
    jit_train_step,
    placed,
    state_placement,
    step_shapes,
)
from dense_jax.training import device_cache, steps
from dense_jax.workdir import files as workdir
from dense_jax.workdir.record import Member, members, restore, summary

_LOG = logging.getLogger("dense_jax")
# The fields that may differ between processes: where a disk is, and what changes no number.
PER_PROCESS = ("data.root", "data.workers", "data.verify")


@distributed.together()
def train(config: ConfigDict, directory: str) -> None:
    """Trains the config's model in a workdir, or goes on where the workdir's run stopped.

    With config.num_seeds, several seeds train side by side, each on its share of the devices and in
    a workdir of its own; together they stop, resume and fail.

    Exits with PREEMPTED after SIGTERM or Ctrl-C. Raises ValueError for bad input, before any
    compilation, and FloatingPointError when loss or gradient are no longer finite. Several processes
    must have the same code, config, data and workdir, and fail together.
    """
    imported = startup.seconds_of_process()
    path = workdir.check_path(directory)
    job = members(config, path)
    distributed.agree(lambda: _facts(config, job))
    finished = [result for each in job if (result := each.result)]
    if finished and len(finished) == len(job):
        for each, result in zip(job, finished, strict=True):
            print(f"{each.path} is finished: {summary(result)}")
        return
    check(config)
    mesh.check_shares(config.num_seeds, config.batch_size, config.num_microbatches)
    source, eval_source = (
        data.open_dataset(config.data.name, config.data.root, split)
        for split in (config.data.train_split, config.data.eval_split)
    )
    dataset = describe(source, eval_source)
    for each in job:
        workdir.compare_dataset(each.path, dataset, config.data.root)
    train_source: Any = source
    if config.border.weight > 0:
        train_source = borders.Bordered(source, **config.border.to_dict())

    # What model, loss, augmentation or weights cannot do is said here, before anything is written.
    weights = config.loss_options.class_weights
    if isinstance(weights, str):
        weights = balance.class_weights(weights, source)
        named = zip(source.class_names, weights, strict=True)
        _LOG.info("class weights: %s", ", ".join(f"{name} {w:.4g}" for name, w in named))
    run = assemble(config, source.num_classes, source.num_channels, class_weights=weights)
    shapes = run.shapes()
    canvas = config.data.canvas_size or tuple(source.sizes.max(axis=0).tolist())
    of_batch = batch_shapes(config, canvas, source.num_channels)
    together, devices = mesh.make_mesh(), mesh.make_mesh(config.num_seeds)
    # A state is saved, restored and evaluated over all devices, and trained on its seed's own.
    placement = state_placement(config, shapes, together)
    train_step = jit_train_step(run, devices, placement)
    # Of arrays as they will be placed: what is traced here need not be traced again.
    train_step.eval_shape(*step_shapes(run, of_batch, devices, placement), {})
    is_new = not any((each.path / "config.json").exists() for each in job)
    encoder = _published(config, shapes) if is_new else None
    distributed.agree(
        lambda: (
            _facts_of_split(config.data.train_split, source)
            | _facts_of_split(config.data.eval_split, eval_source)
            | {"model.pretrained": _digest(x.tobytes() for x in jax.tree.leaves(encoder))}
        )
    )
    distributed.check_shared(path)
    if config.data.verify:
        verify.verify(source)
        verify.verify(eval_source)
    resident: Mapping[str, jax.Array] = {}
    stream: dict[str, Any] = {"canvas": canvas, "workers": config.data.workers}
    if config.data.cache == "host":
        train_source = Cached(train_source)
    elif config.data.cache == "device":
        resident, train_source = device_cache.load(train_source, of_batch, devices)
        stream = {"canvas": None}  # of numbers: nothing for workers to do
    if config.data.cache != "none":
        eval_source = Cached(eval_source)
    tiles = tilings(
        eval_source, dataset["image_size"], config.eval.tile_size, config.eval.margin, run.context
    )

    for each in job:
        each.open(dataset)
    everywhere = mesh.replicated(together)
    keys = [
        jax.jit(functools.partial(jax.random.key, each.config.seed), out_shardings=everywhere)()
        for each in job
    ]
    states = restore(job, placed(shapes, placement))
    if states is None:
        # Not yet read where the run was cut off before its first checkpoint.
        encoder = encoder or _published(config, shapes)
        init = jax.jit(run.init, out_shardings=placement)
        states = [init(key, encoder=encoder) for key in keys]
    first = int(states[0].step)
    state, one = mesh.stack(states, placement, devices), mesh.unstacker(placement, devices)
    key = mesh.stack(keys, everywhere, devices)
    del states  # only the stacked ones take memory from here on
    num_parameters = sum(x.size for x in jax.tree.leaves(shapes.params))
    _LOG.info(
        "%s: %d parameters, steps %d to %d, %d training and %d evaluation examples on %d %s%s",
        "resuming" if first else "starting",
        *(num_parameters, first + 1, config.num_steps, len(source), len(eval_source)),
        *(devices.size, jax.devices()[0].device_kind),
        f", shared by {len(job)} seeds" if len(job) > 1 else "",
    )

    eval_step = jit_eval_step(run, together)
    mine, host, num_hosts = mesh.share(devices)
    streams = [
        pipeline.train_batches(
            train_source,
            seed=job[k].config.seed,
            batch_size=config.batch_size,
            step=first,
            host=host,
            num_hosts=num_hosts,
            **stream,
        )
        for k in mine
    ]

    seconds: list[float] = []  # of steps
    before: float | None = None  # when the step before was done

    def record(step: int, values: Mapping[str, jax.Array], names: Mapping[int, Any]) -> None:
        """Waits for a step's metrics, of all seeds, and records them."""
        nonlocal before
        shared = {}
        if step % config.log_every == 0:
            shared = {"train/learning_rate": np.asarray(run.schedule(step - 1)).item()}
        of_seeds = {name: np.atleast_1d(np.asarray(value)) for name, value in values.items()}
        now = time.perf_counter()
        if before is not None:
            seconds.append(now - before)
        before = now
        for k, each in enumerate(job):
            of_seed = {name: value[k].item() for name, value in of_seeds.items()}
            each.record(step, of_seed | shared, names.get(k, ()))

    def save(step: int, state: steps.TrainState) -> None:
        for each in job:
            each.best.wait()  # its scores are on disk: it must not be missing after a kill
            each.latest.wait()  # no seed is ever two checkpoints ahead of another
        for k, each in enumerate(job):
            each.save(step, one(state, k))

    def evaluate(step: int, state: steps.TrainState) -> None:
        for k, each in enumerate(job):
            of_seed, rows = one(state, k), []

            def show(i: int, classes: np.ndarray, label: np.ndarray, rows=rows) -> None:
                example = eval_source[i]
                pictures = plots.comparison(example["image"], label, classes, palette)
                rows.append((example["name"], pictures))

            counts = scoring.score(
                eval_step,
                of_seed.variables(),
                tiles,
                mesh=together,
                per_image=False,
                receive=show,
                num_received=config.eval.num_pictures,
                batch_size=config.eval.batch_size,
                workers=config.data.workers,
            )
            scores = metrics.named_scores(metrics.summarize(counts), source.class_names)
            each.score(step, of_seed, scores, plots.contact_sheet(rows, colors) if rows else None)

    palette = plots.palette_of(source)
    colors = plots.colors_of(source.class_names, palette) | plots.MARKS
    pending = None  # the step whose metrics are still on their way
    with contextlib.ExitStack() as stack:
        for each in job:
            each.start(first)
            stack.callback(each.close)
        for batches in streams:
            stack.callback(batches.close)
        interrupts = stack.enter_context(Interrupts())
        if first and _due(first, config.eval_every, config.num_steps):
            evaluate(first, state)  # cut off between the save and the end of the evaluation
        program = peak_bytes = None
        prepared = startup.seconds_of_process()
        for step in range(first + 1, config.num_steps + 1):
            each_batch = [next(batches) for batches in streams]
            names = {k: batch["name"] for k, batch in zip(mine, each_batch, strict=True)}
            batch = mesh.to_global(pipeline.join(each_batch), devices)
            if program is None:
                program = train_step.lower(state, batch, key, resident).compile()
                peak_bytes = cost.memory(program)["peak"]
            state, values = program(state, batch, key, resident)
            if step == first + 1:
                jax.block_until_ready(values)
                stepped = startup.seconds_of_process()
                _LOG.info(
                    "the first step was done %.1f s after the start of the process: %.1f s until "
                    "training was called, %.1f s for data and state, %.1f s for the batch and the step",
                    *(stepped, imported, prepared - imported, stepped - prepared),
                )
            if pending:
                record(*pending)  # of the step before: the device never waits for the host
            pending = step, values, names
            interrupted = interrupts.requested(step)
            evaluate_now = _due(step, config.eval_every, config.num_steps)
            if interrupted or evaluate_now or step % config.checkpoint_every == 0:
                record(*pending)  # first, so that a state that is not finite is never saved
                pending = None
                save(step, state)
            if interrupted:
                print(f"stopped after step {step}; the same command resumes", file=sys.stderr)
                sys.exit(PREEMPTED)
            if evaluate_now:
                evaluate(step, state)
            if pending is None:
                before = None  # it saved, and maybe evaluated
    # Unpadded convolutions are given the context of a crop, but none where logits_step mirrors it.
    context = 2 * run.context if config.data.resolution == 1.0 else 0
    height, width = (
        round(length / config.data.resolution) + context for length in config.data.crop_size
    )
    image = jax.ShapeDtypeStruct((height, width, source.num_channels), "uint8")
    needed = {
        # Forward, of one image as large as the crops.
        "flops_per_image": cost.flops(run.predict_step, shapes.variables(), image),
        # In training, of each seed; not known where this start had nothing left to do.
        "images_per_second": config.batch_size / float(np.median(seconds)) if seconds else None,
        "peak_bytes": peak_bytes,  # of a device, in training
    }
    for each in job:
        each.finish(num_parameters, needed)


def describe(source: Any, eval_source: Any) -> dict[str, Any]:
    """What dataset.json holds: all that is needed to use the model without the data."""
    return {
        "class_names": source.class_names,
        "num_channels": source.num_channels,
        "values": source.values,
        "value_range": source.value_range,
        "palette": plots.palette_of(source),
        "num_examples": len(source),
        "image_size": np.concatenate([source.sizes, eval_source.sizes]).max(axis=0).tolist(),
        "fingerprint": source.fingerprint,
        "eval_fingerprint": eval_source.fingerprint,
    }


def _facts(config: ConfigDict, job: Sequence[Member]) -> dict[str, Any]:
    """Returns the facts that all processes must share before they open the data."""
    package = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
    fields = workdir.flatten(config.to_dict())
    return storage.to_json(
        workdir.environment()["versions"]
        | {"the code of dense_jax": _digest(file.read_bytes() for file in package)}
        | {"the number of devices": jax.local_device_count()}
        | {name: value for name, value in fields.items() if name not in PER_PROCESS}
        | {"what --workdir holds": [each.contents for each in job]}
    )


def _facts_of_split(split: str, source: Any) -> dict[str, Any]:
    facts = describe(source, source)
    return storage.to_json({f"{name} of the {split} images": v for name, v in facts.items()})


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]


class Interrupts:
    """SIGTERM (preemption) and Ctrl-C ask the loop to save and stop; a second one kills.

    With several processes JAX has a SIGTERM handler of its own, which tells all of them; Ctrl-C is
    passed on to it.
    """

    def __enter__(self):
        self._received = False
        numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        self._received = True
        signal.signal(number, self._before[number])
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Whether to stop after this step: on every host the same answer."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received


def _published(config: ConfigDict, shapes: steps.TrainState) -> Any:
    """The encoder's published weights, or None if the config has none."""
    if not config.model.pretrained:
        return None
    return pretrained.load(
        config.model.pretrained,
        config.model.encoder,
        config.model.norm,
        {name: values["encoder"] for name, values in shapes.variables().items() if values},
    )


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last
