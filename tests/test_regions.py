"""Tests regions from dataset.json to every command, against masks of single regions in NumPy."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import rasterio
import scipy.special
from PIL import Image

from benchmarks.conformance import golden_input
from dense_jax import (
    class_colors,
    data,
    demo,
    evaluate,
    export,
    load,
    metrics,
    plan,
    predict,
    regions,
    train,
)
from dense_jax.data import doctor, fingerprint, prepare
from dense_jax.evaluation import class_maps, per_image
from dense_jax.inference import object_maps, results
from dense_jax.labels import IGNORE_LABEL
from dense_jax.losses import LOSSES, with_border_weights
from dense_jax.metrics.calibration import THRESHOLDS, best_thresholds
from dense_jax.program import assemble
from dense_jax.report import gallery, page
from dense_jax.report.rows import build
from dense_jax.training import task
from dense_jax.training.initial import initial_weights
from experiments import base
from tests.conftest import REPOSITORY

CLASSES = ["normal", "edema", "core"]
DECLARED = {"whole": ["edema", "core"], "core": ["core"], "not/edema": ["normal", "core"]}
REGIONS = regions.read(CLASSES, DECLARED)


def write_dataset(root, declared=DECLARED, classes=CLASSES):
    """Nested boxes on images of several sizes, with an ignored row; the last image has no core."""
    rng = np.random.default_rng(0)
    for split, num_images in (("train", 5), ("val", 3), ("test", 4)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(num_images):
            h, w = 12 + 2 * (i % 3), 16 - (i % 2)
            label = np.zeros((h, w), int)
            label[3:11, i : i + 9] = 1
            if i < num_images - 1:
                label[5:9, i + 2 : i + 6] = 2
            image = 60 + 60 * label + rng.integers(-20, 20, (h, w))
            label[0, : i + 1] = 9
            for kind, pixels in (("images", image), ("labels", label)):
                Image.fromarray(pixels.astype(np.uint8)).save(root / kind / split / f"{i}.png")
    options = {"classes": classes, "ignored_values": [9], "regions": declared}
    (root / "dataset.json").write_text(json.dumps(options))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("regions"))


def small_config(root):
    config = base.get_config()
    config.num_steps, config.batch_size = 2, 4
    config.model.widths = (2, 3)
    config.data.name, config.data.root = "folder", str(root)
    config.data.crop_size = (8, 8)
    config.eval.num_pictures = 1
    return config


@pytest.fixture(scope="module")
def networks(tmp_path_factory, root):
    """Workdirs of two seeds, trained side by side with all that works on labels and their fields."""
    path, config = tmp_path_factory.mktemp("seeds"), small_config(root)
    config.num_seeds = 2
    config.loss = "dice_ce + focal + 0.01 * boundary"
    config.augment.class_mix = 0.5
    config.border.update(weight=2.0, classes=("core",))
    with config.ignore_type():
        config.loss_options.class_weights = (1.0, 2.0, 0.5)
        config.model.auxiliary.update(strides=(2,), weights=(0.4,))
    train.train(config, str(path))
    return [str(path / f"seed={seed}") for seed in (0, 1)]


@pytest.fixture(scope="module")
def evaluated(networks):
    """The calibrated evaluation of the first network on the test split."""
    return evaluate.evaluate(networks[0], "test", calibrate=True)


def examples_of(root, split):
    source = data.open_dataset("folder", str(root), split)
    return [source[i] for i in range(len(source))]


def masks_of(label):
    """The masks [r, h, w] of a label map, and which pixels count."""
    masks = [np.isin(label, [CLASSES.index(c) for c in names]) for names in DECLARED.values()]
    return np.array(masks), label != IGNORE_LABEL


def probabilities_of(networks, examples):
    """Each network's probabilities [networks, pixels, r], and masks [pixels, r], at valid pixels."""
    found = [
        [load(n).probabilities(e["image"])[e["label"] < 3] for e in examples] for n in networks
    ]
    masks = [np.moveaxis(masks_of(e["label"])[0], 0, -1)[e["label"] < 3] for e in examples]
    return np.array([np.concatenate(x) for x in found], np.float64), np.concatenate(masks)


