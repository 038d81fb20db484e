"""Tests that the predictor is exact for arrays, files and strips, in bounded memory."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax import models, program
from dense_jax.inference.predictor import Predictor, entropy
from dense_jax.inference.stitching import Failure
from dense_jax.models.normalization import unit
from experiments import base

NUM_CLASSES = 3
IMAGE_SIZE = (12, 12)  # fits into a tile
RNG = np.random.default_rng(0)
VARIABLES = {"kernel": RNG.normal(size=(3, 3, 1, NUM_CLASSES)).astype(np.float32)}


def logits_step(variables, image):
    x = jnp.asarray(image, jnp.float32)[None] / 77
    return jax.lax.conv_general_dilated(
        x, variables["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]


def make(step=logits_step, variables=VARIABLES, ladder=(IMAGE_SIZE,), **options):
    dataset = {
        "class_names": ["a", "b", "c"],
        "palette": [[0, 0, 0], [9, 9, 9], [200, 0, 0]],
        "num_channels": 1,
        "ladder": ladder,
        "dtype": "uint8",
        "value_range": None,
    }
    options = {"tile_size": (16, 16), "margin": 2, "context": 0, "batch_size": 3} | options
    return Predictor(step, variables, dataset, "unit", **options)


def image_of(h, w):
    return RNG.integers(0, 256, (h, w, 1)).astype(np.uint8)


class Images:
    """Arrays as strips of a few rows; None is an image that breaks off."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.sizes = np.array([(20, 9) if a is None else a.shape[:2] for a in arrays], np.int32)

    def strips(self, i):
        if self.arrays[i] is None:
            yield np.zeros((5, 9, 1), np.uint8)
            raise ValueError("broken off")
        for y in range(0, len(self.arrays[i]), 3):
            yield self.arrays[i][y : y + 3]


def test_tiles_predict_what_the_whole_image_does_where_the_margin_covers_the_field():
    config = base.get_config()
    config.model.widths = (2, 3)
    model = models.build(config.model, NUM_CLASSES)
    variables = jax.tree.map(
        lambda x: (
            np.abs(RNG.normal(size=x.shape)).astype(x.dtype)
            if len(x.shape) == 1  # variances, among others
            else RNG.normal(size=x.shape).astype(x.dtype)
        ),
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)),
    )
    step = functools.partial(program.logits_step, model=model, normalize=unit)
    h, w = 50, 44
    reach = 9  # pixels in each direction that this network sees
    margin = 10  # tiles start at multiples of the network's stride
    predictor = make(step, variables, tile_size=(2 * margin + 8, 2 * margin + 12), margin=margin)
    image = image_of(h, w)
    whole = jax.jit(step)(variables, image)
    inside = np.s_[reach : h - reach, reach : w - reach]
    assert min(whole[inside].shape[:2]) > 20
    classes = predictor(image)
    np.testing.assert_array_equal(classes[inside], np.argmax(whole, axis=-1)[inside])
    assert len(np.unique(classes[inside])) > 1
    # A smaller margin gives other classes.
    narrow = predictor.using(tile_size=(12, 12), margin=0)(image)
    assert np.any(narrow[inside] != classes[inside])


def test_without_blending_the_probabilities_are_those_of_the_whole_image():
    image = image_of(40, 33)
    whole = jax.nn.softmax(jax.jit(logits_step)(VARIABLES, image))
    probabilities = make().probabilities(image)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities[1:-1, 1:-1], whole[1:-1, 1:-1], rtol=1e-5)
    np.testing.assert_array_equal(make()(image), probabilities.argmax(axis=-1))


def test_a_constant_predictor_is_constant_under_blending():
    def constant(_, image):
        return jnp.broadcast_to(jnp.array([0.1, 0.3, 0.2]), (*image.shape[:2], 3))

    predictor = make(constant, margin=5).using(blend=True)
    probabilities = predictor.probabilities(image_of(50, 37))
    expected = np.broadcast_to(probabilities[0, 0], probabilities.shape)
    np.testing.assert_array_equal(probabilities, expected)
    np.testing.assert_array_equal(predictor(image_of(50, 37)), 1)


def test_blended_probabilities_are_between_those_of_the_tiles():
    """Where all tiles cover the receptive field, they are those of the whole image."""
    image = image_of(50, 37)
    predictor = make(margin=5).using(blend=True)
    whole = jax.nn.softmax(jax.jit(logits_step)(VARIABLES, image))
    probabilities = predictor.probabilities(image)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(probabilities[1:-1, 1:-1], whole[1:-1, 1:-1], atol=0.05)
    np.testing.assert_array_equal(predictor(image), probabilities.argmax(axis=-1))


@pytest.mark.parametrize("augment", [("flips",), ("turns",), ("flips", "turns", "scales")])
def test_a_changed_image_has_the_changed_prediction_where_one_tile_holds_it(augment):
    image = image_of(12, 12)
    predictor = make().using(augment=augment)
    expected = predictor.probabilities(image)
    assert np.any(expected != make().probabilities(image))
    changes = [np.fliplr, np.flipud] if "flips" in augment else []
    changes += [np.rot90] if "turns" in augment else []
    for change in changes:
        changed = np.ascontiguousarray(change(image))
        np.testing.assert_array_equal(predictor.probabilities(changed), change(expected))
        np.testing.assert_array_equal(predictor(changed), change(predictor(image)))


