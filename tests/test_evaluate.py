"""Tests that evaluation counts each valid pixel exactly once, for any batch size."""

import functools
import json
import math
import re
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from dense_jax import data, evaluate, load, metrics, predict, train
from dense_jax.data.tiles import tilings
from dense_jax.devices import mesh
from dense_jax.evaluation import class_maps, per_image, scoring, tables
from dense_jax.labels import IGNORE_LABEL
from dense_jax.metrics import Metric, aggregation
from dense_jax.report import tables as report_tables
from dense_jax.report.rows import build
from experiments import base

SMALL = {"tile_size": (8, 10), "margin": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    """A workdir trained for one step, whose images are padded to several sizes."""
    path = tmp_path_factory.mktemp("run")
    config = base.get_config()
    config.num_steps = 1
    config.batch_size = 4
    config.model.widths = (2, 3)
    config.data.name = "folder"
    config.data.root = str(tiny_folder)
    config.data.crop_size = (8, 8)
    train.train(config, str(path))
    dataset = json.loads((path / "dataset.json").read_text())
    dataset["ladder"] = [[12, 16], [14, 15], *dataset["ladder"]]
    (path / "dataset.json").write_text(json.dumps(dataset))
    return path


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """A function that evaluates the test split, once for the same options, in a folder of its own.

    Returns the evaluation and the path of its JSON file.
    """

    @functools.cache
    def evaluate_once(**options):
        output = tmp_path_factory.mktemp("evaluated")
        options = {"foreground": ("bright", "bright")} | options
        evaluation = evaluate.evaluate(str(run), "test", output=str(output), **options)
        return evaluation, output / "evaluation_test.json"

    return evaluate_once


@pytest.fixture(scope="module")
def source(tiny_folder):
    return data.open_dataset("folder", str(tiny_folder), "test")


def counts_of(evaluation):
    return np.array(evaluation["confusion_matrix"])


# 17. segmentation_models.pytorch#207, #226, DABNet#8: mean IoU depends on the batch size
@pytest.mark.parametrize(
    ("tiles", "batch_sizes"), [({}, [1]), (SMALL, [1, 5])], ids=["whole", "small"]
)
def test_the_matrix_holds_every_valid_pixel_for_every_batch_size(
    evaluated, source, tiles, batch_sizes
):
    options = [{}, *({"batch_size": b, "boundaries": False} for b in batch_sizes)]
    matrices = [counts_of(evaluated(**tiles, **more)[0]) for more in options]
    labels = np.concatenate([source[i]["label"].ravel() for i in range(len(source))])
    for matrix in matrices:
        np.testing.assert_array_equal(matrix, matrices[0])
        np.testing.assert_array_equal(matrix.sum(axis=1), np.bincount(labels, minlength=256)[:2])
    assert evaluated(**tiles)[0]["num_pixels"] == np.sum(labels != IGNORE_LABEL)


def test_predict_writes_the_labels_that_evaluate_counts(
    run, evaluated, source, tiny_folder, tmp_path
):
    problems = predict.predict(str(run), str(tiny_folder / "images/test/*.png"), tmp_path / "out")
    assert problems == []
    total, measured = 0, []
    for i in range(len(source)):
        example = source[i]
        with Image.open(tmp_path / "out" / f"{example['name']}.png") as written:
            assert written.mode == "P"
            classes = np.asarray(written).astype(np.int32)
        total += np.asarray(metrics.confusion_matrix(classes, example["label"], 2)).astype(int)
        measured.append(per_image.measure(classes, example["label"], 2, [1]))
        with Image.open(tmp_path / "out" / f"{example['name']}_overlay.png") as overlay:
            assert (overlay.height, overlay.width) == example["label"].shape
    evaluation, path = evaluated()
    assert evaluation["eval/foreground_iou"] == evaluation["eval/iou/bright"]
    np.testing.assert_array_equal(total, counts_of(evaluation))
    with np.load(path.with_suffix(".npz")) as kept:
        for name, expected in measured[0].items():
            assert kept[name].shape == (len(source), *expected.shape)
            np.testing.assert_array_equal(kept[name], [image[name] for image in measured])


@pytest.mark.parametrize("tiles", [{}, SMALL], ids=["whole", "small"])
def test_an_image_alone_has_the_class_map_that_it_has_in_its_split(run, evaluated, source, tiles):
    _, path = evaluated(**tiles)
    maps = class_maps.read(path.with_suffix(".zip"), range(len(source)))
    predictor = load(run).using(**tiles)
    for example, classes in zip(source, maps, strict=True):
        np.testing.assert_array_equal(predictor(example["image"]), classes)


@pytest.mark.parametrize("options", [{}, {"batch_size": 1, "boundaries": False}], ids=len)
def test_the_class_maps_that_were_scored_are_kept(evaluated, source, options):
    evaluation, path = evaluated(**SMALL, **options)
    with np.load(path.with_suffix(".npz")) as kept:
        assert tuple(kept["names"]) == source.names
    maps = class_maps.read(path.with_suffix(".zip"), range(len(source)))
    counts = [
        metrics.confusion_matrix(classes, example["label"], 2)
        for classes, example in zip(maps, source, strict=True)
    ]
    np.testing.assert_array_equal(np.sum(counts, axis=0), counts_of(evaluation))
    assert not list(path.parent.glob("*.tmp"))


def test_the_worst_images_are_drawn_worst_first(evaluated, source):
    _, path = evaluated()
    with np.load(path.with_suffix(".npz")) as kept:
        scores = metrics.image_mean_ious(kept["confusion_matrices"])
    with Image.open(path.with_suffix(".png")) as picture:
        whole = np.asarray(picture)
    worst_first = np.argsort(scores).tolist()

    def drawn(numbers):
        return class_maps.draw(path.with_suffix(".zip"), source, numbers, scores)

    np.testing.assert_array_equal(drawn(worst_first), whole)
    worst, best = drawn(worst_first[:1]), drawn(worst_first[-1:])
    first = worst.shape[0] // 2  # the legend is below
    np.testing.assert_array_equal(worst[:first], whole[:first, : worst.shape[1]])
    assert not np.array_equal(best[:first], worst[:first])


def test_class_maps_of_images_with_any_name_are_kept(tmp_path):
    names = ["../../a/b", "\n", "a" * 500, "\udcff", "", "same", "same"]
    palette = np.arange(6, dtype=np.uint8).reshape(2, 3)
    maps = [np.full((3, 4), i % 2, np.uint8) for i in range(len(names))]
    with class_maps.writing(tmp_path / "kept.zip", names, palette) as write:
        for i in reversed(range(len(names))):
            write(i, maps[i])
        assert not (tmp_path / "kept.zip").exists()
    with zipfile.ZipFile(tmp_path / "kept.zip") as archive:
        archive.extractall(tmp_path / "extracted")
    assert len(list((tmp_path / "extracted").iterdir())) == len(names)
    read = class_maps.read(tmp_path / "kept.zip", [2, 0, 1])
    np.testing.assert_array_equal(read, [maps[2], maps[0], maps[1]])
    with Image.open(tmp_path / "extracted" / "00006_same.png") as picture:
        assert picture.convert("RGB").getpixel((0, 0)) == tuple(palette[0])


def test_the_files_hold_the_same_numbers(evaluated):
    evaluation, path = evaluated()
    written = json.loads(path.read_text())
    assert written["eval/mean_iou"] == evaluation["eval/mean_iou"]
    assert written["step"] == 1
    text = path.with_suffix(".md").read_text()
    assert f"{evaluation['eval/mean_iou']:.3f}" in text
    assert "| dark |" in text and "| bright |" in text
    for name in ("iou/dark", "dice/dark", "accuracy/dark", "boundary_f1/dark", "mean_boundary_f1"):
        score, (low, high) = written[f"eval/{name}"], written["intervals"][f"eval/{name}"]
        assert f" {score:.3f} ({low:.3f} to {high:.3f}) " in text, name
        assert low <= score <= high


def test_the_baselines_are_stated_and_the_classes_below_them_named(evaluated):
    """One gray level tells these classes apart, which the network cannot after one step."""
    evaluation, path = evaluated()
    written = json.loads(path.read_text())
    assert written["baselines"]["threshold"]["mean_iou"] == 1.0
    assert list(written["below_baseline"]) == ["dark", "bright"]
    text = path.with_suffix(".md").read_text()
    assert "Mean IoU without a network: " in text and "1.000 (bright from gray level " in text
    score = evaluation["eval/iou/dark"]
    assert f"lower than without a network: dark ({score:.3f}, but 1.000 with " in text


# 18. MMSegmentation#2594, #3464: is a score per image, or of the whole split?
@pytest.mark.parametrize("tiles", [{}, SMALL], ids=["whole", "small"])
def test_the_matrix_of_each_image_is_kept(evaluated, source, tiles):
    """Any score can be made from it later: here, the mean over images of the mean IoU."""
    evaluation, path = evaluated(**tiles)
    with np.load(path.with_suffix(".npz")) as kept:
        matrices = kept["confusion_matrices"]
    np.testing.assert_array_equal(matrices.sum(axis=0), counts_of(evaluation))
    for i, matrix in enumerate(matrices):
        truth = np.bincount(source[i]["label"].ravel(), minlength=256)[:2]
        np.testing.assert_array_equal(matrix.sum(axis=1), truth)
    scores = [metrics.summarize(matrix)["mean_iou"] for matrix in matrices]
    assert evaluation["eval/mean_over_images/mean_iou"] == pytest.approx(np.mean(scores))


class InThisProcess:
    """A per_image.Pool without processes, which would not know a metric registered here."""

    def __init__(self, *options):
        self.options, self.measured = options, {}

    def submit(self, i, prediction, label):
        self.measured[i] = per_image.measure(prediction, label, *self.options)

    def results(self):
        images = [self.measured[i] for i in sorted(self.measured)]
        return {name: np.stack([image[name] for image in images]) for name in images[0]}

    def close(self):
        pass


def kappa(n):
    by_chance = n.true @ n.predicted / n.total**2
    return (n.hit.sum() / n.total - by_chance) / (1 - by_chance)


def surface_error(maps):
    """One minus the normalized surface distance at 2 pixels."""
    return maps.per_class(lambda forth, back: np.mean(np.concatenate([forth, back]) > 2))


def test_a_metric_that_is_declared_is_computed_and_shown_everywhere(run, monkeypatch, tmp_path):
    for metric in (
        Metric("kappa", "Cohen's kappa", kappa, per_class=False),
        Metric("surface_error", "surface error", surface_error, "boundary", higher_is_better=False),
    ):
        monkeypatch.setitem(metrics.METRICS, metric.name, metric)
    monkeypatch.setattr(per_image, "Pool", InThisProcess)
    evaluation = evaluate.evaluate(str(run), "test", output=str(tmp_path / "scores"))
    path = tmp_path / "scores" / "evaluation_test.json"
    written = json.loads(path.read_text())
    matrix = counts_of(evaluation)
    chance = matrix.sum(axis=0) @ matrix.sum(axis=1) / matrix.sum() ** 2
    expected = (np.trace(matrix) / matrix.sum() - chance) / (1 - chance)
    assert written["eval/kappa"] == pytest.approx(expected)
    for name in ("kappa", "mean_over_images/kappa", "mean_surface_error", "surface_error/dark"):
        low, high = written["intervals"][f"eval/{name}"]
        assert low <= written[f"eval/{name}"] <= high
    text = path.with_suffix(".md").read_text()
    assert "| Cohen's kappa |" in text and "| surface error |" in text
    assert f" {written['eval/kappa']:.3f} (" in text

    for loss, score in (("a", 0.25), ("b", 0.5)):
        folder = shutil.copytree(run, tmp_path / "runs" / loss)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"loss": loss}))
        changed = written | {"eval/kappa": score, "eval/mean_surface_error": score}
        (folder / "evaluation_test.json").write_text(json.dumps(changed))
    head, *body = report_tables.score_table(build(tmp_path / "runs", split="test"))
    bold = {}
    for label in ("Cohen's kappa", "mean surface error"):
        (k,) = (k for k, cell in enumerate(head) if cell.text == label)
        bold[label] = [line[k].text for line in body if line[k].is_bold]
    assert bold == {"Cohen's kappa": ["0.500"], "mean surface error": ["0.250"]}