def dice(guess, truth):
    return 2 * np.sum(guess & truth, axis=0) / (guess.sum(axis=0) + truth.sum(axis=0))


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"a": ["core", "cure"]}, "region 'a' has no class 'cure'; there are: normal, edema, core"),
        ({"a": []}, "region 'a' must list the names of its classes"),
        ({"a": "core"}, "region 'a' must list the names of its classes"),
        ({"a": ["core", "core"]}, "region 'a' names a class more than once"),
        ({"a": CLASSES}, "region 'a' has all classes"),
        ({" ": ["core"]}, "cannot have the name ' '"),
        ({}, '"regions" must hold the class names of 1 to 254 regions'),
        (["core"], '"regions" must hold the class names'),
    ],
    ids=str,
)
def test_wrong_regions_are_errors_that_name_the_file(root, tmp_path, declared, message):
    copy = shutil.copytree(root, tmp_path / "data")
    options = {"classes": CLASSES, "ignored_values": [9], "regions": declared}
    (copy / "dataset.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match=f"dataset.json: .*{message}"):
        data.open_dataset("folder", str(copy), "train")


def test_a_region_that_is_declared_twice_is_an_error(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "data")
    text = json.dumps({"classes": CLASSES})[:-1] + ', "regions": {"a": ["core"], "a": ["edema"]}}'
    (copy / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=r"dataset.json: .*\['a'\] more than once"):
        data.open_dataset("folder", str(copy), "train")


def test_masks_are_unions_and_a_picture_shows_the_last_region():
    label = np.array([[0, 1, 2, IGNORE_LABEL]])
    np.testing.assert_array_equal(
        REGIONS.masks(label)[0], [[0, 0, 1], [1, 0, 0], [1, 1, 1], [IGNORE_LABEL] * 3]
    )
    np.testing.assert_array_equal(regions.flat(label, REGIONS), [[3, 1, 3, IGNORE_LABEL]])
    nested = regions.read(CLASSES, {"whole": ["edema", "core"], "core": ["core"]})
    np.testing.assert_array_equal(regions.flat(label, nested), [[0, 1, 2, IGNORE_LABEL]])


def sigmoid_dice(logits, masks, smooth):
    """MONAI's DiceLoss(sigmoid=True, smooth_nr=smooth, smooth_dr=smooth), channels last."""
    p = scipy.special.expit(np.float64(logits))
    pixels = (1, 2)
    numerator = 2 * (p * masks).sum(axis=pixels) + smooth
    return 1 - numerator / (p.sum(axis=pixels) + masks.sum(axis=pixels) + smooth)


def test_dice_of_regions_is_monais_sigmoid_dice():
    logits, labels = golden_input("abs")  # of which the image has no class 2
    masks = REGIONS.masks(labels)
    ours = LOSSES["soft_dice"](logits, masks, per="image", absent="one", smooth=1e-5)
    assert ours == pytest.approx(sigmoid_dice(logits, masks, 1e-5).mean(), rel=1e-5)
    per_batch = LOSSES["soft_dice"](logits, masks)  # without "core", which is absent
    whole = [x.reshape(1, -1, 1, 3) for x in (logits, masks)]
    expected = sigmoid_dice(*whole, 0)[:, [0, 2]]
    assert per_batch == pytest.approx(expected.mean(), rel=1e-5)


def test_cross_entropy_of_regions_is_the_mean_binary_cross_entropy():
    logits, labels = golden_input("ign")
    valid, masks = labels != IGNORE_LABEL, REGIONS.masks(labels)
    p = scipy.special.expit(np.float64(logits))
    nll = -np.log(np.where(masks == 1, p, 1 - p))[valid]  # [pixels, r]
    assert LOSSES["cross_entropy"](logits, masks) == pytest.approx(nll.mean(), rel=1e-5)
    weights = np.array([1, 2, 4])
    ours = LOSSES["cross_entropy"](logits, masks, class_weights=weights)
    assert ours == pytest.approx((nll.mean(axis=0) * weights).sum() / 7, rel=1e-5)
    smooth = LOSSES["cross_entropy"](logits, masks, label_smoothing=0.2)
    both = -np.log(p * (1 - p))[valid]
    assert smooth == pytest.approx((0.8 * nll + 0.1 * both).mean(), rel=1e-5)
    border = np.random.default_rng(0).uniform(0, 9, labels.shape)
    loss = with_border_weights(LOSSES["cross_entropy"], None)
    v = 1 + border[valid][:, None]
    expected = (v * nll).sum() / (3 * v).sum()
    assert loss(*map(jnp.asarray, (logits, masks, border))) == pytest.approx(expected, rel=1e-5)


# Without options that treat classes alike, these are the means of what each region alone gives.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("soft_dice", {}),
        ("soft_jaccard", {"per": "image"}),
        ("tversky", {"alpha": 0.3, "beta": 0.7, "gamma": 0.75}),
        ("lovasz_softmax", {}),
        ("cldice", {}),
        ("cross_entropy", {"label_smoothing": 0.1}),
        ("focal", {"gamma": 0.5}),
    ],
    ids=str,
)
def test_a_region_is_a_segmentation_of_two_classes_whose_inside_alone_is_scored(name, options):
    logits, labels = golden_input("ign")
    masks = REGIONS.masks(labels)
    foreground = {} if name in ("cross_entropy", "focal") else {"class_weights": (0, 1)}
    alone = [
        LOSSES[name](
            np.stack([np.zeros_like(logits[..., k]), logits[..., k]], axis=-1),
            masks[..., k].astype(np.int32),
            **foreground,
            **options,
        )
        for k in range(3)
    ]
    assert LOSSES[name](logits, masks, **options) == pytest.approx(np.mean(alone), rel=1e-5)


