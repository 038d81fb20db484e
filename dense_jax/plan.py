"""Plans how to train on a dataset in a given time, and writes the plan as an experiment file.

    python -m dense_jax.plan --name=folder --root=ROOT --minutes=15 --output=planned.py
    python -m dense_jax.main --config=planned.py --workdir=runs/planned

The plan follows from the training split (see `data.fingerprint`), from the pretrained weights on
this computer, and from trials. A trial runs `dense_jax.main` on this device for a few steps. The
experiment file sets only what differs from experiments/base.py, each option with its reason. Like
nnU-Net (Isensee et al. 2021), the plan uses fixed rules. In addition, its rules know the time.
"""

from absl import flags

from dense_jax import command

if __name__ == "__main__":  # above the slow imports, so that --help answers at once
    flags.DEFINE_string("name", "folder", "Dataset, as in data.name.")
    command.define_folder("root", "The folder that holds the dataset's files.")
    flags.DEFINE_float("minutes", 15, "Time of the training, from start to end.", lower_bound=1)
    command.define_path("output", "The experiment file to write.", required=True)
    flags.DEFINE_bool("pretrained", True, "Use pretrained weights that are on this computer.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing file.")
    command.help_if_asked()

import logging
import math
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dense_jax import data, metrics, storage
from dense_jax.data import cache, checks, fingerprint
from dense_jax.data.fingerprint import RESOLUTIONS, Fingerprint
from dense_jax.models import weight_files
from dense_jax.models.encoders import ENCODERS
from dense_jax.spelling import duration
from dense_jax.workdir import files

_LOG = logging.getLogger(__name__)

TRIAL_STEPS = 30
TRIAL_SECONDS = 10  # the least duration of the last trial's steps, so that the start matters little
TRIAL_IMAGES = 32  # the number of images that a trial evaluates
EVALUATED = 0.1  # the share of the time that evaluations may take
RESERVED = 0.05  # the share of the time that is left for what a trial does not show
EPOCHS = 5  # the passes over the training images that the resolution should allow
FEW_OBJECTS = 1000  # images with fewer objects are flipped also in few passes
MANY_EPOCHS = 30  # the passes from which on images are augmented
SLOWER_EPOCHS = 50  # the passes at full resolution from which on a slower network is tried
LEAST_CEILING = 0.9  # the mean IoU that labels must keep at a resolution
NUM_STEPS = 4000  # the number of steps that the size of a batch should allow
BATCH_PIXELS = (4 * 96**2, 16 * 512**2)  # the least and the largest size of a batch
MOST_STEPS = 40_000
DIFFERING_EXPOSURE = 0.3  # the exposure spread above which each image is normalized on its own
MANY_EXPOSURES = 1.0  # the exposure spread above which colors change also in few passes
MANY_SIZES = 2.0  # the ratio of sizes above which the zoom changes also in few passes
UPRIGHT = 0.1  # the difference between halves above which images have an upper side
RARE = 0.002  # classes are weighted if one has a smaller share of the pixels
COMMONEST = 0.9  # crops in which one class has a larger share are redrawn
FROM_SCRATCH = (16, 32, 64)  # the channels at stride 1 of networks from scratch
# Pretrained encoders, from fast to slow. Those for non-commercial use only are left out.
PRETRAINED = ("efficientnet_lite0", "resnet18", "resnet34", "resnet50", "convnext_tiny")


class Choice(NamedTuple):
    """A value of an option, and the reason for it, or "" if it needs none."""

    option: str
    value: Any
    reason: str = ""


class Trial(NamedTuple):
    """The measurements of a trial: times in seconds, and memory in bytes.

    step: The time of a training step.
    evaluation: The time to evaluate an image, without compilation.
    rest: The time of everything else: start, compilation and end.
    memory: The largest memory of the process.
    device_memory: The memory of each device during training. If the device is the CPU, it is a part
      of `memory`.
    """

    step: float
    evaluation: float
    rest: float
    memory: int
    device_memory: int


class Plan(NamedTuple):
    """The chosen options, the trial that they are based on, and the expected time in seconds."""

    choices: list[Choice]
    trial: Trial
    seconds: float


