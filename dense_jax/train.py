"""Training: from a config and a workdir to a scored checkpoint.

The only reader of the whole config; every other room takes plain arguments. `train` makes or
resumes a run, `load` restores one for evaluation and prediction.
"""

import contextlib
import functools
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dense_jax import (
    checkpoint,
    cost,
    data,
    device_cache,
    losses,
    mesh,
    metrics,
    models,
    optim,
    plots,
    scoring,
    startup,
    steps,
    workdir,
)
from dense_jax.augment import make_augment
from dense_jax.config import check
from dense_jax.data import balance, borders, pipeline, verify
from dense_jax.data.cache import Cached
from dense_jax.member import members, restore, summary
from dense_jax.models import pretrained
from dense_jax.normalise import NORMALISATIONS
from dense_jax.tiles import Tiles

_LOG = logging.getLogger("dense_jax")
PREEMPTED = 75  # exit status (EX_TEMPFAIL): everything is saved, start the same command again


def train(config: ConfigDict, directory: str) -> None:
    """Trains the config's model in a workdir, or goes on where the workdir's run stopped.

    With config.num_seeds, several seeds train side by side, each on its share of the devices and in
    a workdir of its own; together they stop, resume and fail.

    Exits with PREEMPTED after SIGTERM or Ctrl-C. Raises ValueError for bad input, before any
    compilation, and FloatingPointError when loss or gradient are no longer finite.
    """
    imported = startup.seconds_of_process()
    path = epath.Path(directory).resolve()
    job = members(config, path)
    finished = [result for each in job if (result := each.result)]
    if finished and len(finished) == len(job):
        for each, result in zip(job, finished, strict=True):
            print(f"{each.path} is finished: {summary(result)}")
        return
    check(config)
    source, eval_source = (
        data.open_dataset(config.data.name, config.data.root, split)
        for split in (config.data.train_split, config.data.eval_split)
    )
    dataset = describe(source)
    for each in job:
        workdir.compare_dataset(each.path, dataset)
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
    tiles = Tiles(eval_source, config.eval.tile_size, config.eval.margin, run.context)

    for each in job:
        each.open(dataset)
    everywhere = mesh.replicated(together)
    keys = [
        jax.jit(functools.partial(jax.random.key, each.config.seed), out_shardings=everywhere)()
        for each in job
    ]
    states = restore(job, _placed(shapes, placement))
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
                rows.append(plots.comparison(tiles.source[i]["image"], label, classes, palette))

            matrices = scoring.score(
                eval_step,
                of_seed.variables(),
                tiles,
                mesh=together,
                receive=show,
                num_received=config.eval.num_pictures,
                batch_size=config.eval.batch_size,
                workers=config.data.workers,
            )
            counts = matrices.sum(axis=0, dtype=np.int64)
            scores = named_scores(metrics.summarize(counts), source.class_names)
            each.score(step, of_seed, scores, plots.stack(rows) if rows else None)

    palette = plots.palette_of(source)
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


class Run(NamedTuple):
    """The pure functions of a config; see `steps`."""

    init: Callable[..., steps.TrainState]  # init(key, encoder=None)
    train_step: Callable
    logits_step: Callable
    predict_step: Callable
    eval_step: Callable
    schedule: optax.Schedule
    context: int  # pixels around what a tile predicts that all but train_step need

    def shapes(self) -> steps.TrainState:
        """The training state as jax.ShapeDtypeStructs."""
        return jax.eval_shape(self.init, jax.random.key(0))