def test_training_holds_the_sum_of_the_matrices_alone(source):
    """In int64: large splits have more pixels than int32 can count."""

    def eval_step(_, batch):
        counts = np.full((len(batch["index"]), 2, 2), 2**31 - 1, np.int32)
        return {"index": batch["index"], "counts": counts}, None

    options = {"mesh": mesh.make_mesh(), "batch_size": 4, "workers": 0}
    tiles = tilings(source, [(14, 16)], (32, 32), 0)
    matrices = scoring.score(eval_step, None, tiles, **options)["counts"]
    total = scoring.score(eval_step, None, tiles, per_image=False, **options)["counts"]
    assert len(tiles) == 2 and matrices.shape == (5, 2, 2)
    assert total.shape == (2, 2) and total.dtype == np.int64
    np.testing.assert_array_equal(total, matrices.sum(axis=0, dtype=np.int64))


# 19. pytorch-lightning#3097, tensorflow#12294: a class that is nowhere scores 0
# 21. MONAI#7504: a class without a score is reported as 0
def test_a_class_without_score_is_null_and_named():
    prediction, label = np.zeros((2, 3, 3), int)
    image = per_image.measure(prediction, label, 2) | {"confusion_matrices": [[5, 0], [0, 0]]}
    measured = {name: np.stack([value, value]) for name, value in image.items()}
    names = ["a\n", "b|c"]
    sums = aggregation.add_up(aggregation.image_statistics(measured))
    scores = metrics.named_scores(aggregation.score(sums), names)
    assert scores["eval/mean_iou"] == 1.0 and scores["eval/mean_boundary_f1"] == 1.0
    for metric in ("iou", "dice", "accuracy", "boundary_f1", "boundary_iou", "hausdorff95"):
        assert math.isnan(scores[f"eval/{metric}/b|c"])
    text = tables.to_markdown(
        {
            "dataset": "x",
            "root": "",
            "split": "test",
            "step": 1,
            "num_images": 2,
            "num_pixels": 10,
            "class_names": names,
            "classes_without_score": ["b|c"],
            "foreground": [],
            "regions": None,
            **scores,
            "intervals": {name: (score, score) for name, score in scores.items()},
            "num_images_missed": [0, 0],
            "num_images_invented": [0, 0],
            "baselines": {},
            "below_baseline": {},
        }
    )
    assert "| a | 1.000 (1.000 to 1.000) |" in text
    assert "b\\|c" not in text  # it has no row
    assert "In no label and never predicted, so in no mean: b|c." in text
    assert "nan" not in text