def plan(name: str, root: str, seconds: float, *, use_pretrained: bool = True) -> Plan:
    """Plans a training that takes `seconds` on this device, from its start to its end.

    use_pretrained: Whether to use pretrained weights that are on this computer.

    Raises ValueError if the dataset cannot be trained on, or if the time is too short.
    """
    source = data.open_dataset(name, root, "train")
    found = fingerprint.measure(source)
    dataset = [
        Choice("data.name", name),
        Choice("data.root", os.path.abspath(root) if root else ""),
        _cache(found, source),
    ]
    choices: list[Choice] = []
    pixels_per_second = 0.0
    for network in _networks(use_pretrained and source.num_channels in (1, 3)):
        candidate = [*dataset, *network, *_recipe(found, source, 0.0)]
        measured = trial(candidate)
        left = seconds * (1 - EVALUATED - RESERVED) - measured.rest
        if left < measured.step and not choices:
            raise _too_short(seconds, measured)
        pixels_per_second = _batch_pixels(candidate) / measured.step
        num_pixels = left * pixels_per_second
        epochs = num_pixels / int(found.sizes.prod(axis=1).sum())
        if not choices or epochs >= EPOCHS:
            choices = [*dataset, *network, *_recipe(found, source, num_pixels)]
        if epochs < SLOWER_EPOCHS:
            break
    num_steps = math.ceil(TRIAL_SECONDS * pixels_per_second / _batch_pixels(choices))
    measured = trial(choices, max(TRIAL_STEPS, num_steps))
    numbers, expected = schedule(measured, seconds, len(data.open_dataset(name, root, "val")))
    return Plan([*choices, *numbers], measured, expected)


def _batch_pixels(choices: Sequence[Choice]) -> int:
    values = {choice.option: choice.value for choice in choices}
    return int(values["batch_size"] * np.prod(values["data.crop_size"]))


def trial(choices: Sequence[Choice], num_steps: int = TRIAL_STEPS) -> Trial:
    """Measures `dense_jax.main` with a few steps and one evaluation.

    Raises ValueError, with the error message of the run, if the run fails.
    """
    _LOG.info("training %d steps on trial", num_steps)
    with tempfile.TemporaryDirectory(prefix="dense_jax_plan_") as folder:
        experiment, workdir = Path(folder, "trial.py"), Path(folder, "run")
        experiment.write_text(experiment_text(choices, "A trial."))
        flag_values = {
            "config": experiment,
            "workdir": workdir,
            "config.num_steps": num_steps,
            "config.eval_every": num_steps,
            "config.eval.num_images": TRIAL_IMAGES,
            "config.optimizer.warmup_steps": 1,
        }
        words = [f"--{name}={value}" for name, value in flag_values.items()]
        start = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-m", "dense_jax.main", *words],
            check=False,
            capture_output=True,
            text=True,
            # The planned run compiles its programs, as none had its number of steps before.
            env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        )
        whole = time.perf_counter() - start
        if run.returncode:
            lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
            raise ValueError(f"a trial of {num_steps} steps failed: {lines[-1]}")
        cost = files.read_json(workdir / "cost.json")
        num_images = files.read_json(workdir / "result.json")["num_eval_images"]
    batch_size = next(choice.value for choice in choices if choice.option == "batch_size")
    step, evaluation = batch_size / cost["images_per_second"], cost["seconds_per_evaluation"]
    rest = max(0.0, whole - num_steps * step - evaluation)
    memory = cost["process_bytes"], cost["peak_bytes"]
    return Trial(step, evaluation / num_images, rest, *memory)


def _recipe(found: Fingerprint, source: data.Source, num_pixels: float) -> list[Choice]:
    """Chooses everything but the dataset, the network and the schedule.

    num_pixels: The number of pixels that can be trained on in the time, or 0 if not known yet.
    """
    total = int(found.sizes.prod(axis=1).sum())
    ceilings = {
        resolution: float(metrics.summarize(counts)["mean_iou"])
        for resolution, counts in zip(RESOLUTIONS, found.confusions, strict=True)
    }
    useful = [r for r in RESOLUTIONS if ceilings[r] >= LEAST_CEILING]  # 1.0 is always useful
    resolution = next((r for r in useful if num_pixels >= EPOCHS * total * r**2), useful[-1])
    epochs = num_pixels / (total * resolution**2)
    reason = (
        f"The time is enough for {epochs:.0f} passes over the images at this resolution. Labels "
        f"keep a mean IoU of {ceilings[resolution]:.2f} at it."
    )
    spread = f"The brightness of images varies by {found.exposure_spread:.2f} of their contrast"
    scaling = ("dataset", "all are scaled alike")
    if found.exposure_spread > DIFFERING_EXPOSURE:
        scaling = ("image", "each is scaled on its own")
    return [
        Choice("model.normalization", scaling[0], f"{spread}, so {scaling[1]}."),
        Choice("data.resolution", resolution, reason),
        *_sizes(found, resolution, num_pixels),
        *_augmentation(found, source.num_channels, epochs),
        *_loss(found, source),
    ]


