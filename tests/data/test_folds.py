"""Tests how images are divided into folds."""

import itertools
import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from dense_jax.data import doctor, folds, open_dataset, prepare


def draw_groups(seed, n=60, num_groups=13):
    """Names and groups of n images. Groups differ much in size."""
    random = np.random.default_rng(seed)
    chances = random.dirichlet(np.full(num_groups, 0.7))
    groups = [f"patient{g}" for g in random.choice(num_groups, n, p=chances)]
    return [f"image{i:02d}" for i in range(n)], groups


def write_folder(root, names, splits=("train",), gray=0):
    """A dataset with images of these names in each split."""
    for split, kind in itertools.product(splits, ("images", "labels")):
        (root / kind / split).mkdir(parents=True)
        for i, name in enumerate(names):
            pixels = np.full((8, 8), i % 2, np.uint8)
            pixels[0] = 1 - pixels[0]
            pixels = pixels if kind == "labels" else 40 * pixels + 10 * i + gray
            Image.fromarray(pixels.astype(np.uint8)).save(root / kind / split / f"{name}.png")
    (root / "dataset.json").write_text(json.dumps({"classes": ["a", "b"]}))


def settings(root, fold=0, num_folds=3, **changes):
    """The section `data` of a config."""
    section = {"name": "folder", "root": str(root), "train_split": "train", "eval_split": "val"}
    return ConfigDict(section | {"folds": num_folds, "fold": fold} | changes)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_folds", [2, 5])
def test_no_group_is_in_two_folds_and_the_folds_are_balanced(seed, num_folds):
    names, groups = draw_groups(seed)
    fold_of = folds.assign(names, num_folds, groups)
    sizes = np.bincount(fold_of, minlength=num_folds)
    assert len(fold_of) == len(names) and len(sizes) == num_folds and sizes.all()
    assert len(set(zip(groups, fold_of.tolist(), strict=True))) == len(set(groups))
    # Each group went to the smallest fold, so no two folds differ by more than one group.
    assert np.ptp(sizes) <= max(map(groups.count, groups))


def test_folds_by_group_depend_on_neither_the_order_nor_the_names_of_images():
    names, groups = draw_groups(7)
    order = np.random.default_rng(0).permutation(len(names))
    shuffled = folds.assign([names[i] for i in order], 4, [groups[i] for i in order])
    np.testing.assert_array_equal(shuffled, folds.assign(names, 4, groups)[order])


def test_equal_groups_are_dealt_by_name():
    groups = ["b", "d", "a", "c", "a", "c", "b", "d"]
    fold_of = folds.assign([f"{i}" for i in range(8)], 2, groups)
    assert dict(zip(groups, fold_of.tolist(), strict=True)) == {"a": 0, "b": 1, "c": 0, "d": 1}


@pytest.mark.parametrize(("n", "num_folds"), [(7, 3), (5, 5), (100, 4)])
def test_without_groups_folds_are_blocks_of_the_sorted_names(n, num_folds):
    names = [f"frame{i:03d}" for i in range(n)]
    order = np.random.default_rng(0).permutation(n)
    fold_of = folds.assign([names[i] for i in order], num_folds)[np.argsort(order)]
    assert (np.diff(fold_of) >= 0).all()
    sizes = np.bincount(fold_of)
    assert len(sizes) == num_folds and np.ptp(sizes) <= 1


