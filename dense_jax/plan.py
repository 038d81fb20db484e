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

import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dense_jax import data, metrics, storage
from dense_jax.data import cache, fingerprint
from dense_jax.data.fingerprint import RESOLUTIONS, Fingerprint
from dense_jax.models import weight_files
from dense_jax.models.encoders import ENCODERS
from dense_jax.spelling import duration
from dense_jax.workdir import files

TRIAL_STEPS = 6
EPOCHS = 10  # the passes over the training pixels for which the resolution is lowered
WIDER_EPOCHS = 4 * EPOCHS  # the passes at full resolution from which on a slower network is tried
LEAST_CEILING = 0.9  # the least mean IoU that labels must keep at a resolution
EVALUATED = 0.1  # the share of the time that evaluations may take
RESERVED = 0.05  # the share of the time that is left for what no trial shows
STEPS = 1500  # the optimizer steps that set the size of a batch
PIXELS = (8 * 96**2, 16 * 512**2)  # the fewest and the most pixels of a batch
MOST_STEPS = 40_000
SPREAD = 0.3  # the exposure spread above which each image is normalized on its own
UPRIGHT = 0.1  # the difference between upper and lower halves above which images have an upper side
COMMON = 0.9  # crops with a larger share of one class are redrawn
WIDTHS = (16, 32, 64)  # the channels at stride 1 of networks without pretrained weights
# Pretrained encoders, from fast to slow. Those for non-commercial use only are left out.
PRETRAINED = ("efficientnet_lite0", "resnet18", "resnet34", "resnet50", "convnext_tiny")


class Choice(NamedTuple):
    """A value of an option, and the reason for it."""

    option: str
    value: Any
    reason: str = ""


class Trial(NamedTuple):
    """The measurements of a trial: times in seconds, and memory in bytes.

    step: The time of a training step.
    evaluation: The time of an evaluation, without compilation.
    rest: The time of everything else: the start, the compilation and the end.
    memory: The largest memory of the process.
    """

    step: float
    evaluation: float
    rest: float
    memory: int


class Plan(NamedTuple):
    """The chosen options, and the expected time in seconds and memory in bytes."""

    choices: list[Choice]
    seconds: float
    memory: int


def plan(name: str, root: str, seconds: float, *, use_pretrained: bool = True) -> Plan:
    """Plans a training that takes `seconds` on this device, from its start to its end.

    use_pretrained: Whether to use pretrained weights that are on this computer.

    Raises ValueError if the dataset cannot be trained on, or if the time is too short.
    """
    source = data.open_dataset(name, root, "train")
    found = fingerprint.measure(source)
    by_data = [
        Choice("data.name", name),
        Choice("data.root", os.path.abspath(root) if root else ""),
        normalization(found),
        *augmentation(found, source.num_channels),
        *loss(found),
        memory(found, source),
    ]
    choices: list[Choice] = []
    for network in networks(use_pretrained):
        candidate = [*by_data, *network, *sizes(found, None)]
        measured = trial(candidate)
        left = seconds * (1 - EVALUATED - RESERVED) - measured.rest
        if left <= 0:
            raise ValueError(
                f"{duration(seconds)} are too short: starting and compiling takes "
                f"{duration(measured.rest)}"
            )
        pixels = pixels_per_step(candidate) * left / measured.step
        epochs = pixels / found.sizes.prod(axis=1).sum()
        if not choices or epochs >= EPOCHS:
            choices = [*by_data, *network, *sizes(found, pixels)]
        if epochs < WIDER_EPOCHS:
            break
    return with_schedule(choices, trial(choices), seconds)


def trial(choices: Iterable[Choice]) -> Trial:
    """Measures `dense_jax.main` with a few steps and one evaluation.

    Raises ValueError, with the error message of the run, if the run fails.
    """
    with tempfile.TemporaryDirectory(prefix="dense_jax_plan_") as folder:
        experiment, workdir = Path(folder, "trial.py"), Path(folder, "run")
        experiment.write_text(experiment_text(choices, "A trial."))
        arguments = {
            "config": experiment,
            "workdir": workdir,
            "config.num_steps": TRIAL_STEPS,
            "config.eval_every": TRIAL_STEPS,
            "config.optimizer.warmup_steps": 1,
        }
        words = [f"--{name}={value}" for name, value in arguments.items()]
        start = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-m", "dense_jax.main", *words], capture_output=True, text=True
        )
        wall = time.perf_counter() - start
        if run.returncode:
            lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
            raise ValueError(f"a trial of {TRIAL_STEPS} steps failed: {lines[-1]}")
        cost = files.read_json(workdir / "cost.json")
    step, evaluation = cost["seconds_per_step"], cost["seconds_per_evaluation"]
    rest = wall - TRIAL_STEPS * step - evaluation
    return Trial(step, evaluation, rest, cost["process_bytes"])