def test_scores_of_regions_are_those_of_their_inside():
    rng = np.random.default_rng(0)
    guess, truth = rng.random((2, 40, 3)) < 0.4
    truth[:, 1] = guess[:, 1] = False  # a region that is nowhere
    ignored = np.where(rng.random((40, 1)) < 0.2, IGNORE_LABEL, truth)
    counts = np.asarray(metrics.region_matrices(guess.astype(np.uint8), ignored.astype(np.int32)))
    scores = metrics.summarize(counts)
    guess, truth = (x[ignored[:, 0] <= 1] for x in (guess, truth))
    both, either = (guess & truth).sum(axis=0), (guess | truth).sum(axis=0)
    expected = np.where(either > 0, both / np.maximum(either, 1), np.nan)
    np.testing.assert_allclose(scores["iou"], expected)
    assert scores["mean_iou"] == pytest.approx(np.nanmean(expected))
    assert scores["mean_dice"] == pytest.approx(np.nanmean(2 * expected / (1 + expected)))
    assert scores["pixel_accuracy"] == pytest.approx(np.mean(guess == truth))
    np.testing.assert_allclose(scores["precision"][0], both[0] / guess[:, 0].sum())
    assert counts.sum() == 3 * len(guess)


def test_the_best_threshold_is_found_among_all():
    rng = np.random.default_rng(0)
    truth = rng.random((500, 3)) < [0.3, 0.05, 0.0]
    p = np.float32(scipy.special.expit(rng.normal(size=(500, 3)) - 1 + 2 * truth))
    level = np.searchsorted(np.float32(THRESHOLDS), p)
    counts = np.zeros((3, 2, len(THRESHOLDS) + 1), int)
    for k in range(3):
        np.add.at(counts, (k, truth[:, k].astype(int), level[:, k]), 1)
    found = best_thresholds(counts)
    for k in range(2):
        scores = [dice(p[:, k] > np.float32(t), truth[:, k]) for t in THRESHOLDS]
        assert dice(p[:, k] > np.float32(found[k]), truth[:, k]) == max(scores)
    assert found[2] == 0.5  # of a region that is nowhere


