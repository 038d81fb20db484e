"""Divides the training split into folds, for cross-validation.

With config.data.folds=K and config.data.fold=k, fold k of the training split is held out: the other
folds are trained on, and fold k is the evaluation split, by the name "fold". Other splits, such as
"test", stay as they are. The training split itself, by its name, is all of it.

ROOT/groups.csv assigns images to groups, such as patients or scenes, that must not be divided:

    NAME,GROUP                             one line per image, without a header

Every image of the training split must be listed. Images of other splits may be. The largest group
comes first; each goes to the fold that has the fewest images so far. Without this file, fold k is
the k-th block of the images sorted by name: neighboring frames or slices mostly stay together.

The best checkpoint is the one with the best score on the held-out fold, which flatters that score.
The scores at the end of training, which the report shows without --split, are free of this choice.
"""

import collections
import csv
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int64

from dense_jax import data
from dense_jax.data import files
from dense_jax.data.subset import Subset
from dense_jax.spelling import some

FOLD = "fold"  # the name of the held-out fold as a split
GROUPS = "groups.csv"


def eval_split(config: Any) -> str:
    """Returns the split that a run evaluates in training. `config` has the options of `data`."""
    return FOLD if config.get("folds") else config["eval_split"]


def open_split(config: Any, split: str, root: str) -> data.Source:
    """Opens a split of a run's dataset, or its held-out fold. `config` is as in `eval_split`."""
    if config.get("folds") and split == FOLD:
        return divide(config, root)[1]
    return data.open_dataset(config["name"], root, split)


def open_splits(config: Any) -> tuple[data.Source, data.Source]:
    """Opens the examples that a run trains on and those that it evaluates in training."""
    if config.get("folds"):
        return divide(config, config["root"])
    train, evaluated = (
        data.open_dataset(config["name"], config["root"], config[split])
        for split in ("train_split", "eval_split")
    )
    return train, evaluated


def divide(config: Any, root: str) -> tuple[Subset, Subset]:
    """Returns the training split without the held-out fold, and the held-out fold.

    Raises ValueError if there are too few images or groups, or if groups.csv is wrong.
    """
    source = data.open_dataset(config["name"], root, config["train_split"])
    fold_of = assign(source.names, config["folds"], groups_of(root, source.names))
    is_held_out = fold_of == config["fold"]
    rest, fold = (Subset(source, np.flatnonzero(part)) for part in (~is_held_out, is_held_out))
    return rest, fold


def assign(
    names: Sequence[str], num_folds: int, groups: Sequence[str] | None = None
) -> Int64[np.ndarray, "n"]:
    """Returns the fold of each image, which depends on the names and the groups alone.

    groups: The group of each image. If None, the folds are blocks of the sorted names.
    """
    units = len(names) if groups is None else len(set(groups))
    if units < num_folds:
        kind = "images" if groups is None else f"groups in {GROUPS}"
        raise ValueError(f"data.folds={num_folds}, but there are {units} {kind}: use fewer folds")
    folds = np.zeros(len(names), np.int64)
    if groups is None:
        order = sorted(range(len(names)), key=names.__getitem__)
        folds[order] = np.arange(len(names)) * num_folds // len(names)
        return folds
    sizes, counts = [0] * num_folds, collections.Counter(groups)
    for group in sorted(counts, key=lambda group: (-counts[group], group)):
        smallest = sizes.index(min(sizes))
        folds[np.array(groups) == group] = smallest
        sizes[smallest] += counts[group]
    return folds


def read_groups(root: str) -> dict[str, str] | None:
    """Returns {NAME: GROUP} according to ROOT/groups.csv, or None without this file.

    Raises ValueError if a line is malformed or gives an image another group.
    """
    path = epath.Path(root) / GROUPS
    if not root or not path.exists():
        return None
    group_of: dict[str, str] = {}
    lines = path.read_bytes().decode("utf-8-sig").splitlines()
    for number, line in enumerate(csv.reader(lines), start=1):
        cells = [files.composed(cell.strip()) for cell in line]
        if len(cells) != 2 or not all(cells):
            raise ValueError(f"{path}, line {number}: expected NAME,GROUP, got {line}")
        name, group = cells
        if (other := group_of.setdefault(name, group)) != group:
            raise ValueError(
                f"{path}, line {number}: {name!r} is in {group!r}, and above in {other!r}"
            )
    return group_of


def groups_of(root: str, names: Sequence[str]) -> list[str] | None:
    """Returns the group of each image, or None without groups.csv.

    Raises ValueError if groups.csv has a mistake or does not list an image.
    """
    if (group_of := read_groups(root)) is None:
        return None
    names = [files.composed(name) for name in names]
    if missing := [name for name in names if name not in group_of]:
        path = epath.Path(root) / GROUPS
        raise ValueError(f"{path}: no group for {len(missing)} images: {some(missing)}")
    return [group_of[name] for name in names]
