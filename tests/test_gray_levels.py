"""Tests that an image is normalized alike in training, evaluation, prediction and exported files."""

import functools
import json
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from dense_jax import data, evaluate, export, load, predict, train
from dense_jax.data import decode, image_strips, levels
from dense_jax.evaluation import class_maps
from dense_jax.program import assemble
from dense_jax.training.initial import initial_weights
from experiments import base
from tests.models.test_pretrained import expected_tensors

pytestmark = pytest.mark.usefixtures("shared_programs", "unchecked_shapes")


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory, tiny_folder):
    """The images of `tiny_folder`, of 16 bits and of exposures that differ hundredfold."""
    root = tmp_path_factory.mktemp("deep")
    rng = np.random.default_rng(0)
    for path in tiny_folder.glob("*/*/*.png"):
        pixels = np.array(Image.open(path))
        if path.parts[-3] == "images":
            pixels = (pixels * rng.uniform(2, 200) + 300).astype(np.uint16)
        target = root / path.relative_to(tiny_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target)
    write_options(root, None)
    return root


def write_options(root, limits):
    options = {"classes": ["dark", "bright"], "ignored_values": [9]}
    (root / "dataset.json").write_text(json.dumps(options | ({"range": limits} if limits else {})))


def a_config(root, normalization):
    config = base.get_config()
    config.num_steps = 2
    config.batch_size = 4
    config.model.update({"widths": (2, 3), "normalization": normalization})
    config.data.update({"name": "folder", "root": str(root), "crop_size": (8, 8)})
    config.eval.update({"tile_size": (8, 10), "margin": 2, "num_pictures": 1})
    return config


@pytest.mark.parametrize("name", ["unit", *levels.MEASURED])
def test_a_network_sees_an_image_alike_everywhere(deep_folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr(levels, "MAX_SAMPLES", 40)  # images are sampled
    write_options(deep_folder, [0, 40000] if name == "unit" else None)
    directory = tmp_path / "run"
    train.train(a_config(deep_folder, name), str(directory))
    evaluate.evaluate(str(directory), "test", boundaries=False)
    source = data.open_dataset("folder", str(deep_folder), "test")
    maps = class_maps.read(directory / "evaluation_test.zip", range(len(source)))
    assert len({m.shape for m in maps}) > 1
    assert len(np.unique(np.concatenate([m.ravel() for m in maps]))) == 2

    export.export(str(directory), tmp_path / "file.zip")
    from_run, from_file = load(directory), load(tmp_path / "file.zip")
    for i, expected in enumerate(maps):
        image = source[i]["image"]
        assert image.dtype == np.uint16
        np.testing.assert_array_equal(from_run(image), expected)
        np.testing.assert_array_equal(from_file(image), expected)

    monkeypatch.setattr(image_strips, "WHOLE", 0)  # images arrive in strips of a few rows
    monkeypatch.setattr(image_strips, "STRIP", 3 * 16)
    monkeypatch.setattr(decode, "read_image", None)
    images = str(deep_folder / "images" / "test")
    assert not predict.predict(str(directory), images, tmp_path / "out")
    for i, expected in enumerate(maps):
        written = np.array(Image.open(tmp_path / "out" / f"{source.names[i]}.png"))
        np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("name", ["image", "dataset"])
def test_8_bit_images_can_be_measured_and_kept_on_the_device(tiny_folder, tmp_path, name):
    """Training does not depend on where images are kept."""
    weights = {}
    for cache in ("none", "host", "device"):
        config = a_config(tiny_folder, name)
        config.data.cache = cache
        train.train(config, str(tmp_path / cache))
        weights[cache] = load(tmp_path / cache, "latest")._network[1]
    jax.tree.map(np.testing.assert_array_equal, weights["none"], weights["host"])
    on_device = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(on_device, weights["none"], weights["device"])  # by another program
    dataset = json.loads((tmp_path / "none" / "dataset.json").read_text())
    assert dataset["dtype"] == "uint8" and (dataset["levels"] is None) == (name == "image")


def test_a_missing_range_is_an_error_before_anything_is_written(deep_folder, tmp_path):
    write_options(deep_folder, None)
    with pytest.raises(ValueError, match=r'"range": \[LOW, HIGH\].*normalization=percentiles'):
        train.train(a_config(deep_folder, "unit"), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("channels", [1, 6])
def test_published_weights_see_measured_images_of_any_channels(tmp_path, channels):
    """Equal channels are to the network what one gray channel, or R = G = B, is."""
    config = base.get_config()
    config.model.update({"encoder": "vgg16", "norm": "none"})
    config.model.update({"width_multiplier": 1 / 64, "normalization": "image"})
    config.model.pretrained = str(tmp_path / "vgg16.npz")
    np.savez(config.model.pretrained, **expected_tensors("vgg16", "none", width_multiplier=1 / 64))
    gray = np.random.default_rng(0).normal(size=(1, 32, 32, 1)).astype(np.float32)

    def features(channels):
        program = assemble(config, 2)
        arrays = initial_weights(config, program, {"num_channels": channels}).arrays
        variables: Any = traverse_util.unflatten_dict(arrays, sep="/")
        encoder = {name: values["encoder"] for name, values in variables.items()}
        image = np.repeat(gray, channels, axis=-1)  # as `unit` leaves it
        return program.model.encoder.apply(encoder, image, train=False).features

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6),
        features(channels),
        features(3),
    )