@pytest.mark.parametrize("num_shown", [tables.MANY, tables.MANY + 1])
def test_many_classes_are_sorted_by_pixels_and_absent_ones_take_one_line(num_shown):
    num_classes = 40
    rng = np.random.default_rng(0)
    matrices = rng.integers(1, 99, (3, num_classes, num_classes)) ** 2
    matrices[:, num_shown:] = matrices[:, :, num_shown:] = 0
    measured = {"confusion_matrices": matrices}
    names = [f"class{k}" for k in range(num_classes)]
    scores = evaluate._scores(measured, names, [])
    matrix = matrices.sum(axis=0)
    about = {"dataset": "x", "root": "", "split": "test", "step": 1, "num_images": 3}
    about |= {"num_pixels": matrix.sum(), "class_names": names, "foreground": [], "regions": None}
    about |= {"baselines": {}, "below_baseline": {}}
    text = tables.to_markdown({**about, **scores, "confusion_matrix": matrix})
    order = list(range(num_shown))
    if num_shown > tables.MANY:
        order.sort(key=lambda k: -sum(matrix[k]))
        assert order != sorted(order)
    assert re.findall(r"^\| (class\d+) ", text, re.MULTILINE) == [f"class{k}" for k in order]
    assert ("Classes are sorted" in text) == (num_shown > tables.MANY)
    assert f"in no mean: {', '.join(names[num_shown:])}." in text
    first = re.search(rf"^\| class{order[0]} \| ([\d.]+)", text, re.MULTILINE)
    assert float(first[1]) == round(scores[f"eval/iou/class{order[0]}"], 3)