def test_training_keeps_what_the_network_learned(networks, root):
    dataset = json.loads((Path(networks[0]) / "dataset.json").read_text())
    assert (dataset["class_names"], dataset["regions"]) == (CLASSES, DECLARED)
    result = json.loads((Path(networks[0]) / "result.json").read_text())
    for name in DECLARED:
        assert 0 <= result["final"][f"eval/dice/{name}"] <= 1
    assert np.isfinite(result["final"]["eval/loss"])
    examples = examples_of(root, "val")
    (p,), masks = probabilities_of(networks[:1], examples)
    np.testing.assert_allclose(result["final"]["eval/mean_dice"], dice(p > 0.5, masks).mean())


def test_evaluation_counts_each_region_exactly(networks, root, evaluated):
    (p,), masks = probabilities_of(networks[:1], examples_of(root, "test"))
    guess = p > 0.5
    counts = np.array(evaluated["confusion_matrix"])
    np.testing.assert_array_equal(counts[:, 1, 1], (guess & masks).sum(axis=0))
    np.testing.assert_array_equal(counts[:, 0, 1], (guess & ~masks).sum(axis=0))
    np.testing.assert_array_equal(counts[:, 1, 0], (~guess & masks).sum(axis=0))
    assert evaluated["num_pixels"] == len(masks) == counts[0].sum()
    assert evaluated["regions"] == DECLARED and evaluated["class_names"] == tuple(DECLARED)
    np.testing.assert_allclose(evaluated["eval/mean_dice"], dice(guess, masks).mean())
    log_p = np.log(np.where(masks, p, 1 - p))
    assert evaluated["eval/nll"] == pytest.approx(-log_p.mean(), rel=1e-5)
    brier = 2 * np.mean((p - masks) ** 2)
    assert evaluated["eval/brier"] == pytest.approx(brier, rel=1e-5)
    for k, name in enumerate(DECLARED):
        bins = np.ceil(p[:, k] * 15).astype(int)
        gaps = [abs(np.sum((masks[:, k] - p[:, k])[bins == m])) for m in range(1, 16)]
        score = evaluated[f"eval/classwise_ece/{name}"]
        assert score == pytest.approx(sum(gaps) / len(p), abs=1e-4)


def test_boundaries_are_those_of_each_region(networks, root, evaluated):
    predictor = load(networks[0])
    scores = []
    for example in examples_of(root, "test"):
        guess, (masks, valid) = predictor(example["image"]), masks_of(example["label"])
        scores.append(
            [
                per_image.measure(guess[..., k], np.where(valid, masks[k], IGNORE_LABEL), 2)
                for k in range(3)
            ]
        )
    for name in ("boundary_f1", "hausdorff95"):
        means = np.nanmean([[part[name][1] for part in image] for image in scores], axis=0)
        ours = [evaluated[f"eval/{name}/{region}"] for region in DECLARED]
        np.testing.assert_allclose(ours, means)


def test_thresholds_are_chosen_on_the_evaluation_split(networks, root, evaluated):
    fitted = json.loads((Path(networks[0]) / "calibration.json").read_text())
    assert (fitted["split"], fitted["steps"]) == ("val", [evaluated["step"]])
    logits = []
    for split in ("val", "test"):
        (p,), masks = probabilities_of(networks[:1], examples_of(root, split))
        logits.append((scipy.special.logit(p) / fitted["temperature"], masks))
    (z, masks), (z_test, masks_test) = logits
    for k, (name, threshold) in enumerate(fitted["thresholds"].items()):
        p = scipy.special.expit(z[:, k])
        best = max(dice(p > t, masks[:, k]) for t in THRESHOLDS)
        assert dice(p > threshold, masks[:, k]) == pytest.approx(best, abs=0.01)
        guess = scipy.special.expit(z_test[:, k]) > threshold
        expected = dice(guess, masks_test[:, k])
        assert evaluated[f"eval/calibrated_dice/{name}"] == pytest.approx(expected, abs=0.01)
        low, high = evaluated["intervals"][f"eval/calibrated_dice/{name}"]
        assert low <= evaluated[f"eval/calibrated_dice/{name}"] <= high
    text = (Path(networks[0]) / "evaluation_test.md").read_text()
    assert f"| core | {fitted['thresholds']['core']:.2f} |" in text
    assert "Scores are those of regions: whole (edema, core); core (core)" in text


