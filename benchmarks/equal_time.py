"""Writes a sweep that compares `dense_jax.plan` with fixed experiments at equal time.

python -m benchmarks.equal_time --name=folder --root=ROOT --experiment=experiments/camvid_unet.py \
    --minutes=4 --output=equal_time.py
python -m dense_jax.sweep --config=equal_time.py --workdir=runs/equal_time --evaluate=test
python -m dense_jax.report --workdir=runs/equal_time --split=test

The fixed experiments are `unet_ce` and the given ones. Trials on this device measure how many steps
of each take the time.
"""

import argparse
import pathlib
import pprint

from ml_collections import ConfigDict

from dense_jax import command, data, plan
from dense_jax.experiments import base
from dense_jax.plan import Choice
from dense_jax.workdir import files

SEEDS = 2


def main() -> None:
    """Parses the flags and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="folder", help="the dataset, as in data.name")
    parser.add_argument("--root", required=True, help="the dataset's folder")
    parser.add_argument("--experiment", action="append", default=[], help="an experiment file")
    parser.add_argument("--minutes", type=float, required=True, help="the time of each run")
    parser.add_argument("--pretrained", action="store_true", help="add a plan with such weights")
    parser.add_argument("--output", required=True, help="the experiment file to write")
    args = parser.parse_args()
    seconds = 60 * args.minutes
    rows = {"plan": plan.plan(args.name, args.root, seconds, use_pretrained=False).choices}
    if args.pretrained:
        rows["plan, pretrained"] = plan.plan(args.name, args.root, seconds).choices
    num_images = len(data.open_dataset(args.name, args.root, "val"))
    dataset = [Choice("data.name", args.name), Choice("data.root", args.root)]
    for file in ("experiments/unet_ce.py", *args.experiment):
        recipe = [*dataset, *_changes(command.load_config(file))]
        numbers, _ = plan.schedule(plan.trial(recipe), seconds, num_images)
        rows[pathlib.Path(file).stem] = [*recipe, *numbers]
    runs = [
        {"label": label, "seed": seed} | {choice.option: choice.value for choice in choices}
        for seed in range(SEEDS)
        for label, choices in rows.items()
    ]
    pathlib.Path(args.output).write_text(
        f'"""Compares recipes at {args.minutes:g} minutes; from benchmarks/equal_time.py."""\n\n'
        "from dense_jax.experiments.base import get_config\n\n"
        f"RUNS = {pprint.pformat(runs, sort_dicts=False)}\n\n\n"
        "def get_sweep():\n    return RUNS\n"
    )


def _changes(experiment: ConfigDict) -> list[Choice]:
    """Returns the options that an experiment changes, without its dataset, and its batch size."""
    default = files.flatten(base.get_config().to_dict())
    return [
        Choice(option, value)
        for option, value in files.flatten(experiment.to_dict()).items()
        if option == "batch_size" or (value != default[option] and option != "data.name")
    ]


if __name__ == "__main__":
    main()
