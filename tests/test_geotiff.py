"""Tests GeoTIFF files from training to class maps, with files that rasterio (GDAL) writes and reads."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image
from rasterio import Affine

from dense_jax import predict
from dense_jax.data import decode, image_strips, levels, open_dataset, pipeline
from dense_jax.data.cache import Cached
from dense_jax.inference import image_files
from dense_jax.inference.predictor import Predictor
from dense_jax.labels import IGNORE_LABEL

RNG = np.random.default_rng(0)
PALETTE = np.array([[0, 0, 0], [0, 90, 200], [230, 160, 0]], np.uint8)
PLACES = {  # each is stored in other tags
    "utm": ("EPSG:32632", Affine(10, 0, 5e5, 0, -10, 5.3e6)),
    "turned": ("EPSG:4326", Affine(0.09, 0.03, 7, 0.03, -0.09, 50)),
    "own": ("+proj=laea +lat_0=47.123 +lon_0=10 +x_0=1 +datum=WGS84", Affine(2, 0, 0, 0, -3, 1)),
}


def bands(h=90, w=70, dtype="uint16", nodata=0):
    """Four bands of values from 1 to 999, with a corner of nodata and a part where one band has it."""
    pixels = RNG.integers(1, 1000, (4, h, w)).astype(dtype)
    pixels[:, : h // 3, : w // 2] = nodata
    pixels[1, h // 2 :, w // 2 :] = nodata
    return pixels


def save(path, pixels, place="utm", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    crs, transform = PLACES[place]
    count, height, width = pixels.shape
    options |= {"count": count, "height": height, "width": width, "dtype": pixels.dtype}
    options |= {"crs": crs, "transform": transform, "photometric": "minisblack"}
    with rasterio.open(path, "w", "GTiff", **options) as file:
        file.write(pixels)


def missing(path):
    """The pixels that GDAL says are nodata."""
    with rasterio.open(path) as file:
        return file.dataset_mask() == 0


def logits_step(_, image, its_levels):
    """The class says how bright the third band is."""
    low, high = its_levels[..., 0, None, None, 2], its_levels[..., 1, None, None, 2]
    gray = (jnp.asarray(image, jnp.float32)[..., 2] - low) / (high - low)
    return jnp.stack([0.3 - gray, 0.1 - abs(gray - 0.5), gray - 0.7], axis=-1) * 9


@pytest.fixture
def network(monkeypatch):
    dataset = {
        "class_names": ["a", "b", "c"],
        "palette": PALETTE,
        "num_channels": 4,
        "ladder": [(20, 30)],
        "dtype": "uint16",
        "value_range": (0, 1000),
    }
    predictor = Predictor(
        logits_step, {}, dataset, "image", tile_size=(64, 64), margin=2, context=0, batch_size=4
    )
    monkeypatch.setattr(predict, "load", lambda *_: predictor)
    return predictor


@pytest.fixture
def small(monkeypatch):
    """Every image counts as large, and is read by strips of a few rows."""
    monkeypatch.setattr(image_strips, "WHOLE", 0)
    monkeypatch.setattr(image_strips, "STRIP", 500)


@pytest.mark.parametrize(
    "place, large", [("utm", False), ("turned", False), ("own", False), ("utm", True)]
)
def test_class_maps_lie_where_their_images_do(request, network, tmp_path, place, large):
    if large:
        request.getfixturevalue("small")
    path, out = tmp_path / "scene.tif", tmp_path / "out"
    save(path, bands(300, 280), place, nodata=0, compress="deflate", tiled=True)
    assert predict.predict("", str(path), out, probabilities="tif") == []
    names = sorted(file.name for file in out.iterdir())
    assert names == ["legend.png", "scene.tif", "scene_overlay.png", "scene_probabilities.tif"]
    with rasterio.open(path) as image, rasterio.open(out / "scene.tif") as classes:
        assert classes.crs == image.crs and classes.transform == image.transform
        assert (classes.count, classes.dtypes, classes.nodata) == (1, ("uint8",), IGNORE_LABEL)
        assert classes.compression.name == "deflate" and classes.block_shapes == [(256, 256)]
        assert [classes.colormap(1)[c][:3] for c in range(3)] == list(map(tuple, PALETTE.tolist()))
        written = classes.read(1)
    with rasterio.open(path) as image, rasterio.open(out / "scene_probabilities.tif") as file:
        assert file.crs == image.crs and file.transform == image.transform
        most = file.read().argmax(axis=0)
    nodata = missing(path)
    assert nodata.sum() == 100 * 140
    np.testing.assert_array_equal(written == IGNORE_LABEL, nodata)
    np.testing.assert_array_equal(network(path), written)
    with Image.open(out / "scene.tif") as picture:
        np.testing.assert_array_equal(np.asarray(picture), written)
    assert set(np.unique(written)) == {0, 1, 2, IGNORE_LABEL}
    assert np.mean(most[~nodata] == written[~nodata]) > 0.99  # float16 rounds close ones


def test_blended_and_augmented_class_maps_have_the_same_nodata(network, tmp_path):
    save(tmp_path / "a.tif", bands(), nodata=0)
    classes = network.using(blend=True, augment=["flips"])(tmp_path / "a.tif")
    np.testing.assert_array_equal(classes == IGNORE_LABEL, missing(tmp_path / "a.tif"))


def test_an_image_without_a_place_gives_a_png_file(network, tmp_path):
    how = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(bands(), 0, -1), **how)
    assert predict.predict("", str(tmp_path / "a.tif"), tmp_path / "out") == []
    assert (tmp_path / "out" / "a.png").exists()


@pytest.mark.parametrize(
    "dtype, nodata",
    [("uint8", 0), ("uint8", 255), ("uint16", 65535), ("int16", -9999)]
    + [("float32", value) for value in (-9999, float("nan"), np.finfo(np.float32).min)],
)
@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_nodata_is_what_gdal_says(small, tmp_path, dtype, nodata, interleave):
    path = tmp_path / "a.tif"
    save(path, bands(dtype=dtype, nodata=nodata), nodata=nodata, interleave=interleave)
    pixels = np.moveaxis(rasterio.open(path).read(), 0, -1)
    with path.open("rb") as file:
        image = decode.read_image(file, "a.tif", 4, dtype="float32")
    assert np.isfinite(image.data).all()
    nodata_in_all = missing(path)
    for mask in np.moveaxis(np.ma.getmaskarray(image), -1, 0):
        np.testing.assert_array_equal(mask, nodata_in_all)
    if dtype != "float32":  # there, what one band lacks is 0, too
        np.testing.assert_array_equal(image.compressed(), pixels[~nodata_in_all].ravel())
    by_strips = np.ma.concatenate(list(image_strips.strips(path, 4, dtype="float32")))
    np.testing.assert_array_equal(by_strips.data, image.data)
    np.testing.assert_array_equal(by_strips.mask, image.mask)


@pytest.mark.parametrize("nodata", ["-1", "300", "0.5", "none", "-1e400"])
def test_a_nodata_value_that_no_pixel_can_have_masks_none(tmp_path, nodata):
    path = tmp_path / "a.tif"
    pixels = RNG.integers(0, 256, (5, 6)).astype(np.uint8)
    tifffile.imwrite(path, pixels, extratags=[(42113, "s", 0, nodata, True)])
    with path.open("rb") as file:
        image = decode.read_image(file, "a.tif", 1)
    assert not np.ma.getmaskarray(image).any()
    np.testing.assert_array_equal(np.ma.getdata(image)[..., 0], pixels)


def test_a_rotated_image_does_not_pass_its_place_on(tmp_path):
    save(tmp_path / "a.tif", bands())
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        tags = [(t.code, int(t.dtype), t.count, t.value, True) for t in tiff.pages[0].tags]
    kept = [tag for tag in tags if tag[0] >= 33550]
    assert image_files.single(tmp_path / "a.tif").geo_tags
    for orientation in (1, 6):
        turned = [(274, "H", 1, orientation, True), *kept]
        tifffile.imwrite(tmp_path / "b.tif", bands()[0], extratags=turned)
        assert bool(image_files.single(tmp_path / "b.tif").geo_tags) == (orientation == 1)


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / "images" / split / "a.tif", bands(), nodata=0)
        label = RNG.integers(0, 2, (90, 70)).astype(np.uint8)
        (tmp_path / "labels" / split).mkdir(parents=True)
        Image.fromarray(label).save(tmp_path / "labels" / split / "a.png")
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": ["a", "b"]}))
    return tmp_path


def test_training_ignores_nodata(root):
    source = open_dataset("folder", str(root), "train")
    assert (source.num_channels, source.dtype) == (4, "uint16")
    example, nodata = source[0], missing(root / "images" / "train" / "a.tif")
    with Image.open(root / "labels" / "train" / "a.png") as file:
        label = np.where(nodata, IGNORE_LABEL, np.asarray(file))
    np.testing.assert_array_equal(example["label"], label)
    assert not isinstance(example["image"], np.ma.MaskedArray)
    fitted = pipeline.fit(example, (96, 96), RNG)
    assert set(fitted) == {"image", "label", "name", "size"}
    np.testing.assert_array_equal(fitted["label"][:90, :70], label)


@pytest.mark.parametrize("normalization", ["image", "percentiles", "dataset"])
def test_nodata_does_not_count_in_levels_and_lies_between_them(root, normalization):
    source = open_dataset("folder", str(root), "train")
    nodata = missing(root / "images" / "train" / "a.tif")
    valid = source[0]["image"][~nodata].astype(np.float64)
    if normalization == "percentiles":
        expected = np.percentile(valid, (1, 99), axis=0)
    else:
        mean, sd = valid.mean(axis=0), valid.std(axis=0)
        expected = np.stack([mean - 2 * sd, mean + 2 * sd])
    facts = {"num_channels": 4, "dtype": "uint16", "value_range": None}
    if normalization == "dataset":
        facts["levels"] = levels.of_split(source).tolist()
    rule = levels.rule(normalization, facts)
    assert rule is not None
    for examples in (levels.with_levels(source, rule), Cached(levels.with_levels(source, rule))):
        found = examples[0]
        np.testing.assert_allclose(found["levels"], expected, rtol=1e-5, atol=1e-2)
        middle = np.broadcast_to(expected.mean(axis=0), found["image"][nodata].shape)
        np.testing.assert_allclose(found["image"][nodata], middle, atol=1)
        np.testing.assert_array_equal(found["image"][~nodata], valid)
    images = image_files.ImageFiles(
        [image_files.single(root / "images" / "train" / "a.tif")], 4, None, "uint16"
    )
    in_prediction, _ = rule.read(lambda: images.strips(0), images.sizes[0].tolist())
    np.testing.assert_array_equal(in_prediction, found["levels"])


@pytest.mark.parametrize(
    "dtype, limits, middle",
    [("float32", (0.2, 0.6), 0.4), ("uint16", (-100, 50), 0), ("uint16", (0, 200_000), 65535)],
)
def test_what_fills_nodata_has_the_type_of_the_image(dtype, limits, middle):
    image = np.ma.array(np.ones((2, 1, 1), dtype), mask=[[[True]], [[False]]])
    found = levels.filled(image, np.array(limits, np.float32)[:, None])
    assert found.dtype == dtype and not isinstance(found, np.ma.MaskedArray)
    np.testing.assert_allclose(found.ravel(), [middle, 1])


def test_an_image_without_any_data_is_read_and_predicted(network, tmp_path):
    save(tmp_path / "a.tif", np.zeros((4, 30, 20), np.uint16), nodata=0)
    assert (network(tmp_path / "a.tif") == IGNORE_LABEL).all()