def test_the_maps_of_an_evaluation_show_the_last_region(networks, root, evaluated):
    predictor, examples = load(networks[0]), examples_of(root, "test")
    path = Path(networks[0]) / "evaluation_test.zip"
    for example, shown in zip(examples, class_maps.read(path, range(4)), strict=True):
        np.testing.assert_array_equal(shown, regions.flat(predictor(example["image"]), REGIONS))
    assert path.with_suffix(".png").exists()


@pytest.mark.parametrize("options", [{}, {"blend": True}, {"augment": ["flips"]}], ids=str)
def test_an_ensemble_predicts_the_mean_of_each_region(networks, root, options):
    image = examples_of(root, "test")[0]["image"]
    options = options | {"tile_size": (8, 10), "margin": 2}
    predictor = load(networks).using(**options)
    singles = [load(network).using(**options).probabilities(image) for network in networks]
    p = predictor.probabilities(image)
    np.testing.assert_allclose(p, np.mean(singles, axis=0), atol=1e-6)
    np.testing.assert_array_equal(predictor(image), p > 0.5)
    if not options.get("blend"):
        maps = {"doubt": lambda p, nats: nats}
        strips = predictor.segment(predictor._images(image), maps)
        doubt = np.concatenate([strip.maps["doubt"] for strip in strips])
        both = scipy.special.entr([singles, 1 - np.array(singles)]).sum(axis=0)
        np.testing.assert_allclose(doubt, both.mean(axis=(0, -1)), atol=1e-5)


def test_an_ensemble_is_scored_and_calibrated(networks, root, tmp_path):
    scores = evaluate.evaluate(
        networks, "test", boundaries=False, calibrate=True, output=str(tmp_path)
    )
    p, masks = probabilities_of(networks, examples_of(root, "test"))
    np.testing.assert_allclose(
        scores["eval/mean_dice"], dice(p.mean(axis=0) > 0.5, masks).mean(), atol=1e-6
    )
    assert set(scores["calibration"]["thresholds"]) == set(DECLARED)
    single = dice(p[0] > 0.5, masks).mean()
    assert scores["gains"]["eval/mean_dice"]["networks"][0] == pytest.approx(single, abs=1e-6)


def test_predict_writes_a_mask_for_each_region(networks, root, evaluated, tmp_path):
    file = str(Path(networks[0]) / "calibration.json")
    images = str(root / "images/test/*.png")
    options = {"calibration": file, "probabilities": "npy", "uncertainty": True}
    assert predict.predict(networks[0], images, tmp_path, **options) == []
    predictor = load(networks[0], calibration=file)
    thresholds = np.float32(list(evaluated["calibration"]["thresholds"].values()))
    for example in examples_of(root, "test"):
        p = predictor.probabilities(example["image"])
        np.testing.assert_array_equal(predictor(example["image"]), p > thresholds)
        for k, name in enumerate(("whole", "core", "not_edema")):
            with Image.open(tmp_path / f"{example['name']}_{name}.png") as mask:
                assert mask.mode == "L"
                np.testing.assert_array_equal(np.asarray(mask), 255 * (p[..., k] > thresholds[k]))
        written = np.load(tmp_path / f"{example['name']}_probabilities.npy")
        np.testing.assert_array_equal(written, p.astype(np.float16))
        doubt = np.asarray(Image.open(tmp_path / f"{example['name']}_uncertainty.png"))
        both = scipy.special.entr([p, 1 - p]).sum(axis=0).mean(axis=-1) / np.log(2)
        np.testing.assert_allclose(doubt, 255 * both, atol=0.51)
        assert (tmp_path / f"{example['name']}_overlay.png").exists()
        assert not (tmp_path / f"{example['name']}.png").exists()
    with pytest.raises(ValueError, match=r"exists .*--overwrite"):
        predict.predict(networks[0], images, tmp_path)
    with pytest.raises(ValueError, match="--objects is for classes, or a single region"):
        predict.predict(networks[0], images, tmp_path / "other", objects=["core"])