@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5, 8])
@pytest.mark.parametrize("ladder", [[IMAGE_SIZE], [(2, 9), (12, 3), IMAGE_SIZE]], ids=len)
def test_images_of_any_sizes_come_as_they_do_alone_whatever_the_batches(blend, batch_size, ladder):
    arrays = [image_of(*size) for size in ((40, 33), (1, 1), (7, 30), (16, 5))]
    images = Images([*arrays[:2], None, *arrays[2:], None])
    predictor = make(batch_size=batch_size, ladder=ladder).using(blend=blend)
    makers = {"probabilities": np.copy, "uncertainty": entropy}
    names = {"image", "classes", *makers}
    parts: dict = {}
    failed = []
    for strip in predictor.segment(images, makers):
        if isinstance(strip, Failure):
            assert str(strip.problem) == "broken off"
            failed.append(strip.index)
            continue
        done = parts.setdefault(strip.index, [])
        assert strip.start == (done[-1].stop if done else 0) and set(strip.maps) == names
        assert next(reversed(parts)) == strip.index
        done.append(strip)
    assert failed == [2, 5]
    assert list(parts) == [1, 3, 4, 0]  # cut along no axis, the columns, the rows, and both
    for i, array in enumerate(images.arrays):
        if array is None:
            continue
        maps = {name: np.concatenate([s.maps[name] for s in parts[i]]) for name in names}
        np.testing.assert_array_equal(maps["image"], array)
        np.testing.assert_array_equal(maps["probabilities"], predictor.probabilities(array))
        assert maps["classes"].shape == array.shape[:2]
        np.testing.assert_array_equal(maps["classes"], maps["probabilities"].argmax(axis=-1))
        np.testing.assert_array_equal(maps["uncertainty"], entropy(maps["probabilities"]))


def test_one_program_serves_all_sizes_that_are_cut_alike():
    compiled = []

    def counted(variables, image):
        compiled.append(image.shape)
        return logits_step(variables, image)

    images = Images([image_of(*size) for size in ((40, 33), (1, 1), (7, 30), (12, 12), (1, 70))])
    assert len(list(make(counted).segment(images))) > 5
    assert compiled == [(12, 12, 1), (12, 16, 1), (16, 16, 1)]


def test_a_tall_image_is_never_held_whole():
    read = 0

    class Tall:
        def __init__(self, height):
            self.sizes = np.array([[height, 20]], np.int32)

        def strips(self, i):
            nonlocal read
            for _ in range(self.sizes[i, 0]):
                read += 1
                yield np.zeros((1, 20, 1), np.uint8)

    ahead = []
    for height in (500, 1000):
        read, most = 0, 0
        for strip in make(batch_size=4).segment(Tall(height)):
            most = max(most, read - strip.stop)
        assert read == height
        ahead.append(most)
    assert ahead[1] < 250  # a few batches with two tiles in a row, of 12 rows each


def test_the_entropy_is_relative_to_that_of_equal_probabilities():
    p = np.array([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0]], np.float32)
    np.testing.assert_array_equal(entropy(p), [0, 255, round(255 * np.log(2) / np.log(3))])


@pytest.mark.parametrize(
    "image, why",
    [
        (np.zeros((4, 4, 2), np.uint8), "has 2 channels, but 1 are needed"),
        (np.zeros((4, 4, 1)), "holds float64 values from 0.0 to 0.0, not 8 bits"),
        (np.zeros(4, np.uint8), r"must hold numbers \[h, w\] or \[h, w, c\], not uint8 \(4,\)"),
        (np.zeros((0, 4), np.uint8), r"must hold numbers .* not uint8 \(0, 4\)"),
        ("none.png", "No such file.*none.png"),
        (pathlib.Path(__file__), "test_predictor.py: not a readable image"),
        (pathlib.Path(__file__).parent, "inference: not a file"),
    ],
)
def test_what_is_no_image_for_the_network_is_refused(image, why):
    for call in (make(), make().probabilities):
        with pytest.raises(ValueError, match=why):
            call(image)


def test_a_predictor_tells_what_it_is_and_its_options_keep_that():
    told = repr(make(about="unet, step 7 of runs/x").using(blend=True))
    for part in ("unet, step 7 of runs/x", "3 classes: a, b, c", "12 x 12 pixels", "channels: 1"):
        assert part in told


def test_a_network_that_needs_context_takes_no_scales():
    with pytest.raises(ValueError, match="cannot be augmented by scales"):
        make(context=2).using(augment=["scales"])
    with pytest.raises(ValueError, match="no augmentation"):
        make().using(augment=["turn"])


@pytest.mark.parametrize(
    "options",
    [
        *({"batch_size": n} for n in (0, -4)),
        {"margin": -3},
        *({"tile_size": size} for size in ((), (16,), (16, 0), (16, 8, 3))),
        {"augment": ["flop"]},
    ],
    ids=str,
)
def test_impossible_options_are_refused_by_name(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"{value[0] if name == 'augment' else f'{name}='}"):
        make().using(**options)
