"""Training: from a config and a workdir to a scored checkpoint.

The only reader of the whole config; every other room takes plain arguments. `train` makes or
resumes a run, `load` restores one for evaluation and prediction.
"""

import contextlib
import functools
import inspect
import json
import logging
import math
import signal
import sys
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
    data,
    device_cache,
    logger,
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
from dense_jax.data import balance, borders, pipeline, verify
from dense_jax.data.cache import Cached
from dense_jax.models import pretrained
from dense_jax.normalise import NORMALISATIONS
from dense_jax.tiles import Tiles

_LOG = logging.getLogger("dense_jax")
PREEMPTED = 75  # exit status (EX_TEMPFAIL): everything is saved, start the same command again
CACHES = ("none", "host", "device")
LATEST_TO_KEEP = 2  # one to fall back to


def train(config: ConfigDict, directory: str) -> None:
    """Trains the config's model in a workdir, or goes on where the workdir's run stopped.

    Exits with PREEMPTED after SIGTERM or Ctrl-C. Raises ValueError for bad input, before any
    compilation, and FloatingPointError when loss or gradient are no longer finite.
    """
    imported = startup.seconds_of_process()
    path = epath.Path(directory).resolve()
    workdir.compare(path, config)
    if (path / "result.json").exists():
        print(f"{path} is finished: {_summary(workdir.read(path, 'result.json'))}")
        return
    check(config)
    source, eval_source = (
        data.open_dataset(config.data.name, config.data.root, split)
        for split in (config.data.train_split, config.data.eval_split)
    )
    dataset = describe(source)
    workdir.compare_dataset(path, dataset)
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
    shapes = jax.eval_shape(run.init)
    canvas = config.data.canvas_size or tuple(source.sizes.max(axis=0).tolist())
    of_batch = batch_shapes(config, canvas, source.num_channels)
    devices = mesh.make_mesh()
    placement = state_placement(config, shapes, devices)
    train_step = jit_train_step(run, devices, placement)
    # Of arrays as they will be placed: what is traced here need not be traced again.
    train_step.eval_shape(_placed(shapes, placement), _placed(of_batch, mesh.sharded(devices)), {})
    is_new = not (path / "config.json").exists()
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

    if jax.process_index() == 0:
        workdir.write_json(path / "config.json", config.to_dict())
        workdir.write_json(path / "dataset.json", dataset)
        workdir.write_json(path / "environment.json", workdir.environment())

    latest = checkpoint.Checkpoints(path / "checkpoints" / "latest", LATEST_TO_KEEP)
    best = checkpoint.Checkpoints(path / "checkpoints" / "best", max_to_keep=1)
    state = latest.restore_latest(_placed(shapes, placement))
    if state is None:
        # Not yet read where the run was cut off before its first checkpoint.
        encoder = encoder or _published(config, shapes)
        state = jax.jit(run.init, out_shardings=placement)(encoder=encoder)
    first = int(state.step)
    for step in best.steps:
        if step > first:  # of a future that is about to happen again
            best.remove(step)
    num_parameters = sum(x.size for x in jax.tree.leaves(shapes.params))
    _LOG.info(
        "%s: %d parameters, steps %d to %d, %d training and %d evaluation examples on %d %s",
        "resuming" if first else "starting",
        *(num_parameters, first + 1, config.num_steps, len(source), len(eval_source)),
        *(devices.size, jax.devices()[0].device_kind),
    )

    eval_step = jit_eval_step(run, devices)
    batches = pipeline.train_batches(
        train_source,
        seed=config.seed,
        batch_size=config.batch_size,
        step=first,
        host=jax.process_index(),
        num_hosts=jax.process_count(),
        **stream,
    )
    log = logger.Logger(path, first_step=first, num_steps=config.num_steps)
    scores = _evaluations(path, before=first)

    def record(step: int, values: Mapping[str, jax.Array], names: np.ndarray) -> None:
        """Waits for a step's metrics; logs them, or stops the run if they are not finite."""
        host_values = {name: float(value) for name, value in values.items()}
        if not all(map(math.isfinite, host_values.values())):
            raise FloatingPointError(
                f"step {step}: {host_values} is not finite. Its examples on this host: "
                f"{', '.join(names)}. The last good checkpoint is that of step "
                f"{max(latest.steps, default='none')}; lower optimizer.learning_rate or set "
                "optimizer.grad_clip_norm"
            )
        if step % config.log_every == 0:
            host_values["train/learning_rate"] = np.asarray(run.schedule(step - 1)).item()
            log.scalars(step, host_values)
        log.progress(step, loss=host_values["train/loss"])

    def evaluate(step: int, state: steps.TrainState) -> None:
        palette, rows = plots.palette_of(source), []

        def show(i: int, classes: np.ndarray, label: np.ndarray) -> None:
            rows.append(plots.comparison(tiles.source[i]["image"], label, classes, palette))

        matrices = scoring.score(
            eval_step,
            state.variables(),
            tiles,
            mesh=devices,
            receive=show,
            num_received=config.eval.num_pictures,
            batch_size=config.eval.batch_size,
            workers=config.data.workers,
        )
        counts = matrices.sum(axis=0, dtype=np.int64)
        scores[step] = named_scores(metrics.summarize(counts), source.class_names)
        log.scalars(step, scores[step])
        log.progress(step, mean_iou=scores[step]["eval/mean_iou"])
        if rows:
            log.picture(step, plots.stack(rows))
        held = best.steps
        if not held or _rank(scores[step]) > _rank(scores[held[-1]]):
            best.save(step, state)

    pending = None  # the step whose metrics are still on their way
    with contextlib.ExitStack() as stack:
        for opened in (latest, best, log, batches):
            stack.callback(opened.close)
        interrupts = stack.enter_context(Interrupts())
        if first and _due(first, config.eval_every, config.num_steps):
            evaluate(first, state)  # cut off between the save and the end of the evaluation
        prepared = startup.seconds_of_process()
        for step in range(first + 1, config.num_steps + 1):
            batch = next(batches)
            state, values = train_step(state, mesh.to_global(batch, devices), resident)
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
            pending = step, values, batch["name"]
            interrupted = interrupts.requested(step)
            evaluate_now = _due(step, config.eval_every, config.num_steps)
            if interrupted or evaluate_now or step % config.checkpoint_every == 0:
                record(*pending)  # first, so that a state that is not finite is never saved
                pending = None
                best.wait()  # its scores are on disk: it must not be missing after a kill
                latest.save(step, state)
            if interrupted:
                print(f"stopped after step {step}; the same command resumes", file=sys.stderr)
                sys.exit(PREEMPTED)
            if evaluate_now:
                evaluate(step, state)
    best_step = best.steps[-1]
    result = {
        "status": "finished",
        "num_parameters": num_parameters,
        "final": {"step": config.num_steps, **scores[config.num_steps]},
        "best": {"step": best_step, **scores[best_step]},
    }
    if jax.process_index() == 0:
        workdir.write_json(path / "result.json", result)
    print(f"finished {path}: {_summary(workdir.to_json(result))}")