def normalization(found: Fingerprint) -> Choice:
    """Chooses how the network's input is normalized."""
    spread = f"the brightness of images varies by {found.exposure_spread:.2f} of their contrast"
    if found.exposure_spread > SPREAD:
        return Choice("model.normalization", "image", f"{spread}: each image is scaled on its own")
    return Choice("model.normalization", "dataset", f"{spread}: all images are scaled alike")


def augmentation(found: Fingerprint, num_channels: int) -> list[Choice]:
    """Chooses the augmentation, with the strengths of nnU-Net."""
    halves = f"the classes above and below differ by {100 * found.upright:.0f} %"
    choices = [Choice("augment.scale", 0.4, "objects come in other sizes, as in nnU-Net")]
    if found.upright < UPRIGHT:
        choices += [
            Choice("augment.flip_vertical", 0.5, f"{halves}: images have no upper side"),
            Choice("augment.rotation", 180.0, "the same"),
        ]
    else:
        choices.append(Choice("augment.rotation", 10.0, f"{halves}: images have an upper side"))
    choices += [
        Choice("augment.brightness", 0.25, "images come in other exposures, as in nnU-Net"),
        Choice("augment.contrast", 0.25, "the same"),
        Choice("augment.gamma", 0.4, "the same"),
    ]
    if num_channels == 3:
        choices.append(Choice("augment.saturation", 0.25, "the same for colors"))
    if found.shares.max() > COMMON:
        choices.append(
            Choice(
                *("augment.max_class_fraction", COMMON),
                f"one class has {100 * found.shares.max():.0f} % of the pixels: crops show others too",
            )
        )
    return choices


def loss(found: Fingerprint) -> list[Choice]:
    """Chooses the loss and the optimizer."""
    return [
        Choice("loss", "dice_ce", "cross-entropy learns fast, and Dice counts rare classes alike"),
        Choice("optimizer.learning_rate", 3e-3, "usual for AdamW and networks of this size"),
        Choice("optimizer.weight_decay", 0.01, "AdamW's own default"),
    ]


def memory(found: Fingerprint, source: data.Source) -> Choice:
    """Chooses where decoded images are kept."""
    size = int(found.sizes.prod(axis=1).sum()) * source.num_channels
    size *= np.dtype(source.dtype).itemsize
    kept = f"the decoded images take {size / 1e9:.2f} GB"
    if size < cache.free_memory() / 4:
        return Choice("data.cache", "host", f"{kept}, and are decoded once")
    return Choice("data.workers", os.cpu_count() or 1, f"{kept}, so they are decoded in each epoch")


def networks(use_pretrained: bool) -> list[list[Choice]]:
    """Returns the networks to choose from, from fast to slow."""
    at_hand = [
        name
        for name in PRETRAINED
        if use_pretrained and weight_files.is_at_hand(ENCODERS[name].weights.source)
    ]
    if at_hand:
        return [
            [
                Choice("model.encoder", name, "its pretrained weights are on this computer"),
                Choice("model.pretrained", "imagenet"),
                Choice("model.name", "fpn", "a light decoder"),
                Choice("model.decoder_channels", 64),
                Choice("model.upsampling", "bilinear", "FPN's own"),
            ]
            for name in at_hand
        ]
    return [
        [
            Choice(
                *("model.widths", tuple(width * 2**k for k in range(5))),
                "a U-Net from scratch, as no pretrained weights are on this computer",
            )
        ]
        for width in WIDTHS
    ]