def test_the_masks_of_a_geotiff_file_keep_its_place_and_its_nodata(networks, tmp_path):
    pixels = np.random.default_rng(0).integers(1, 256, (1, 12, 16)).astype(np.uint8)
    pixels[:, :4, :5] = 0
    options = {"count": 1, "height": 12, "width": 16, "dtype": "uint8", "nodata": 0}
    options |= {"crs": "EPSG:32632", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5.3e6)}
    with rasterio.open(tmp_path / "a.tif", "w", "GTiff", **options) as file:
        file.write(pixels)
    assert predict.predict(networks[0], str(tmp_path / "a.tif"), tmp_path / "out") == []
    masks = load(networks[0])(str(tmp_path / "a.tif"))
    assert np.all(masks[:4, :5] == IGNORE_LABEL) and np.all(masks[4:] <= 1)
    with rasterio.open(tmp_path / "out/a_core.tif") as file:
        np.testing.assert_array_equal(file.read(1), masks[..., 1])
        assert file.nodata == IGNORE_LABEL and file.transform == options["transform"]


def test_the_demo_shows_and_offers_the_masks(networks, root, tmp_path):
    masks = np.zeros((4, 5, 3), np.uint8)
    masks[:2, :, 0], masks[0, [0, 3], 1] = 1, 1
    predictor = load(networks[0])
    colors = class_colors.prediction_colors(predictor)
    assert list(colors) == [regions.OUTSIDE, *DECLARED]
    text = demo.table(masks, colors)
    for cells in (
        "<td>whole</td><td>1</td><td>10</td><td>50.00&nbsp;%</td>",
        "<td>core</td><td>2</td><td>2</td><td>10.00&nbsp;%</td>",
        "<td>not/edema</td><td>0</td><td>0</td><td>0.00&nbsp;%</td>",
        "<td>(outside)</td><td></td><td>10</td>",
    ):
        assert cells in text
    path = demo.save(masks, predictor, tmp_path / "image.png")
    assert path.name == "image_masks.zip"
    with zipfile.ZipFile(path) as archive, archive.open("core.png") as file:
        np.testing.assert_array_equal(np.asarray(Image.open(file)), 255 * masks[..., 1])


def show_page(workdir, image):
    """Asserts that the demo's page shows the masks of an image."""
    predictor = load(workdir)
    made = demo.make_page(predictor, 1, [])
    segment = next(f for f in made.fns.values() if f.name == "segment")
    shown, (picture, overlay), text, download = segment.fn(image, 0.5)
    masks = predictor(image)
    np.testing.assert_array_equal(shown[1], regions.flat(masks, REGIONS))
    assert picture.shape == overlay.shape == (*masks.shape[:2], 3)
    assert all(name in text for name in DECLARED) and "_masks.zip" in str(download.value)


def test_the_demos_page_segments_an_image(networks, root, tmp_path):
    """In a process of its own, where warnings of Gradio are no errors."""
    pytest.importorskip("gradio")
    image = shutil.copy(root / "images/test/0.png", tmp_path)
    code = f"from tests.test_regions import show_page; show_page({networks[0]!r}, {str(image)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_the_report_shows_regions(networks, evaluated):
    folder = Path(networks[0])
    report = build(folder, "test", per_class=True, columns=["mean_dice", "dice/core"])
    assert [column.path for column in report.columns][:2] == ["eval/mean_dice", "eval/dice/core"]
    (row,) = report.rows
    assert row.score("eval/dice/core")[0] == evaluated["eval/dice/core"]
    pictures = gallery.build(report.rows, 2)
    assert list(pictures["legend"])[:4] == [regions.OUTSIDE, *DECLARED]
    assert pictures["images"][0]["truth"] and page.matrices(report.rows) == []
    assert "whole" in page.to_html("x", report, pictures)