def test_the_held_out_folds_partition_the_split(tmp_path):
    names = [f"image{i}" for i in range(8)]
    write_folder(tmp_path, names)
    (tmp_path / "groups.csv").write_text("".join(f"image{i}, scan{i // 2}\n" for i in range(8)))
    seen, prints = [], set()
    for k in range(3):
        rest, fold = folds.open_splits(settings(tmp_path, k))
        assert sorted(rest.names + fold.names) == names
        scans = [{int(name[-1]) // 2 for name in part.names} for part in (rest, fold)]
        assert not scans[0] & scans[1]
        assert tuple(fold[i]["name"] for i in range(len(fold))) == fold.names
        again = folds.open_split(settings(tmp_path, k), "fold", str(tmp_path))
        assert (again.names, again.fingerprint) == (fold.names, fold.fingerprint)
        whole = folds.open_split(settings(tmp_path, k), "train", str(tmp_path))
        assert len(whole) == 8 and rest.split.fingerprint == whole.fingerprint
        seen += fold.names
        prints |= {rest.fingerprint, fold.fingerprint}
    assert sorted(seen) == names and len(prints) == 6


def test_other_groups_give_the_held_out_fold_another_fingerprint(tmp_path):
    write_folder(tmp_path, ["a", "b", "c", "d"])
    found = []
    for groups in ("a,1\nb,1\nc,2\nd,2\n", "a,1\nb,2\nc,1\nd,2\n"):
        (tmp_path / "groups.csv").write_text(groups)
        found.append(folds.open_splits(settings(tmp_path, num_folds=2))[1].fingerprint)
    assert found[0] != found[1]


MISTAKES = {
    "a,1\nb,2\nc,3\n": "groups.csv: no group for 1 images: d",
    "a,1\nb\n": r"groups.csv, line 2: expected NAME,GROUP, got \['b'\]",
    "a,1\nb,\n": "groups.csv, line 2: expected NAME,GROUP",
    "a,1\nb,1\nc,2\na,2\n": "groups.csv, line 4: 'a' is in '2', and above in '1'",
    "a,1\nb,1\nc,2\nd,2\n": "data.folds=3, but there are 2 groups in groups.csv: use fewer folds",
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.items())
def test_mistakes_in_groups_are_one_clear_error(tmp_path, text, message):
    write_folder(tmp_path, ["a", "b", "c", "d"])
    (tmp_path / "groups.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        folds.open_splits(settings(tmp_path))


def test_more_folds_than_images_are_an_error():
    with pytest.raises(ValueError, match="but there are 2 images: use fewer"):
        folds.assign(["a", "b"], 3)


def test_a_prepared_copy_has_the_same_folds(tmp_path):
    write_folder(tmp_path / "files", [f"image{i}" for i in range(6)], ("train", "test"))
    lines = (f"image{i},{'xyxzzy'[i]}\n" for i in range(6))
    (tmp_path / "files" / "groups.csv").write_text("".join(lines))
    prepare.copy("folder", str(tmp_path / "files"), str(tmp_path / "records"))
    for k in range(3):
        original = folds.open_splits(settings(tmp_path / "files", k))
        copied = folds.open_splits(settings(tmp_path / "records", k, name="records"))
        assert [part.names for part in copied] == [part.names for part in original]


def test_a_split_of_a_run_without_folds_is_as_named(tmp_path):
    write_folder(tmp_path, ["a", "b"], ("train", "val"))
    pair = folds.open_splits(settings(tmp_path, num_folds=None))
    expected = [open_dataset("folder", str(tmp_path), split) for split in ("train", "val")]
    assert [part.fingerprint for part in pair] == [source.fingerprint for source in expected]


def test_the_doctor_names_groups_that_are_in_two_splits_and_images_without_group(tmp_path):
    write_folder(tmp_path, ["a", "b"])
    write_folder(tmp_path, ["c", "d"], ("test",), gray=100)
    path = tmp_path / "groups.csv"
    path.write_text("a,1\nb,2\nc,2\nd,3\n")
    reports = doctor.examine("folder", str(tmp_path))
    assert "1 groups of groups.csv are in train too: 2" in reports["test"]["warnings"]
    path.write_text("a,1\nc,2\nd,3\n")
    reports = doctor.examine("folder", str(tmp_path))
    assert reports["train"]["errors"] == [f"{path}: no group for 1 images: b"]
    assert not reports["test"]["errors"]
    path.write_text("a,1\nb,2\n")  # a split that is divided by nobody needs no groups
    reports = doctor.examine("folder", str(tmp_path))
    assert not any(report["errors"] for report in reports.values())