def _augmentation(found: Fingerprint, num_channels: int, epochs: float) -> list[Choice]:
    """Chooses the augmentation, with strengths like those of nnU-Net.

    epochs: The number of passes over the training images.
    """
    choices = []
    ratio = float((found.sizes.max(axis=0) / found.sizes.min(axis=0)).max())
    if epochs >= MANY_EPOCHS or ratio > MANY_SIZES:
        reason = (
            f"Sizes of images differ up to {ratio:.1f} times. Those of objects may differ, too."
        )
        choices.append(Choice("augment.scale", 0.4, reason))
    choices += _flips(found, epochs)
    if epochs >= MANY_EPOCHS or found.exposure_spread > MANY_EXPOSURES:
        choices += [
            Choice("augment.brightness", 0.25, "Other images may have other exposures and colors."),
            Choice("augment.contrast", 0.25),
            Choice("augment.gamma", 0.4),
        ]
        if num_channels == 3:
            choices.append(Choice("augment.saturation", 0.25))
    if (largest := found.shares.max()) > COMMONEST:
        reason = f"One class has {100 * largest:.0f} % of the pixels, so crops prefer the others."
        choices.append(Choice("augment.max_class_fraction", COMMONEST, reason))
    return choices


def _flips(found: Fingerprint, epochs: float) -> list[Choice]:
    objects = f"{found.num_objects} objects in {epochs:.0f} passes"
    if epochs < MANY_EPOCHS and found.num_objects >= FEW_OBJECTS:
        return [Choice("augment.flip", 0.0, f"A network learns {objects} better as they are.")]
    down, right = map(abs, found.displacement)
    across = (
        f"A network would know {objects} by heart. Labels lie {right:.1f} pixels beside the edges of "
        "the images."
    )
    along = (
        f"Classes in the upper and the lower half differ by {100 * found.upright:.0f} %. Labels lie "
        f"{down:.1f} pixels above or below the edges of the images."
    )
    is_upright = found.upright >= UPRIGHT or down > checks.DISPLACED
    choices = [
        Choice("augment.flip", 0.5 if right <= checks.DISPLACED else 0.0, across),
        Choice("augment.flip_vertical", 0.0 if is_upright else 0.5, along),
    ]
    if epochs >= MANY_EPOCHS:
        choices.append(Choice("augment.rotation", 10.0 if is_upright else 180.0))
    return choices


def _loss(found: Fingerprint, source: data.Source) -> list[Choice]:
    choices = [
        Choice("loss", "dice_ce", "Dice counts rare classes like others, as mean IoU does."),
        Choice(
            "optimizer.learning_rate", 3e-3, "Usual for AdamW, networks and batches like these."
        ),
        Choice("optimizer.weight_decay", 0.01),
    ]
    present = found.shares[found.shares > 0]
    if present.min() < RARE and not source.regions:
        # The mean weight of a pixel is 1. A class that was not seen counts like the rarest.
        weights = 1 / np.sqrt(np.maximum(found.shares, present.min())) / np.sqrt(present).sum()
        reason = (
            f"The rarest class has {100 * present.min():.1g} % of the pixels, so pixels of a class "
            "count by 1 / sqrt(its share)."
        )
        rounded = tuple(float(f"{weight:.3g}") for weight in weights)
        choices.append(Choice("loss_options.class_weights", rounded, reason))
    return choices


def _cache(found: Fingerprint, source: data.Source) -> Choice:
    itemsize = np.dtype(source.dtype).itemsize
    size = int(found.sizes.prod(axis=1).sum()) * source.num_channels * itemsize
    decoded = f"The decoded images take {size / 1e9:.2g} GB"
    if size < cache.free_memory() / 4:
        return Choice("data.cache", "host", f"{decoded}, so they are decoded once.")
    return Choice("data.workers", os.cpu_count() or 1, f"{decoded}, so they are decoded each time.")


def _networks(use_pretrained: bool) -> list[list[Choice]]:
    """Returns the networks to choose from, from fast to slow."""
    pretrained = []
    for name in PRETRAINED if use_pretrained else ():
        weights = ENCODERS[name].weights
        if weights and weight_files.is_at_hand(weights.source):
            reason = "Its pretrained weights are on this computer."
            pretrained.append(
                [
                    Choice("model.encoder", name, reason),
                    Choice("model.pretrained", "imagenet"),
                    Choice("model.name", "fpn", "It takes half the time of a U-Net."),
                    Choice("model.decoder_channels", 64),
                    Choice("model.upsampling", "bilinear"),
                ]
            )
    reason = "No pretrained weights are used, and the time is enough for this network."
    return pretrained or [
        [
            Choice("model.widths", tuple(width * 2**level for level in range(5)), reason),
            Choice("model.name", "fcn", "It takes half the time of a U-Net, so it learns more."),
            Choice("model.upsampling", "bilinear"),
        ]
        for width in FROM_SCRATCH
    ]