class Run(NamedTuple):
    """The pure functions of a config; see `steps`."""

    init: Callable[..., steps.TrainState]
    train_step: Callable
    predict_step: Callable
    eval_step: Callable
    schedule: optax.Schedule
    context: int  # pixels around what a tile predicts that predict_step and eval_step need


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
    normalise = NORMALISATIONS[
        config.model.normalisation
        or (pretrained.normalisation(config.model.encoder) if config.model.pretrained else "unit")
    ]
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
    predict_step = steps.make_predict_step(
        inner if resolution == 1.0 else model, normalise, resolution=resolution
    )

    def confusion(predictions, labels):
        return metrics.confusion_matrix(predictions, labels, num_classes)

    return Run(
        init=functools.partial(
            steps.init_state,
            model,
            tx,
            jax.random.key(config.seed),
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
            seed=config.seed,
            ema_decay=config.ema_decay,
            # Older runs have no such field.
            num_microbatches=config.num_microbatches if "num_microbatches" in config else 1,
        ),
        predict_step=predict_step,
        eval_step=steps.make_eval_step(predict_step, confusion),
        schedule=schedule,
        context=math.ceil(model.margin / resolution),
    )


def state_placement(config: ConfigDict, shapes: steps.TrainState, devices: Mesh) -> Any:
    """The sharding of each array of the training state: a TrainState of them."""
    placement = jax.tree.map(lambda _: mesh.replicated(devices), shapes)
    if config.optimizer.sharded:
        placement = placement.replace(opt_state=mesh.spread(shapes.opt_state, devices))
    return placement


def jit_train_step(run: Run, devices: Mesh, placement: Any) -> Any:
    """Returns the compiled train_step(state, batch, resident) -> (state, metrics).

    state: donated; placed as `state_placement` says.
    batch: split over the devices.
    resident: as of `device_cache.load`, each device's own copy; {} where batches hold images.
    """
    replicated = mesh.replicated(devices)

    @functools.partial(
        jax.jit,
        in_shardings=(placement, mesh.sharded(devices), replicated),
        out_shardings=(placement, replicated),
        donate_argnums=0,
    )
    def train_step(state, batch, resident):
        return run.train_step(state, device_cache.gather(resident, batch))

    return train_step


def jit_eval_step(run: Run, devices: Mesh) -> Any:
    """Returns the compiled eval_step(variables, batch) -> (counted, maps).

    The results of all examples go to every device, and so to every host: see `scoring.score`.
    """
    mapped = mesh.map_examples(run.eval_step, devices)
    return jax.jit(mapped, out_shardings=mesh.replicated(devices))