def test_the_doctor_counts_regions(root):
    found = doctor.examine("folder", str(root))["train"]
    masks = [masks_of(e["label"]) for e in examples_of(root, "train")]
    pixels = np.sum([(m & valid).sum(axis=(1, 2)) for m, valid in masks], axis=0)
    assert [region["pixels"] for region in found["regions"].values()] == pixels.tolist()
    assert found["regions"]["core"]["images"] == 4
    share = 100 * pixels[1] / sum(found["pixels"].values())
    assert f"{share:.3f} %        4  region" in doctor.as_text({"train": found})


def test_prepared_records_keep_the_regions(root, tmp_path):
    prepare.copy("folder", str(root), str(tmp_path / "records"), None)
    source = data.open_dataset("records", str(tmp_path / "records"), "train")
    assert source.regions == REGIONS


def test_a_plan_weights_no_classes(root):
    source = data.open_dataset("folder", str(root), "train")
    found = fingerprint.measure(source)._replace(shares=np.array([0.9989, 0.001, 0.0001]))
    assert "loss_options.class_weights" not in [c.option for c in plan._loss(found, source)]


def test_distances_are_those_to_the_boundaries_of_regions(root):
    source = data.open_dataset("folder", str(root), "train")
    wrapped = task.targets.with_distances(source, 3, source.regions)
    example = wrapped[0]
    masks, valid = masks_of(example["label"])
    assert wrapped.fields[-1].shape == (3,)
    for k in range(3):
        distances = example["distances"][..., k]
        np.testing.assert_array_equal(distances[valid] > 0, ~masks[k][valid])
    reach = np.argwhere(masks[1])[0]  # the top left corner of the core
    assert example["distances"][0, reach[1], 1] == reach[0]  # rows to it from the top


def test_a_region_network_begins_with_a_class_networks_body(networks, root, tmp_path):
    config = small_config(root)
    config.model.initialize_from = networks[0]

    def begun(declared):
        dataset = {"class_names": CLASSES, "num_channels": 1, "regions": declared}
        program = assemble(config, 3, regions=regions.read(CLASSES, declared))
        return initial_weights(config, program, dataset)

    same = begun(DECLARED).origin
    assert same["anew"] == []
    renamed = {"other" if name == "core" else name: names for name, names in DECLARED.items()}
    for declared in (None, renamed, {"whole": ["edema", "core"]}):
        assert begun(declared).origin["anew"] == ["params/decoder/head"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("median_frequency", "is for classes, but the dataset declares regions: pass a number for"),
        ((1.0, 2.0), r"class_weights must be 3 numbers, one per region, not \(2,\)"),
    ],
    ids=str,
)
def test_weights_that_are_not_those_of_regions_are_refused(root, tmp_path, weights, message):
    config = small_config(root)
    with config.ignore_type():
        config.loss_options.class_weights = weights
    with pytest.raises(ValueError, match=message):
        train.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_is_for_classes_is_refused(networks, root, tmp_path):
    with pytest.raises(ValueError, match="--foreground merges classes, but this network learns"):
        evaluate.evaluate(networks[0], "test", foreground=["core"])
    other = write_dataset(tmp_path / "other", {"whole": ["core"]})
    with pytest.raises(ValueError, match=r"has regions .* but the run was trained with"):
        evaluate.evaluate(networks[0], "test", root=str(other), output=str(tmp_path / "out"))