def sizes(found: Fingerprint, pixels: float | None) -> list[Choice]:
    """Chooses the resolution, the crop and the batch.

    pixels: The number of pixels that the network can see in training, or None if not known yet.
    """
    total = found.sizes.prod(axis=1).sum()
    ceilings = {
        r: float(metrics.summarize(counts)["mean_iou"])
        for r, counts in zip(RESOLUTIONS, found.confusions, strict=True)
    }
    possible = [r for r in RESOLUTIONS if ceilings[r] >= LEAST_CEILING] or [1.0]
    affordable = [r for r in possible if pixels and pixels / (total * r**2) >= EPOCHS]
    resolution = affordable[0] if affordable else possible[-1]
    epochs = (pixels or 0) / (total * resolution**2)
    reason = (
        f"the time is enough for {epochs:.0f} passes over the images; labels keep a mean IoU of "
        f"{ceilings[resolution]:.2f}"
    )
    longest = np.maximum(1, np.round(np.median(found.sizes, axis=0) * resolution)).astype(int)
    area = np.clip((pixels or 0) / STEPS, *PIXELS)
    side = min(np.sqrt(area / 8), np.sqrt(longest.prod()))
    crop = [int(min(-(-side // 16) * 16, n)) for n in longest]
    batch = int(np.clip(round(area / np.prod(crop)), 4, 64))
    return [
        Choice("data.resolution", resolution, reason),
        Choice("data.crop_size", tuple(crop), f"the median image has {longest[0]} x {longest[1]}"),
        Choice("batch_size", batch, f"{batch * np.prod(crop) / 1e3:.0f} thousand pixels per step"),
        Choice(
            "eval.batch_size",
            max(1, round(2 * area / found.sizes.prod(axis=1).max() / resolution**2)),
            "as many pixels",
        ),
    ]


def pixels_per_step(choices: Iterable[Choice]) -> int:
    """Returns the number of pixels in a batch of crops."""
    values = {choice.option: choice.value for choice in choices}
    return int(values["batch_size"] * np.prod(values["data.crop_size"]))


def with_schedule(choices: list[Choice], measured: Trial, seconds: float) -> Plan:
    """Adds the number of steps and evaluations that fit into the time."""
    usable = seconds * (1 - RESERVED) - measured.rest
    num_evaluations = int(np.clip(EVALUATED * seconds // measured.evaluation, 1, 10))
    num_steps = int((usable - num_evaluations * measured.evaluation) / measured.step)
    if num_steps < 1:
        raise ValueError(
            f"{duration(seconds)} are too short: starting takes {duration(measured.rest)}, a step "
            f"{duration(measured.step)} and an evaluation {duration(measured.evaluation)}"
        )
    num_steps = min(num_steps, MOST_STEPS)
    every = -(-num_steps // num_evaluations)
    step = f"a step takes {measured.step:.3g} s, and starting {duration(measured.rest)}"
    evaluation = f"an evaluation takes {duration(measured.evaluation)}"
    schedule = [
        Choice("num_steps", num_steps, step),
        Choice("eval_every", every, evaluation),
        Choice("checkpoint_every", every, "with each evaluation"),
        Choice("log_every", max(1, num_steps // 100), ""),
        Choice("optimizer.warmup_steps", max(1, num_steps // 20), "5 % of the steps"),
    ]
    expected = measured.rest + num_steps * measured.step + num_evaluations * measured.evaluation
    return Plan([*choices, *schedule], expected, measured.memory)


def experiment_text(choices: Iterable[Choice], about: str) -> str:
    """Returns the text of an experiment file that sets the chosen options.

    about: The docstring of the file.
    """
    lines = []
    for option, value, reason in choices:
        lines += [f"    # {line}" for line in textwrap.wrap(reason, 92)]
        lines.append(f"    config.{option} = {value!r}")
    body = "\n".join(lines)
    return f'''"""{about}"""

from dense_jax.experiments import base


def get_config():
    """Returns the base config with what was chosen for this dataset."""
    config = base.get_config()
{body}
    return config
'''


def main(argv: list[str]) -> None:
    """Writes the plan, and prints what to expect of it."""
    args = flags.FLAGS
    output = Path(args.output)
    if output.exists() and not args.overwrite:
        raise ValueError(f"--output={output} exists: pass another name, or --overwrite")
    command.show_log_lines()
    found = plan(args.name, args.root or "", 60 * args.minutes, use_pretrained=args.pretrained)
    expected = f"{duration(found.seconds)} and {found.memory / 1e9:.1f} GB of memory"
    train = f"python -m dense_jax.main --config={output} --workdir=runs/{output.stem}"
    about = f"""A plan for {args.minutes:g} minutes on this dataset, written by `dense_jax.plan`.

{train}

It takes about {expected}.
"""
    text = experiment_text(found.choices, about)
    with storage.atomic(output) as file:
        file.write(text.encode())
    print(text)
    print(f"wrote {output}. The training takes about {expected}:\n\n    {train}")


if __name__ == "__main__":
    command.run(main)