def test_what_no_image_shows_and_what_one_side_alone_shows(run, monkeypatch):
    """By chosen matrices, so that the model does not matter."""
    dark, missed, invented = [[5, 0], [0, 0]], [[2, 0], [3, 0]], [[4, 1], [0, 0]]
    for matrices, without, num_missed, num_invented in (
        ([dark, dark, dark], ["bright"], [0, 0], [0, 0]),
        ([missed, invented, missed], [], [0, 2], [0, 1]),
    ):
        sums = {"counts": np.array(matrices, np.int32)[:, None]}
        shapes = {"nll": (), "brier": (), "binned": (3, 15, 2), "probability": (3, 15)}
        sums |= {name: np.zeros((3, 1, *shape)) for name, shape in shapes.items()}
        monkeypatch.setattr(evaluate.scoring, "score", lambda *_, found=sums, **__: found)
        monkeypatch.setattr(evaluate.class_maps, "draw", lambda *_: np.zeros((1, 1, 3), np.uint8))
        evaluate.evaluate(str(run), "val", boundaries=False)
        written = json.loads((run / "evaluation_val.json").read_text())
        assert written["classes_without_score"] == without
        assert written["num_images_missed"] == num_missed
        assert written["num_images_invented"] == num_invented
        assert written["eval/iou/bright"] == (None if without else 0)
        assert written["intervals"]["eval/iou/bright"] == ([None, None] if without else [0, 0])