def assemble(
    config: ConfigDict,
    num_classes: int,
    num_channels: int,
    class_weights: Sequence[float] | None = None,
) -> Run:
    """Makes a config's model, optimizer, loss and augmentation, and the steps of them.

    class_weights: the numbers that loss_options.class_weights stands for; only training needs them.
    """
    model = models.build(config.model, num_classes)
    schedule = optim.make_schedule(
        config.optimizer.schedule,
        config.optimizer.learning_rate,
        warmup_steps=config.optimizer.warmup_steps,
        num_steps=config.num_steps,
    )
    tx = optim.make_optimizer(
        config.optimizer.name,
        schedule,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
        grad_clip_norm=config.optimizer.grad_clip_norm,
        encoder_lr_multiplier=config.optimizer.encoder_lr_multiplier,
        freeze_encoder=config.model.freeze_encoder,
    )
    options = models.given(config.loss_options.to_dict() | {"class_weights": class_weights})
    loss_fn = functools.partial(losses.LOSSES[config.loss], **options)
    if "border" in config and config.border.weight > 0:  # older runs have no such field
        loss_fn = losses.with_border(loss_fn, class_weights)
    normalise = NORMALISATIONS[normalisation(config.model)]
    resolution = config.data.resolution
    augment = make_augment(
        config.data.crop_size,
        context=model.margin,
        resolution=resolution,
        **config.augment.to_dict(),
    )
    # Unpadded convolutions get real context around what they predict. At another resolution it may
    # not be a whole number of pixels: there, the tile's outermost predictions come from mirrored
    # context, and are not used.
    inner = model.clone(has_context=True)
    logits_step = steps.make_logits_step(
        inner if resolution == 1.0 else model, normalise, resolution=resolution
    )
    predict_step = steps.make_predict_step(logits_step)

    def confusion(predictions, labels):
        return metrics.confusion_matrix(predictions, labels, num_classes)

    return Run(
        init=functools.partial(
            steps.init_state,
            model,
            tx,
            normalise=normalise,
            num_channels=num_channels,
            with_ema=config.ema_decay > 0,
        ),
        train_step=steps.make_train_step(
            inner,
            tx,
            loss_fn,
            augment,
            normalise,
            ema_decay=config.ema_decay,
            # Older runs have no such field.
            num_microbatches=config.num_microbatches if "num_microbatches" in config else 1,
        ),
        logits_step=logits_step,
        predict_step=predict_step,
        eval_step=steps.make_eval_step(predict_step, confusion),
        schedule=schedule,
        context=math.ceil(model.margin / resolution),
    )


def normalisation(model: ConfigDict) -> str:
    """The name of what config.model is normalised by: as it says, or as its weights need it."""
    of_weights = pretrained.normalisation(model.encoder) if model.pretrained else "unit"
    return model.normalisation or of_weights


def state_placement(config: ConfigDict, shapes: steps.TrainState, devices: Mesh) -> Any:
    """The sharding of each array of one seed's training state: a TrainState of them.

    devices: a mesh without replicas.
    """
    placement = jax.tree.map(lambda _: mesh.replicated(devices), shapes)
    if config.optimizer.sharded:
        placement = placement.replace(opt_state=mesh.spread(shapes.opt_state, devices))
    return placement


def jit_train_step(run: Run, devices: Mesh, placement: Any) -> Any:
    """Returns the compiled train_step(state, batch, key, resident) -> (state, metrics).

    devices: of all seeds, a replica each; state, key and metrics are as of `mesh.stack`.
    placement: as of `state_placement`. The state is donated.
    batch: of all seeds, one after the other, split over the devices.
    resident: as of `device_cache.load`, each device's own copy; {} where batches hold images.
    """

    def train_step(state, batch, key, resident):
        return run.train_step(state, device_cache.gather(resident, batch), key)

    replicated = mesh.replicated(devices)
    states = mesh.stacked(placement, devices)
    keys = mesh.stacked(replicated, devices)
    return jax.jit(
        mesh.side_by_side(train_step, devices),
        in_shardings=(states, mesh.sharded(devices), keys, replicated),
        out_shardings=(states, replicated),
        donate_argnums=0,
    )


def step_shapes(
    run: Run, batch: Mapping[str, jax.ShapeDtypeStruct], devices: Mesh, placement: Any
) -> tuple[Any, Any, Any]:
    """The state, batch and key that `jit_train_step` takes, as they will be placed.

    batch: of one seed.
    """
    key = jax.eval_shape(jax.random.key, 0)
    return (
        mesh.stacked_shapes(_placed(run.shapes(), placement), devices),
        mesh.sharded_shapes(batch, devices),
        mesh.stacked_shapes(_placed(key, mesh.replicated(mesh.make_mesh())), devices),
    )


