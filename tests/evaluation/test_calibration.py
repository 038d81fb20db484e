"""Tests temperatures and ensembles in the commands, against the probabilities of single networks."""

import json
import shutil

import numpy as np
import pytest
import scipy.optimize
import scipy.special
from PIL import Image

from dense_jax import command, data, evaluate, export, load, metrics, predict, train, trained
from dense_jax.inference import exported
from dense_jax.inference.predictor import entropy
from experiments import base

pytestmark = pytest.mark.usefixtures("unchecked_shapes")


@pytest.fixture(scope="module")
def networks(tmp_path_factory, tiny_folder):
    """Two workdirs that differ in the seed alone."""
    path = tmp_path_factory.mktemp("seeds")
    config = base.get_config()
    config.num_steps, config.num_seeds, config.batch_size = 1, 2, 4
    config.model.widths = (2, 3)
    config.data.name, config.data.root = "folder", str(tiny_folder)
    config.data.crop_size = (8, 8)
    config.eval.num_pictures = 0
    train.train(config, str(path))
    return [str(path / f"seed={seed}") for seed in (0, 1)]


@pytest.fixture(scope="module")
def whole(networks, tmp_path_factory):
    """The evaluation of the calibrated ensemble, and its folder."""
    output = tmp_path_factory.mktemp("ensemble")
    options = {"boundaries": False, "calibrate": True, "output": str(output)}
    return evaluate.evaluate(networks, "test", **options), output


def examples_of(root, split):
    source = data.open_dataset("folder", str(root), split)
    return [source[i] for i in range(len(source))]


def probabilities_of(networks, examples):
    """Returns each network's probabilities at the valid pixels [networks, pixels, c] and the true classes."""
    found = []
    for network in networks:
        predictor = load(network)
        maps = [predictor.probabilities(e["image"])[e["label"] < 2] for e in examples]
        found.append(np.concatenate(maps))
    return np.array(found, np.float64), np.concatenate(
        [e["label"][e["label"] < 2] for e in examples]
    )


def nll(p, labels, temperature=1.0):
    mean = scipy.special.softmax(np.log(p) / temperature, axis=-1).mean(axis=0)
    return -np.log(np.take_along_axis(mean, labels[:, None], axis=-1)).mean()


def test_an_ensemble_is_scored_by_its_mean_probabilities(networks, whole, tiny_folder):
    evaluation, _ = whole
    p, labels = probabilities_of(networks, examples_of(tiny_folder, "test"))
    assert evaluation["eval/nll"] == pytest.approx(nll(p, labels), rel=1e-5)
    errors = np.square(p.mean(axis=0) - np.eye(2)[labels]).sum(axis=-1)
    assert evaluation["eval/brier"] == pytest.approx(errors.mean(), rel=1e-5)
    classes = p.mean(axis=0).argmax(axis=-1)
    counts = np.asarray(metrics.confusion_matrix(classes, labels, 2))
    np.testing.assert_array_equal(evaluation["confusion_matrix"], counts)
    gain = evaluation["gains"]["eval/nll"]
    np.testing.assert_allclose(gain["networks"], [nll(p[k : k + 1], labels) for k in (0, 1)], 1e-5)
    assert gain["gain"] == pytest.approx(nll(p, labels) - np.mean(gain["networks"]), abs=1e-5)
    low, high = gain["interval"]
    assert low <= gain["gain"] <= high < 0  # convexity: no image's likelihood is worse


def test_the_temperature_is_chosen_on_the_evaluation_split(networks, whole, tiny_folder):
    evaluation, output = whole
    fitted = json.loads((output / "calibration.json").read_text())
    assert (fitted["split"], fitted["steps"]) == ("val", [1, 1])
    p, labels = probabilities_of(networks, examples_of(tiny_folder, "val"))
    best = scipy.optimize.minimize_scalar(
        lambda log_t: nll(p, labels, np.exp(log_t)), bounds=np.log([0.05, 50])
    )
    assert nll(p, labels, fitted["temperature"]) < best.fun * (1 + 1e-5)
    p, labels = probabilities_of(networks, examples_of(tiny_folder, "test"))
    expected = nll(p, labels, fitted["temperature"])
    assert evaluation["eval/calibrated_nll"] == pytest.approx(expected, rel=1e-4)


def test_what_was_measured_is_written(whole):
    evaluation, output = whole
    text = (output / "evaluation_test.md").read_text()
    temperature = evaluation["calibration"]["temperature"]
    assert "| mean of its networks |" in text and f"| with temperature {temperature:.3f} |" in text
    for name in ("nll", "calibrated_nll", "ece", "classwise_ece/dark"):
        low, high = evaluation["intervals"][f"eval/{name}"]
        assert low <= evaluation[f"eval/{name}"] <= high
    with Image.open(output / "evaluation_test_reliability.png") as picture:
        assert min(picture.size) > 300
    with np.load(output / "evaluation_test.npz") as kept:
        assert kept["reliability"].shape == (5, 3, 15, 3)
        assert kept["network1_confusion_matrices"].sum() == evaluation["num_pixels"]