def test_an_unknown_foreground_class_is_refused_with_those_there_are(run):
    with pytest.raises(ValueError, match=r"no classes \['cell'\]; there are: dark, bright"):
        evaluate.evaluate(str(run), "test", foreground=["cell"])


def test_another_splits_name_is_refused_with_those_there_are(run):
    with pytest.raises(ValueError, match=r"no split 'dev'.*test, train, val"):
        evaluate.evaluate(str(run), "dev")


def test_a_predictor_gives_classes_and_their_probabilities(run):
    predictor = load(run, "latest")
    image = np.random.default_rng(0).integers(0, 256, (9, 14, 1)).astype(np.uint8)
    probabilities = predictor.probabilities(image)
    assert probabilities.shape == (9, 14, 2) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(probabilities.argmax(axis=-1), predictor(image))
    np.testing.assert_array_equal(predictor.probabilities(image[..., 0]), probabilities)
    assert repr(predictor).startswith("<Predictor: unet with encoder plain, step ")
    assert f"of {run}; 2 classes: dark, bright; " in repr(predictor)


def test_data_may_lie_elsewhere_and_files_go_where_they_are_asked_to(run, tiny_folder, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    root = shutil.copytree(tiny_folder, tmp_path / "data")
    output = tmp_path / "new" / "folder"
    evaluation = evaluate.evaluate(
        str(run), "test", boundaries=False, root=str(root), output=str(output)
    )
    assert evaluation["root"] == str(root)
    names = {path.name for path in output.iterdir()}
    kinds = (".json", ".md", ".npz", ".png", ".zip", "_reliability.png")
    assert names == {f"evaluation_test{kind}" for kind in kinds}
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to .*/file .*--output=DIR"):
        evaluate.evaluate(str(run), "test", output=str(tmp_path / "file"))


def test_data_that_are_gone_are_asked_for(run, tmp_path):
    moved = shutil.copytree(run, tmp_path / "run")
    config = json.loads((moved / "config.json").read_text())
    config["data"]["root"] = str(tmp_path / "nowhere")
    (moved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"nowhere is gone: pass --root=FOLDER"):
        evaluate.evaluate(str(moved), "test")


def test_labels_that_mean_something_else_now_are_refused(run, tmp_path):
    """Other files, by root=, may have values of their own."""
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    about = json.loads((moved / "dataset.json").read_text())
    (moved / "dataset.json").write_text(json.dumps(about | {"values": about["values"][::-1]}))
    with pytest.raises(ValueError, match=r"has values \[.*\], but the run was trained with"):
        evaluate.evaluate(str(moved), "test")


def test_other_data_in_place_of_the_run_s_are_said(run, evaluated, tiny_folder, tmp_path, caplog):
    output, root = tmp_path / "out", shutil.copytree(tiny_folder, tmp_path / "data")
    shutil.copytree(evaluated()[1].parent, output)
    options = {"boundaries": False, "output": str(output), "root": str(root)}
    evaluate.evaluate(str(run), "test", **options)
    assert "was of other data" not in caplog.text
    for kind in ("images", "labels"):
        (root / kind / "test" / "0.png").rename(root / kind / "test" / "9.png")
    evaluate.evaluate(str(run), "test", **options)
    assert f"was of other data, {root}, and is replaced" in caplog.text


def test_the_json_file_is_there_when_all_is(run, evaluated, tmp_path, monkeypatch):
    def die(*_, **__):
        raise KeyboardInterrupt

    output = shutil.copytree(evaluated()[1].parent, tmp_path / "out")
    monkeypatch.setattr(np, "savez_compressed", die)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(str(run), "test", boundaries=False, output=str(output))
    assert not (output / "evaluation_test.json").exists()