def test_regions_in_another_order_are_others(networks, tmp_path):
    """Because the logits of a network have an order."""
    turned = dict(reversed(DECLARED.items()))
    other = write_dataset(tmp_path / "other", turned)
    with pytest.raises(ValueError, match=r"has regions .* but the run was trained with"):
        evaluate.evaluate(networks[0], "test", root=str(other), output=str(tmp_path / "out"))
    copy = shutil.copytree(networks[1], tmp_path / "copy")
    dataset = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(dataset | {"regions": turned}))
    with pytest.raises(ValueError, match="cannot be one ensemble: they differ in regions"):
        load([networks[0], copy])


def test_one_foreground_class_is_a_sigmoid_network(tmp_path):
    """One logit, one mask, and objects, which are those of the region."""
    root = write_dataset(tmp_path / "data", {"cell": ["core"]})
    config = small_config(root)
    config.num_steps = 1
    train.train(config, str(tmp_path / "run"))
    predictor = load(str(tmp_path / "run"))
    assert predictor.probabilities(root / "images/test/0.png").shape[-1] == 1
    images, out = str(root / "images/test/*.png"), tmp_path / "out"
    predict.predict(str(tmp_path / "run"), images, out, objects=["all"])
    for example in examples_of(root, "test"):
        mask = np.asarray(Image.open(out / f"{example['name']}_cell.png"))
        objects = np.asarray(Image.open(out / f"{example['name']}_objects.png"))
        np.testing.assert_array_equal(objects > 0, mask == 255)


def test_the_confidence_is_the_probability_of_what_is_predicted():
    own = regions.read(CLASSES, {"cell": ["core"]}, {"cell": 0.2})
    wanted = results.Wanted({"objects": "_objects.png"}, 1, False, object_maps.Kinds({}, None))
    p = np.float32([[[0.3], [0.1], [0.9]]])
    confidence = results.maps(wanted, own)["confidence"](p, None)
    np.testing.assert_array_equal(confidence, np.float16([[0.3, 0.9, 0.9]]))


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_exported_file_predicts_the_same_masks(networks, root, evaluated, tmp_path):
    file = str(Path(networks[0]) / "calibration.json")
    about = export.export(networks[0], tmp_path / "a.zip", calibration=file)
    assert about["thresholds"] == evaluated["calibration"]["thresholds"]
    image = examples_of(root, "test")[1]["image"]
    expected, read = load(networks[0], calibration=file), load(tmp_path / "a.zip")
    np.testing.assert_allclose(read.probabilities(image), expected.probabilities(image), atol=1e-6)
    np.testing.assert_array_equal(read(image), expected(image))
    assert "3 regions: whole, core, not/edema" in repr(read)
    export.export(networks, tmp_path / "both.zip")
    both = load(networks).probabilities(image)
    np.testing.assert_allclose(load(tmp_path / "both.zip").probabilities(image), both, atol=1e-6)


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_onnx_file_has_the_masks_and_the_probabilities(networks, root, evaluated, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    file = str(Path(networks[0]) / "calibration.json")
    predictor = load(networks[0], calibration=file)
    image = np.random.default_rng(0).integers(0, 256, (*predictor.ladder[-1], 1)).astype(np.uint8)
    p, thresholds = predictor.probabilities(image), np.float32(predictor.regions.thresholds)
    for result in ("classes", "probabilities"):
        options = {"calibration": file, "image_size": image.shape[:2], "result": result}
        export.export_onnx(networks[0], tmp_path / f"{result}.onnx", **options)
        session = runtime.InferenceSession(tmp_path / f"{result}.onnx")
        (found,) = session.run(None, {session.get_inputs()[0].name: image[None]})
        if result == "probabilities":
            np.testing.assert_allclose(found[0], p, atol=1e-5)
        else:
            clear = np.abs(p - thresholds) > 1e-5
            assert found.dtype == np.uint8 and clear.mean() > 0.9
            np.testing.assert_array_equal(found[0][clear], (p > thresholds)[clear])
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["regions"]) == DECLARED
    assert json.loads(facts["thresholds"]) == evaluated["calibration"]["thresholds"]