def _sizes(found: Fingerprint, resolution: float, num_pixels: float) -> list[Choice]:
    """Chooses the crops and the batches.

    num_pixels: The number of pixels that can be trained on in the time, or 0 if not known yet.
    """
    median = np.median(found.sizes, axis=0) * resolution
    batch_pixels = np.clip(num_pixels / NUM_STEPS, *BATCH_PIXELS)
    side = np.sqrt(batch_pixels / 8)
    crop = tuple(int(min(-(-side // 32) * 32, -(-n // 16) * 16)) for n in median)
    batch_size = int(np.clip(batch_pixels / np.prod(crop), 4, 64))
    largest = found.sizes.prod(axis=1).max() * resolution**2
    reason = f"At this resolution, the median image has {median[0]:.0f} x {median[1]:.0f} pixels."
    return [
        Choice("data.crop_size", crop, reason),
        Choice("batch_size", batch_size),
        Choice("eval.batch_size", int(np.clip(2 * batch_pixels / largest, 1, 64))),
    ]


def schedule(measured: Trial, seconds: float, num_images: int) -> tuple[list[Choice], float]:
    """Chooses the numbers of steps and evaluations. Returns them with the expected time.

    num_images: The number of images of the split to evaluate on.
    """
    affordable = int(EVALUATED * seconds / measured.evaluation)
    evaluation = min(num_images, max(1, affordable)) * measured.evaluation
    num_evaluations = int(np.clip(affordable // num_images, 1, 10))
    usable = seconds * (1 - RESERVED) - measured.rest - num_evaluations * evaluation
    num_steps = min(int(usable / measured.step), MOST_STEPS)
    if num_steps < 1:
        raise _too_short(seconds, measured)
    every = -(-num_steps // num_evaluations)
    step = f"A step takes {measured.step:.3f} s, and the start {duration(measured.rest)}."
    choices = [
        Choice("num_steps", num_steps, step),
        Choice("eval_every", every, f"An evaluation takes {duration(evaluation)}."),
        Choice("checkpoint_every", every),
        Choice("log_every", max(1, num_steps // 100)),
        Choice("optimizer.warmup_steps", max(1, num_steps // 20)),
    ]
    if affordable < num_images:
        reason = f"An evaluation of all {num_images} images would take too much of the time."
        choices.append(Choice("eval.num_images", max(1, affordable), reason))
    return choices, seconds * (1 - RESERVED) - usable + num_steps * measured.step


def _too_short(seconds: float, measured: Trial) -> ValueError:
    needed = measured.rest + measured.step + measured.evaluation
    return ValueError(
        f"{duration(seconds)} are too short: the start takes {duration(measured.rest)}, a step "
        f"{duration(measured.step)} and the evaluation of an image {duration(measured.evaluation)}: "
        f"pass --minutes={math.ceil(2 * needed / 60)} or more"
    )


def experiment_text(choices: Iterable[Choice], about: str) -> str:
    """Returns the text of an experiment file that sets the chosen options.

    about: The docstring of the file.
    """
    lines = []
    for option, value, reason in choices:
        lines += [f"    # {line}" for line in textwrap.wrap(reason, 94)]
        lines.append(f"    config.{option} = {value!r}")
    body = "\n".join(lines)
    return f'''"""{about}"""

from dense_jax.experiments import base


def get_config():
    """Returns the base config with the options that were planned for this dataset."""
    config = base.get_config()
{body}
    return config
'''


def main(argv: list[str]) -> None:
    """Writes the plan, and prints what to expect of it."""
    args = flags.FLAGS
    output = Path(args.output)
    if output.exists() and not args.overwrite:
        raise ValueError(f"--output={output} exists: pass another path, or --overwrite")
    command.show_log_lines()
    planned = plan(args.name, args.root or "", 60 * args.minutes, use_pretrained=args.pretrained)
    expected = (
        f"about {duration(planned.seconds)} and {planned.trial.memory / 1e9:.1f} GB of memory "
        f"({planned.trial.device_memory / 1e9:.1f} GB of them for a training step)"
    )
    train = f"python -m dense_jax.main --config={output} --workdir=runs/{output.stem}"
    about = f"""Trains as `dense_jax.plan` planned for {args.minutes:g} minutes on this device.

{train}
Expect: {expected}.
"""
    text = experiment_text(planned.choices, about)
    storage.write_text(output, text)
    print(f"{text}\nwrote {output}. It takes {expected}:\n\n    {train}")


if __name__ == "__main__":
    command.run(main)