@pytest.mark.parametrize("options", [{}, {"blend": True}, {"augment": ["flips"]}], ids=str)
def test_an_ensemble_predicts_the_mean_and_splits_its_doubt(networks, tiny_folder, options):
    image = examples_of(tiny_folder, "test")[0]["image"]
    options = options | {"tile_size": (8, 10), "margin": 2}
    predictor = load(networks).using(**options)
    singles = [load(network).using(**options).probabilities(image) for network in networks]
    mean = np.mean(singles, axis=0)
    np.testing.assert_allclose(predictor.probabilities(image), mean, atol=1e-6)
    np.testing.assert_array_equal(predictor(image), predictor.probabilities(image).argmax(axis=-1))
    if options.get("blend"):
        return  # the entropies of blended probabilities are not the blended entropies
    maps = {"doubt": lambda p, nats: nats}
    doubt = np.concatenate(
        [s.maps["doubt"] for s in predictor.segment(predictor._images(image), maps)]
    )
    expected = np.mean(scipy.special.entr(singles).sum(axis=-1), axis=0)
    np.testing.assert_allclose(doubt, expected, atol=1e-5)
    assert np.all(doubt < scipy.special.entr(mean).sum(axis=-1) + 1e-6)


def test_predict_writes_both_parts_of_the_uncertainty(networks, whole, tiny_folder, tmp_path):
    images, file = str(tiny_folder / "images/test/0.png"), str(whole[1] / "calibration.json")
    options = {"uncertainty": True, "calibration": file}
    assert predict.predict(networks, images, tmp_path, **options) == []
    parts = {
        name: np.asarray(Image.open(tmp_path / f"0_{name}.png")).astype(int)
        for name in ("uncertainty", "expected_entropy", "mutual_information")
    }
    total = parts["expected_entropy"] + parts["mutual_information"]
    assert np.abs(parts["uncertainty"] - total).max() <= 1 and total.any()
    p = load(networks, calibration=file).probabilities(images)
    np.testing.assert_array_equal(parts["uncertainty"], entropy(p))


def test_a_calibrated_ensemble_is_exported(networks, whole, tiny_folder, tmp_path, monkeypatch):
    file, image = str(whole[1] / "calibration.json"), tiny_folder / "images/test/1.png"
    about = export.export(networks, tmp_path / "e.zip", calibration=file)
    assert about["temperature"] == whole[0]["calibration"]["temperature"]
    expected = load(networks, calibration=file)
    read = load(tmp_path / "e.zip")
    np.testing.assert_allclose(read.probabilities(image), expected.probabilities(image), atol=1e-6)
    assert np.ptp(expected.probabilities(image) - load(networks).probabilities(image)) > 1e-3
    with pytest.raises(ValueError, match=r"has its temperature in it: pass --calibration to"):
        load(tmp_path / "e.zip", calibration=file)
    with pytest.raises(ValueError, match="ONNX file holds a single network"):
        export.export_onnx(networks, tmp_path / "e.onnx", image_size=(8, 8))

    def unreadable(*_):
        raise ValueError("of the future")

    monkeypatch.setattr(exported.export, "deserialize", unreadable)
    rebuilt = load(tmp_path / "e.zip").probabilities(image)
    np.testing.assert_allclose(rebuilt, expected.probabilities(image), atol=1e-6)


def test_a_calibration_of_other_weights_is_refused(networks, whole, tmp_path):
    file = whole[1] / "calibration.json"
    trained.load(networks[::-1], "best", file)  # in any order
    with pytest.raises(ValueError, match=r"of other weights \(step 1, 1; here step 1\): calibrate"):
        load(networks[0], calibration=file)
    with pytest.raises(ValueError, match=r"nowhere is missing: dense_jax.evaluate --calibrate"):
        load(networks, calibration=tmp_path / "nowhere")
    (tmp_path / "damaged").write_text('{"temperature": 1')
    with pytest.raises(ValueError, match=r"damaged is no calibration\.json"):
        load(networks, calibration=tmp_path / "damaged")


def test_networks_that_are_no_ensemble_are_refused(networks, tmp_path):
    with pytest.raises(ValueError, match="name a folder for it with --output=DIR"):
        evaluate.evaluate(networks)
    with pytest.raises(ValueError, match="named twice"):
        load([networks[0], networks[0]])
    other = shutil.copytree(networks[1], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["model"]["upsampling"] = "nearest"
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"other and .*seed=0 .* differ in config.model.upsampling"
    ):
        load([networks[0], other])
    config["model"]["upsampling"] = "transposed_conv"
    config["data"]["folds"] = 2
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trained on the held-out fold of the first"):
        evaluate.evaluate([str(other), networks[0]], output=str(tmp_path / "out"))


def test_workdirs_are_separated_by_commas_that_their_names_may_contain(tmp_path):
    folders = [tmp_path / name for name in ("a,seed=0", "a,seed=1", "b")]
    for folder in folders:
        folder.mkdir()
    parse = command.parse_workdirs
    assert parse(",".join(map(str, folders))) == list(map(str, folders))
    assert parse("none,~/b") == ["none", str(tmp_path.home() / "b")]
