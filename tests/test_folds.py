"""Tests cross-validation from training to the report."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest

from dense_jax import data, demo, evaluate, sweep, train
from dense_jax.report import gallery, tables
from dense_jax.report.rows import build
from dense_jax.sweep.plan import run_names
from experiments import base

pytestmark = pytest.mark.usefixtures("shared_programs")
NUM_FOLDS = 2
SWEEP = sweep.grid(**{"data.folds": [NUM_FOLDS], "seed": [0, 1], "data.fold": range(NUM_FOLDS)})


def make_config(folder, override):
    config = base.get_config()
    config.num_steps, config.batch_size, config.optimizer.warmup_steps = 2, 4, 1
    config.model.widths, config.model.convs_per_level = (2, 3), 1
    config.data.name, config.data.root = "folder", str(folder)
    config.data.crop_size = (8, 8)
    config.eval.num_pictures = 0
    config.data.eval_split = "none"  # a dataset needs no other split
    config.update_from_flattened_dict(override)
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder):
    """A folder with a sweep over two seeds of two folds, trained and evaluated."""
    root = tmp_path_factory.mktemp("sweep")
    for name, override in zip(run_names(SWEEP), SWEEP, strict=True):
        train.train(make_config(tiny_folder, override), str(root / name))
        evaluate.evaluate(str(root / name), boundaries=False)
    return root


def read(path):
    return json.loads(path.read_text())


def test_each_image_of_the_split_is_scored_once_by_a_network_that_was_not_trained_on_it(
    runs, tiny_folder
):
    names = data.open_dataset("folder", str(tiny_folder), "train").names
    scored, fingerprints = [], set()
    for k in range(NUM_FOLDS):
        folder = runs / f"fold={k},seed=0"
        with np.load(folder / "evaluation_fold.npz") as kept:
            images = kept["names"].tolist()
        dataset, result = read(folder / "dataset.json"), read(folder / "result.json")
        evaluation = read(folder / "evaluation_fold.json")
        assert dataset["num_examples"] + len(images) == len(names)
        assert result["num_eval_images"] == len(images) == evaluation["num_images"]
        assert dataset["eval_fingerprint"] == evaluation["dataset_fingerprint"]
        fingerprints |= {dataset["fingerprint"], dataset["eval_fingerprint"]}
        scored += images
    assert sorted(scored) == sorted(names)
    assert len(fingerprints) == 1 + NUM_FOLDS


@pytest.mark.parametrize("split", [None, "fold"])
def test_the_report_has_intervals_over_folds(runs, split):
    report = build(runs, split)
    (row,) = report.rows
    assert len(row.runs) == 4 and row.num_units == NUM_FOLDS and not report.notes
    file = f"evaluation_{split}.json" if split else "result.json"
    scores = []
    for k in range(NUM_FOLDS):
        kept = [read(runs / f"fold={k},seed={seed}" / file) for seed in (0, 1)]
        scores.append(np.mean([one.get("final", one)["eval/mean_iou"] for one in kept]))
    mean, half = row.score("eval/mean_iou")
    low, high = sorted(scores)  # two folds have no interval
    np.testing.assert_allclose([mean - half, mean + half], [low, high], rtol=1e-9)
    assert re.search(r"\| 0\.\d+ \(0\.\d+, 0\.\d+\) .* \| 2 \|", tables.to_markdown(report))


def test_pictures_are_of_the_held_out_images(runs, tmp_path):
    with np.load(runs / "fold=0,seed=0" / "evaluation_fold.npz") as kept:
        names = set(kept["names"].tolist())
    pictures = gallery.build(build(runs, "fold").rows, 100)
    assert {image["name"] for image in pictures["images"]} == names
    assert all(image["truth"] for image in pictures["images"])
    assert "images of fold 0 with" in pictures["about"]
    written = demo.write_examples(str(runs / "fold=0,seed=0"), str(tmp_path))
    assert {pathlib.Path(path).stem for path in written} == names


def test_a_run_resumes_only_with_its_fold_and_groups(tiny_folder, tmp_path):
    root = shutil.copytree(tiny_folder, tmp_path / "data")
    config, workdir = make_config(root, SWEEP[0]), str(tmp_path / "run")
    train.train(config, workdir)
    (tmp_path / "run" / "result.json").unlink()  # as if the run had been killed at its end
    with pytest.raises(ValueError, match=r"data.fold: 0 there, 1 now"):
        train.train(make_config(root, SWEEP[1]), workdir)
    names = data.open_dataset("folder", str(root), "train").names
    groups = "".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(names))
    (root / "groups.csv").write_text(groups)
    with pytest.raises(ValueError, match=r"evaluation files, or .* or groups.csv, are different"):
        train.train(config, workdir)
    (root / "groups.csv").unlink()
    train.train(config, workdir)
    assert (tmp_path / "run" / "result.json").exists()