def check(config: ConfigDict) -> None:
    """Raises ValueError, naming the field and its valid values, for what no run can be made of."""
    for field, value, valid in (
        ("loss", config.loss, losses.LOSSES),
        ("data.name", config.data.name, data.DATASETS),
        ("data.cache", config.data.cache, CACHES),
        ("optimizer.name", config.optimizer.name, optim.OPTIMIZERS),
        ("optimizer.schedule", config.optimizer.schedule, optim.SCHEDULES),
        ("model.normalisation", config.model.normalisation or "unit", NORMALISATIONS),
    ):
        if value not in valid:
            raise ValueError(f"{field}={value!r} is not one of {', '.join(valid)}")
    valid = list(inspect.signature(losses.LOSSES[config.loss]).parameters)[2:]
    for option in models.given(config.loss_options):
        if option not in valid:
            raise ValueError(
                f"loss_options.{option} is no option of loss={config.loss!r}, which has: "
                f"{', '.join(valid)}"
            )
    if config.border.weight > 0 and "pixel_weights" not in valid:
        able = [
            name
            for name, loss in losses.LOSSES.items()
            if "pixel_weights" in inspect.signature(loss).parameters
        ]
        raise ValueError(
            f"border.weight={config.border.weight} needs a loss with pixel weights, which "
            f"{config.loss!r} has not: {', '.join(able)}"
        )
    weights = config.loss_options.class_weights
    names = [*balance.METHODS, *balance.PUBLISHED]
    if not (weights is None or isinstance(weights, tuple | list) or weights in names):
        raise ValueError(
            f"loss_options.class_weights={weights!r} must be one number per class, or one of "
            f"{', '.join(names)}"
        )
    for fields, low, high in (
        (("num_steps", "batch_size", "eval_every", "checkpoint_every", "log_every"), 1, math.inf),
        (("num_microbatches", "eval.batch_size"), 1, math.inf),
        (("data.resolution", "optimizer.learning_rate", "border.sigma"), 1e-12, math.inf),
        (("augment.flip", "augment.flip_vertical"), 0, 1),
        (("augment.brightness", "augment.contrast", "augment.saturation"), 0, 1),
        (("augment.rotation", "augment.hue"), 0, 180),
        (("augment.shear",), 0, 89),
        (("augment.scale", "augment.elastic", "augment.gamma"), 0, math.inf),
        (("augment.blur", "augment.noise"), 0, math.inf),
        (("augment.max_class_fraction",), 1e-12, 1),
        (("ema_decay", "optimizer.momentum"), 0, 1 - 1e-12),
        (("optimizer.weight_decay", "optimizer.grad_clip_norm"), 0, math.inf),
        (("eval.margin", "eval.num_pictures", "data.workers", "border.weight"), 0, math.inf),
        (("optimizer.warmup_steps", "optimizer.encoder_lr_multiplier"), 0, math.inf),
    ):
        for field in fields:
            if not low <= _get(config, field) <= high:
                limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
                raise ValueError(f"{field}={_get(config, field)} must be {limits}")
    for field in ("data.crop_size", "data.canvas_size", "eval.tile_size"):
        size = _get(config, field)
        if size is not None and not (
            len(size) == 2 and all(isinstance(length, int) and length > 0 for length in size)
        ):
            raise ValueError(f"{field}={tuple(size)} must be a height and a width in pixels")
    if config.model.freeze_encoder and config.optimizer.encoder_lr_multiplier != 1:
        raise ValueError(
            "model.freeze_encoder leaves nothing to optimizer.encoder_lr_multiplier="
            f"{config.optimizer.encoder_lr_multiplier}: leave one of them at its default"
        )
    if not config.data.root and not config.data.name.startswith("synthetic"):
        raise ValueError(
            f"data.root is not set: pass --config.data.root=FOLDER, that of {config.data.name!r}"
        )
    if config.batch_size % (config.num_microbatches * jax.device_count()):
        raise ValueError(
            f"batch_size={config.batch_size} is the global batch and must be a multiple of the "
            f"number of devices, {jax.device_count()}, times "
            f"num_microbatches={config.num_microbatches}"
        )


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
    state = holder.restore(wanted, _placed(jax.eval_shape(run.init), mesh.replicated(devices)))
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


def _get(config: ConfigDict, field: str) -> Any:
    return functools.reduce(lambda value, name: value[name], field.split("."), config)


def _evaluations(path: epath.Path, *, before: int) -> dict[int, dict[str, float]]:
    """The evaluations recorded before a step, by step."""
    return {
        record.pop("step"): {k: float("nan") if v is None else v for k, v in record.items()}
        for record in workdir.read_records(path / "metrics.jsonl")
        if "eval/mean_iou" in record and record["step"] < before
    }


def _rank(scores: Mapping[str, float]) -> float:
    """What the best checkpoint is the best in; a split without any valid pixel counts as 0."""
    return float(np.nan_to_num(scores["eval/mean_iou"]))


def _summary(result: Mapping[str, Any]) -> str:
    return json.dumps(
        {
            name: {"step": result[name]["step"], "mean_iou": result[name]["eval/mean_iou"]}
            for name in ("final", "best")
        }
    )
