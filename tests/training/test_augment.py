"""Tests that resampling invents no labels and keeps image and label aligned."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from dense_jax.data import Field
from dense_jax.labels import IGNORE_LABEL
from dense_jax.training.augment import (
    augment,
    augment_batch,
    bilinear_by_gathers,
    bilinear_by_products,
    displacements,
    mirror,
    pick_by_products,
    rotate,
    sample_bilinear,
    sample_nearest,
)
from dense_jax.training.color_jitter import COLORS
from experiments import base
from tests.conftest import mesh_of

H, W = 12, 10
GEOMETRY = {
    "flip": 0.5,
    "flip_vertical": 0.5,
    "scale": 0.5,
    "rotation": 45.0,
    "shear": 20.0,
    "elastic": 1.0,
    "max_class_fraction": 0.9,
    "class_crop": 0.5,
}
EVERYTHING = GEOMETRY | {name: 0.1 for name in COLORS} | {"hue": 20.0, "blur": 1.0, "noise": 9.0}


def example(seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, (H, W), np.uint8)
    label[2, 3:6] = IGNORE_LABEL
    return jnp.asarray(rng.integers(0, 256, (H, W, 3), np.uint8)), jnp.asarray(label)


def run(crop_fn, key, image, label, size=(H, W)):
    there = {"image": image, "label": label, "size": jnp.array(size)}
    crop = jax.jit(crop_fn)(jax.random.key(key), there)
    assert crop.keys() == {"image", "label"}
    return crop["image"], crop["label"]


def many(crop_size, there, num_keys, **options):
    """What as many keys make of one example."""
    crop = jax.jit(jax.vmap(partial(augment, crop_size=crop_size, **options), in_axes=(0, None)))
    keys = jax.random.split(jax.random.key(0), num_keys)
    return jax.tree.map(np.asarray, crop(keys, {k: jnp.asarray(v) for k, v in there.items()}))


def test_zero_strength_is_the_identity_bitwise():
    image, label = example()
    new_image, new_label = run(partial(augment, crop_size=(H, W)), 0, image, label)
    np.testing.assert_array_equal(new_image, image)
    np.testing.assert_array_equal(new_label, label)


def test_zero_strength_adds_no_operation():
    image, label = example()
    there = {"image": image, "label": label, "size": jnp.array([H, W])}
    there = jax.tree.map(lambda x: x[None], there)
    everything = EVERYTHING | {"class_mix": 0.5}
    off = dict.fromkeys(everything, 0.0) | {"max_class_fraction": 1.0}
    assert base.get_config().augment.to_dict().keys() == off.keys()
    nothing, zeros, everything = (
        str(
            jax.make_jaxpr(partial(augment_batch, crop_size=(H, W), num_classes=4, **options))(
                jax.random.key(0)[None], there
            )
        )
        for options in ({}, off, everything)
    )
    assert zeros == nothing
    for operation in ("cos", "tan", "exp", "log", "erf_inv", "scatter-add", "scan"):
        assert f" {operation}[" in everything or f" {operation} " in everything, operation
        assert f" {operation}[" not in nothing and f" {operation} " not in nothing, operation
    assert nothing.count("random_bits") == 1  # the crop's place


def test_flips_are_exact_permutations():
    image, label = example()
    for flips, axes in (({"flip": 1.0}, 1), ({"flip_vertical": 1.0}, 0)):
        new_image, new_label = run(partial(augment, crop_size=(H, W), **flips), 0, image, label)
        np.testing.assert_array_equal(new_image, np.flip(image, axes))
        np.testing.assert_array_equal(new_label, np.flip(label, axes))


def test_flip_probability_is_a_probability():
    image, label = example()
    there = {"image": image, "label": label, "size": (H, W)}
    images = many((H, W), there, 400, flip=0.25)["image"]
    flipped = np.mean(np.all(images == np.flip(np.asarray(image), 1), axis=(1, 2, 3)))
    assert 0.18 < flipped < 0.32


def test_crops_are_windows_of_the_image_and_reach_every_position():
    image, label = map(np.asarray, example())
    crop = jax.jit(partial(augment, crop_size=(5, 4)))
    seen = set()
    for key in range(200):
        new_image, new_label = map(np.asarray, run(crop, key, image, label))
        places = [
            (y, x)
            for y in range(H - 4)
            for x in range(W - 3)
            if np.array_equal(image[y : y + 5, x : x + 4], new_image)
            and np.array_equal(label[y : y + 5, x : x + 4], new_label)
        ]
        assert len(places) == 1
        seen |= set(places)
    ys, xs = zip(*seen, strict=True)
    assert (min(ys), max(ys), min(xs), max(xs)) == (0, H - 5, 0, W - 4)


def test_a_small_image_is_whole_inside_the_crop_and_ignored_around():
    image, label = example()
    crop = jax.jit(partial(augment, crop_size=(H, W)))
    for key in range(20):
        _, new_label = run(crop, key, image, label, size=(4, 3))
        assert np.sum(np.asarray(new_label) == IGNORE_LABEL) == H * W - np.sum(
            np.asarray(label[:4, :3]) != IGNORE_LABEL
        )


@pytest.mark.parametrize("key", range(5))
def test_labels_are_never_made_up_and_follow_the_image(key):
    """The image shows each label's own value, so that a shift of more than half a pixel shows."""
    label = jnp.asarray(np.kron([[10, 60], [110, 160]], np.ones((H // 2, W // 2))).astype(np.uint8))
    image = label[..., None].repeat(3, axis=-1)
    crop = partial(augment, crop_size=(9, 9), flip=0.5, flip_vertical=0.5, scale=1.0)
    new_image, new_label = run(crop, key, image, label)
    assert set(np.unique(new_label)) <= {10, 60, 110, 160, IGNORE_LABEL}
    inside = np.asarray(new_label) != IGNORE_LABEL
    gray = np.asarray(new_image[..., 0])
    flat = inside & np.isin(gray, [10, 60, 110, 160])  # no edge between the four pixels read
    np.testing.assert_array_equal(gray[flat], np.asarray(new_label)[flat])
    assert flat.sum() >= 15


def test_half_resolution_averages_two_by_two():
    image, label = example()
    new_image, _ = run(
        partial(augment, crop_size=(H // 2, W // 2), resolution=0.5), 0, image, label
    )
    blocks = np.asarray(image, np.float32).reshape(H // 2, 2, W // 2, 2, 3)
    np.testing.assert_allclose(new_image, blocks.mean(axis=(1, 3)), rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_mirror_is_numpys_reflect_padding(size):
    positions = jnp.arange(-7, size + 7, dtype=jnp.float32)[None]
    expected = np.pad(np.arange(size), 7, mode="reflect")
    np.testing.assert_array_equal(mirror(positions, jnp.array(size))[0], expected)


def test_sampling_at_the_last_pixel_stays_inside():
    image, _ = example()
    at = jnp.full((1, 1), H - 1.0), jnp.full((1, 1), W - 1.0)
    np.testing.assert_array_equal(sample_bilinear(image, at)[0, 0], image[-1, -1])


@pytest.mark.parametrize(
    "options", [{}, {"flip": 1.0, "flip_vertical": 1.0, "scale": 0.5}], ids=str
)
def test_context_is_added_around_the_very_same_crop(options):
    """The labeled window is chosen as without it: the border of an image is trained on too."""
    image, label = example()
    without = run(partial(augment, crop_size=(5, 4), **options), 3, image, label)
    new_image, new_label = run(
        partial(augment, crop_size=(5, 4), context=6, **options), 3, image, label
    )
    assert new_image.shape == (5 + 12, 4 + 12, 3)
    np.testing.assert_array_equal(new_label, without[1])
    np.testing.assert_allclose(new_image[6:-6, 6:-6], without[0], rtol=1e-5)


def test_context_beyond_the_image_is_mirrored():
    image, label = example()
    new_image, _ = run(partial(augment, crop_size=(H, W), context=3), 0, image, label)
    np.testing.assert_array_equal(
        new_image, np.pad(image, ((3, 3), (3, 3), (0, 0)), mode="reflect")
    )


def coordinates(size, step=1):
    """Gray levels that tell each pixel's row and column."""
    return np.stack(np.indices((size, size)), axis=-1).astype(np.uint8) * np.uint8(step)


@pytest.mark.parametrize(
    "options",
    [
        *({name: strength} for name, strength in GEOMETRY.items()),
        GEOMETRY,
        GEOMETRY | {"context": 3},
        GEOMETRY | {"resolution": 0.5},
    ],
    ids=str,
)
def test_image_label_and_fields_move_together(options):
    """All tell where they come from; the image does to a fraction of a pixel."""
    n = 14
    image = coordinates(n, step=16)
    label = (18 * coordinates(n)[..., 0] + coordinates(n)[..., 1]).astype(np.uint8)
    border, objects = label.astype(np.float32), label.astype(np.int32)
    label[3:5, 2:9] = IGNORE_LABEL
    there = {"image": image, "label": label, "size": (n, n - 1)}
    pair = np.stack([border, -2 * border], axis=-1).astype(np.float16)
    there |= {"border": border, "objects": objects, "pair": pair}
    fields = (Field("border"), Field("objects", "int32", -1, "nearest"))
    fields += (Field("pair", "float16", 0.5, shape=(2,)),)
    crops = many((12, 13), there, 8, fields=fields, **options)
    image, label, border, objects, pair = (
        crops[name] for name in ("image", "label", "border", "objects", "pair")
    )
    assert label.dtype == np.int32 and border.dtype == np.float32
    if margin := options.get("context", 0):
        image = image[:, margin:-margin, margin:-margin]
    assert set(np.unique(label)) <= {IGNORE_LABEL, *np.unique(there["label"])}
    valid = label != IGNORE_LABEL
    assert valid.mean() > 0.15
    y, x = np.moveaxis(image, -1, 0) / 16
    assert np.abs(y - label // 18)[valid].max() <= 0.501
    assert np.abs(x - label % 18)[valid].max() <= 0.501
    np.testing.assert_allclose(border[valid], (18 * y + x)[valid], atol=1e-2)
    assert not border[~valid].any()
    np.testing.assert_array_equal(objects, np.where(valid, label, -1))
    expected = np.where(valid[..., None], np.stack([border, -2 * border], axis=-1), 0.5)
    np.testing.assert_allclose(pair, expected, rtol=1e-6)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_are_exact_permutations(quarters):
    image, label = (array[:W] for array in example())
    centered = jnp.arange(W) - (W - 1) / 2
    at = rotate(tuple(jnp.meshgrid(centered, centered, indexing="ij")), 90.0 * quarters)
    y, x = (position + (W - 1) / 2 for position in at)
    new_label = sample_nearest(label, (y, x), jnp.array([W, W]), IGNORE_LABEL)
    np.testing.assert_array_equal(new_label, np.rot90(label, quarters))
    new_image = sample_bilinear(image, (y.clip(0, W - 1), x.clip(0, W - 1)))
    np.testing.assert_allclose(new_image, np.rot90(image, quarters), atol=1e-2)


@pytest.mark.parametrize(
    ("options", "measure", "distribution"),
    [
        # From the derivatives of where a pixel is read, (y, x) by (row, column).
        ({"scale": 1.0}, lambda d: -np.log2(d[0, 0]), stats.uniform(-1, 2)),
        (
            {"rotation": 150.0},
            lambda d: np.degrees(np.arctan2(d[0, 1], d[1, 1])),
            stats.uniform(-150, 300),
        ),
        ({"shear": 30.0}, lambda d: np.degrees(np.arctan(d[1, 0])), stats.uniform(-30, 60)),
        # Between opposite ends of the grid, 4 pixels apart: the difference of two Gaussians.
        ({"elastic": 3.0}, lambda d: 4 * d[0, 1], stats.norm(0, 3 * 2**0.5)),
    ],
    ids=["scale", "rotation", "shear", "elastic"],
)
def test_strengths_have_the_distribution_stated(options, measure, distribution):
    n = 250
    there = {"image": coordinates(n), "label": np.zeros((n, n), np.uint8), "size": (n, n)}
    crops = many((5, 5), there, 1000, **options)
    at = crops["image"][np.all(crops["label"] == 0, axis=(1, 2))]
    assert len(at) > 900
    derivatives = np.stack([at[:, 4, 0] - at[:, 0, 0], at[:, 0, 4] - at[:, 0, 0]], axis=-1) / 4
    assert stats.kstest([measure(d) for d in derivatives], distribution.cdf).pvalue > 0.01


@pytest.mark.parametrize("shape", [(9, 9), (20, 31), (1, 2)])
def test_displacements_are_scipys_mirrored_cubic_spline(shape):
    points = np.random.default_rng(0).normal(0, 10, (2, 3, 3)).astype(np.float32)
    at = np.meshgrid(*(np.linspace(0, 2, n) for n in shape), indexing="ij")
    expected = [ndimage.map_coordinates(p, at, order=3, mode="mirror") for p in points]
    np.testing.assert_allclose(displacements(jnp.asarray(points), *shape), expected, atol=1e-4)


def test_the_same_number_gives_the_same_pixels_in_any_batch_on_any_devices():
    image, label = example()
    names = ("flip", "scale", "elastic", "max_class_fraction", "class_crop", "noise")
    crop = partial(augment, crop_size=(H, W), **{name: EVERYTHING[name] for name in names})
    there = {"image": image, "label": label, "size": jnp.array([H, W])}
    batch = jax.tree.map(lambda x: jnp.stack([x] * 8), there)
    keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(0), n))(jnp.arange(8))
    crop = jax.jit(jax.vmap(crop))
    expected = crop(keys, batch)
    for batch_size, num_devices in ((1, 1), (4, 2), (8, 4)):
        devices = mesh_of(num_devices)
        sharding = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("data"))
        some = jax.tree.map(lambda x, n=batch_size: x[:n], (keys, batch))
        crops = crop(*jax.device_put(some, sharding))
        np.testing.assert_array_equal(crops["label"], expected["label"][:batch_size])
        # Programs for other batches round otherwise.
        np.testing.assert_allclose(crops["image"], expected["image"][:batch_size], atol=2e-3)


@pytest.mark.parametrize("options", [{}, {"rotation": 180.0, "scale": 0.3}], ids=str)
def test_class_aware_crops_find_a_rare_class(options):
    """An object of 1 % of the image, in windows of 2 %: few windows hold a quarter of it."""
    image, label = np.zeros((120, 120, 1), np.uint8), np.zeros((120, 120), np.uint8)
    label[70:82, 30:42] = 1
    there = {"image": image, "label": label, "size": (120, 120)}
    found = []
    for fraction in (1.0, 0.75):
        labels = many((16, 16), there, 200, max_class_fraction=fraction, **options)["label"]
        # These windows are judged by each of their pixels.
        found.append(np.mean(np.mean(labels == 1, axis=(1, 2)) > 0.25))
    assert found[0] < 0.04 and found[1] > max(0.1, 5 * found[0])


@pytest.mark.parametrize("value", [0, IGNORE_LABEL])
def test_class_aware_crops_of_one_class_are_crops(value):
    image, _ = example()
    label = jnp.full((H, W), value, jnp.uint8)
    _, new_label = run(partial(augment, crop_size=(5, 4), max_class_fraction=0.5), 0, image, label)
    assert np.all(new_label == value)


def test_levels_are_applied_before_the_color_changes():
    """A deep image with levels becomes what its gray levels become."""
    image, label = example()
    strengths = {"rotation": 20.0, "contrast": 0.3, "noise": 5.0, "offset": 9.0}
    crop = jax.jit(partial(augment, crop_size=(H, W), **strengths))
    there = {"image": image, "label": label, "size": jnp.array([H, W])}
    low, factor = np.array([100, 2000, 7]), np.array([1, 20, 200])
    deep = jnp.asarray(np.asarray(image) * factor + low, jnp.uint16)
    levels = jnp.asarray([low, low + 255 * factor], jnp.float32)
    expected = crop(jax.random.key(0), there)
    found = crop(jax.random.key(0), there | {"image": deep, "levels": levels})
    np.testing.assert_allclose(found["image"], expected["image"], atol=1e-2)
    np.testing.assert_array_equal(found["label"], expected["label"])


def test_products_sample_what_gathers_sample():
    rng = np.random.default_rng(0)
    image = jnp.array(rng.integers(0, 256, (12, 9, 3)), jnp.uint8)
    label = jnp.array(rng.integers(0, 256, (12, 9)), jnp.uint8)
    y, x = jnp.meshgrid(*(jnp.array(rng.uniform(0, n - 1, 7)) for n in (12, 9)), indexing="ij")
    expected = bilinear_by_gathers(image, y, x)
    np.testing.assert_allclose(bilinear_by_products(image, y, x), expected, atol=1e-3)
    i, j = y.astype(int), x.astype(int)
    np.testing.assert_array_equal(pick_by_products(label, i, j), label[i, j])


@pytest.mark.parametrize(("strengths", "gathers"), [({"scale": 0.5}, 0), ({"rotation": 9.0}, 5)])
def test_crops_without_rotation_need_no_gathers_on_a_tpu(strengths, gathers):
    image, label = example()
    there = {"image": image, "label": label, "size": jnp.array([H, W])}
    crop = jax.jit(partial(augment, crop_size=(5, 4), flip=0.5, **strengths))
    lowered = crop.trace(jax.random.key(0), there).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count('"stablehlo.gather"') == gathers