def jit_eval_step(run: Run, devices: Mesh) -> Any:
    """Returns the compiled eval_step(variables, batch) -> (counted, maps).

    The results of all examples go to every device, and so to every host: see `scoring.score`.
    """
    mapped = mesh.map_examples(run.eval_step, devices)
    return jax.jit(mapped, out_shardings=mesh.replicated(devices))


class Loaded(NamedTuple):
    """A trained run."""

    config: ConfigDict
    dataset: Mapping[str, Any]  # dataset.json
    run: Run
    step: int
    variables: Any
    mesh: Mesh


def load(directory: str, which: str) -> Loaded:
    """Restores a run's model.

    which: "best" (by eval/mean_iou), "latest", or a step. Raises ValueError if there is no such
    checkpoint, listing those there are.
    """
    path = epath.Path(directory).resolve()
    config = ConfigDict(workdir.read(path, "config.json"))
    dataset = workdir.read(path, "dataset.json")
    run = assemble(config, len(dataset["class_names"]), dataset["num_channels"])
    saved = {
        name: checkpoint.Checkpoints(path / "checkpoints" / name) for name in ("best", "latest")
    }
    named = {name: max(each.steps) for name, each in saved.items() if each.steps}
    wanted = named.get(which) if which in saved else int(which) if which.isdigit() else None
    holder = next((each for each in saved.values() if wanted in each.steps), None)
    if wanted is None or holder is None:
        steps_there = sorted({step for each in saved.values() for step in each.steps})
        raise ValueError(
            f"no checkpoint {which!r} in {path / 'checkpoints'}: it must be best, latest or one of "
            f"the steps {steps_there}"
        )
    devices = mesh.make_mesh()
    state = holder.restore(wanted, _placed(run.shapes(), mesh.replicated(devices)))
    return Loaded(config, dataset, run, wanted, state.variables(), devices)


def batch_shapes(
    config: ConfigDict, canvas: Sequence[int], num_channels: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """The global training batch, as of `pipeline.train_batches` without the names."""
    b = config.batch_size
    shapes = {
        "image": jax.ShapeDtypeStruct((b, *canvas, num_channels), "uint8"),
        "label": jax.ShapeDtypeStruct((b, *canvas), "uint8"),
        "size": jax.ShapeDtypeStruct((b, 2), "int32"),
        "index": jax.ShapeDtypeStruct((b,), "uint32"),
    }
    if config.border.weight > 0:
        shapes["border"] = jax.ShapeDtypeStruct((b, *canvas), "float32")
    return shapes


def describe(source: Any) -> dict[str, Any]:
    """What dataset.json holds: all that is needed to use the model without the data."""
    return {
        "class_names": source.class_names,
        "num_channels": source.num_channels,
        "value_range": source.value_range,
        "palette": plots.palette_of(source),
        "num_examples": len(source),
        "fingerprint": source.fingerprint,
    }


def named_scores(summary: Mapping[str, Any], class_names: Iterable[str]) -> dict[str, float]:
    """What `metrics.summarize` returns as flat paths: eval/mean_iou, eval/iou/CLASS."""
    scores: dict[str, float] = {}
    for name, value in summary.items():
        if isinstance(value, float):
            scores[f"eval/{name}"] = value
        else:
            for class_name, each in zip(class_names, value, strict=True):
                scores[f"eval/{name}/{class_name}"] = float(each)
    return scores


class Interrupts:
    """SIGTERM (preemption) and Ctrl-C ask the loop to save and stop; a second one kills.

    With several processes JAX has a SIGTERM handler of its own, which tells all of them.
    """

    def __enter__(self):
        self._received = False
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        self._received = True
        signal.signal(number, self._before[number])

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


def _placed(shapes: Any, shardings: Any) -> Any:
    """The shapes with their shardings, of which one may stand for all of a subtree."""

    def place(sharding, part):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
        )

    return jax.tree.map(place, shardings, shapes)


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last
