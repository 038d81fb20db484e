"""Tests the predict command: its input files, its results, and how it handles broken files."""

import csv
import json
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
from PIL import Image

from dense_jax import class_colors, drawing, predict
from dense_jax.data import image_strips
from dense_jax.inference import image_files, object_maps
from dense_jax.inference.predictor import Predictor, entropy

RNG = np.random.default_rng(0)
PALETTE = np.array([[0, 0, 0], [0, 90, 200], [230, 160, 0]], np.uint8)


def logits_step(_, image):
    """The class says how bright a pixel is."""
    gray = jnp.asarray(image, jnp.float32)[..., 0] / 255
    return jnp.stack([0.3 - gray, 0.1 - abs(gray - 0.5), gray - 0.7], axis=-1) * 9


@pytest.fixture(autouse=True)
def network(monkeypatch):
    dataset = {
        "class_names": ["a", "b", "c"],
        "palette": PALETTE,
        "num_channels": 3,
        "ladder": [(20, 30)],
        "dtype": "uint8",
        "value_range": None,
    }
    predictor = Predictor(
        logits_step, {}, dataset, "unit", tile_size=(16, 16), margin=2, context=0, batch_size=4
    )
    monkeypatch.setattr(predict, "load", lambda *_: predictor)
    return predictor


@pytest.fixture
def small(monkeypatch):
    """Every image counts as large, and is read by strips of a few rows."""
    monkeypatch.setattr(image_strips, "WHOLE", 0)
    monkeypatch.setattr(image_strips, "STRIP", 100)


def pixels_of(h=20, w=30):
    return RNG.integers(0, 256, (h, w, 3)).astype(np.uint8)


def save(path, pixels=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels_of() if pixels is None else pixels).save(path, **options)


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def names(folder):
    """The files in a folder except the legend."""
    return sorted(
        path.name for path in folder.iterdir() if path.is_file() and path.name != "legend.png"
    )


@pytest.mark.parametrize("large", [False, True])
def test_all_that_can_be_written(request, network, tmp_path, large):
    if large:
        request.getfixturevalue("small")
    images = {"ä b": pixels_of(45, 37), "c": pixels_of(1, 1)}
    for name, pixels in images.items():
        save(tmp_path / f"{name}.png", pixels)
    for kind in ("npy", "tif"):
        out = tmp_path / kind
        problems = predict.predict(
            *("", str(tmp_path), out), opacity=0.3, probabilities=kind, uncertainty=True
        )
        assert problems == []
        endings = (".png", "_overlay.png", f"_probabilities.{kind}", "_uncertainty.png")
        assert names(out) == sorted(name + ending for name in images for ending in endings)
        for name, pixels in images.items():
            classes, p = network(pixels), network.probabilities(pixels)
            np.testing.assert_array_equal(read(out / f"{name}.png"), classes)
            with Image.open(out / f"{name}.png") as image:
                assert image.mode == "P" and image.getpalette()[:9] == PALETTE.ravel().tolist()
            overlay = drawing.overlay(pixels, classes, PALETTE, 0.3)
            np.testing.assert_array_equal(read(out / f"{name}_overlay.png"), overlay)
            np.testing.assert_array_equal(read(out / f"{name}_uncertainty.png"), entropy(p))
            path = out / f"{name}_probabilities.{kind}"
            written = np.load(path) if kind == "npy" else tifffile.imread(path)
            np.testing.assert_array_equal(written.reshape(p.shape), p.astype(np.float16))


def test_a_loaded_network_takes_all_that_predict_takes_and_gives_the_same(network, tmp_path):
    turned = Image.Exif()
    turned[274] = 6  # a quarter turn
    gray = pixels_of()[..., 0]
    rgb, alpha = Image.fromarray(pixels_of()), Image.fromarray(gray)
    pictures = {"gray.png": Image.fromarray(gray), "bits.png": rgb.convert("1")}
    pictures |= {"colors.png": rgb.quantize(), "rgb.webp": rgb, "turned.jpg": rgb}
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    for name, picture in (pictures | {"alpha.png": rgba}).items():
        picture.save(tmp_path / name, exif=turned)
    np.save(tmp_path / "array.npy", gray)
    with tifffile.TiffWriter(tmp_path / "pages.tif") as writer:
        for page in (gray, gray):
            writer.write(page)
    with pytest.raises(ValueError, match=r"pages\.tif: has 2 pages"):
        network(tmp_path / "pages.tif")
    (tmp_path / "pages.tif").unlink()
    assert predict.predict("", str(tmp_path), tmp_path / "out", probabilities="npy") == []
    for path in (path for path in tmp_path.iterdir() if path.is_file()):
        forms = [path, str(path)]
        forms.append(np.load(path) if path.suffix == ".npy" else Image.open(path))
        for form in forms:
            np.testing.assert_array_equal(
                network(form), read(tmp_path / "out" / f"{path.stem}.png")
            )
            np.testing.assert_array_equal(
                network.probabilities(form).astype(np.float16),
                np.load(tmp_path / "out" / f"{path.stem}_probabilities.npy"),
            )
    assert network(tmp_path / "turned.jpg").shape == (30, 20)
    rows = network(np.asarray(rgb))
    np.testing.assert_array_equal(network(rgb), rows)
    np.testing.assert_array_equal(network(gray), network(np.stack([gray] * 3, axis=-1)))


def test_files_folders_and_globs_each_file_once_and_no_results(tmp_path):
    for name in ("a,1.png", "b.jpg", "c[1].TIF", ".hidden.png", "below/d.png", "out/a,1.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    out = tmp_path / "out"

    def found(*arguments):
        return [path.name for path in image_files.find([*map(str, arguments)], out)]

    assert found(tmp_path) == ["a,1.png", "b.jpg", "c[1].TIF"]
    assert found(tmp_path / "b.*", tmp_path, f"{tmp_path}/./b.jpg") == [
        *("b.jpg", "a,1.png", "c[1].TIF")
    ]
    assert found(tmp_path / "c[1].TIF") == ["c[1].TIF"]
    assert found(tmp_path / "**" / "*.png") == ["a,1.png", "d.png"]
    for argument, why in (
        ("*.webp", "matches no file"),
        ("out", "has only what is in --output"),
        ("none.png", "no"),
    ):
        with pytest.raises(ValueError, match=rf"{argument.replace('*', '.')}.* {why}"):
            found(tmp_path, tmp_path / argument)
    with pytest.raises(ValueError, match="--images names no file"):
        found()


@pytest.mark.parametrize("pattern", ["", "*", "**"])
def test_a_second_run_finds_the_same_images_where_the_output_lies_among_them(tmp_path, pattern):
    save(tmp_path / "a.jpg")
    save(tmp_path / "b.png")
    arguments = ("", str(tmp_path / pattern), tmp_path / "out")
    for _ in range(2):
        assert predict.predict(*arguments, overwrite=True) == []
        assert names(tmp_path / "out") == ["a.png", "a_overlay.png", "b.png", "b_overlay.png"]
        assert names(tmp_path) == ["a.jpg", "b.png"]


def test_images_in_the_output_folder_are_never_overwritten(tmp_path):
    save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ValueError, match="has only what is in --output"):
        predict.predict("", str(tmp_path), tmp_path, overwrite=True)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is one of --images"):
        predict.predict("", str(tmp_path / "links"), tmp_path, overwrite=True)
    assert (tmp_path / "a.png").read_bytes() == before


def test_each_page_is_an_image(tmp_path):
    pages = [pixels_of(9, 20), pixels_of(30, 7)]
    with tifffile.TiffWriter(tmp_path / "stack.tif") as writer:
        for page in pages:
            writer.write(page, photometric="rgb")
    assert predict.predict("", str(tmp_path), tmp_path / "out") == []
    assert names(tmp_path / "out") == [
        f"stack_page{k:03d}{ending}.png" for k in range(2) for ending in ("", "_overlay")
    ]
    for k, page in enumerate(pages):
        assert read(tmp_path / "out" / f"stack_page{k:03d}.png").shape == page.shape[:2]


def test_a_page_that_is_left_out_does_not_stop_the_others(tmp_path):
    with tifffile.TiffWriter(tmp_path / "stack.tif") as writer:
        for size in ((9, 20), (60, 70), (5, 6)):
            writer.write(pixels_of(*size), photometric="rgb")
    problems = predict.predict("", str(tmp_path), tmp_path / "out", max_megapixels=0.001)
    assert len(problems) == 1 and "stack.tif, page 1: has 60 x 70 pixels" in problems[0]
    assert names(tmp_path / "out") == [
        f"stack_page{k:03d}{ending}.png" for k in (0, 2) for ending in ("", "_overlay")
    ]


@pytest.mark.parametrize("large", [False, True])
def test_broken_files_are_reported_and_leave_nothing_behind(request, tmp_path, large):
    if large:
        request.getfixturevalue("small")
    save(tmp_path / "good.png", pixels_of(90, 30))
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not an image")
    np.save(tmp_path / "many.npy", np.zeros((5, 6, 9), np.uint8))
    save(tmp_path / "zz.png")
    problems = predict.predict("", str(tmp_path), tmp_path / "out", uncertainty=True)
    for name in ("cut.png", "empty.png", "text.jpg", "many.npy"):
        assert sum(name in problem for problem in problems) == 1
    assert len(problems) == 4
    endings = (".png", "_overlay.png", "_uncertainty.png")
    assert names(tmp_path / "out") == [name + end for name in ("good", "zz") for end in endings]


def test_an_image_that_is_too_large_is_known_by_its_header(tmp_path):
    path = tmp_path / "bomb.png"
    save(path)
    head = bytearray(path.read_bytes())
    head[16:24] = (300_000).to_bytes(4) * 2  # a height and a width that no memory holds
    import zlib

    head[29:33] = zlib.crc32(head[12:29]).to_bytes(4)
    path.write_bytes(head)
    save(tmp_path / "a.png")
    limit = Image.MAX_IMAGE_PIXELS
    problems = predict.predict("", str(tmp_path), tmp_path / "out")
    assert len(problems) == 1 and "300000 x 300000 pixels" in problems[0]
    assert "more than 1000 megapixels" in problems[0] and "--max_megapixels" in problems[0]
    assert names(tmp_path / "out") == ["a.png", "a_overlay.png"]
    assert limit == Image.MAX_IMAGE_PIXELS
    problems = predict.predict(
        "", str(tmp_path / "a.png"), tmp_path / "none", max_megapixels=0.0005
    )
    assert len(problems) == 1 and names(tmp_path / "none") == []


def test_nothing_is_written_where_results_would_collide_or_be_lost(tmp_path):
    for name in ("a.png", "a.tif", "a_overlay.jpg", "b.png", "legend.png"):
        save(tmp_path / name)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"\['a.png', 'a_overlay.png', 'legend.png'\]: rename"):
        predict.predict("", str(tmp_path), out)
    assert not out.exists()
    save(out / "b_overlay.png")
    before = (out / "b_overlay.png").read_bytes()
    with pytest.raises(
        ValueError, match=r"b_overlay.png exists \(1 results do\): pass --overwrite"
    ):
        predict.predict("", str(tmp_path / "b.png"), out)
    assert names(out) == ["b_overlay.png"]
    predict.predict("", str(tmp_path / "b.png"), out, overwrite=True)
    assert (out / "b_overlay.png").read_bytes() != before


def test_what_cannot_be_read_or_written_does_not_end_the_others(tmp_path):
    long = "m" * 246
    for name in ("a", long, "z"):
        save(tmp_path / f"{name}.png")
    for name, target in (("loop", "loop.png"), ("dangling", "nowhere")):
        (tmp_path / f"{name}.png").symlink_to(tmp_path / target)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    problems = predict.predict("", str(tmp_path), tmp_path / "out")
    for name in ("loop.png", "dangling.png", "pipe.png", f"out/{long}"):
        assert sum(f"{tmp_path / name}" in problem for problem in problems) == 1
    assert len(problems) == 4 and "None" not in "".join(problems)
    assert names(tmp_path / "out") == ["a.png", "a_overlay.png", "z.png", "z_overlay.png"]


def test_links_to_one_file_are_images_of_their_own(tmp_path):
    save(tmp_path / "store" / "key", format="PNG")
    for name in ("a.png", "b.png"):
        (tmp_path / name).symlink_to(tmp_path / "store" / "key")
    assert predict.predict("", str(tmp_path), tmp_path / "out") == []
    assert names(tmp_path / "out") == ["a.png", "a_overlay.png", "b.png", "b_overlay.png"]


@pytest.mark.parametrize("kind", ["npy", "tif"])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file on a full disk")
def test_a_full_disk_ends_all_at_once_and_leaves_whole_images(tmp_path, kind):
    for name in "abc":
        save(tmp_path / f"{name}.png")
    out = tmp_path / "out"
    out.mkdir()
    (out / f".b_probabilities.{kind}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left.*b_probabilities.{kind}"):
        predict.predict("", str(tmp_path), out, probabilities=kind)
    whole = [
        name + end
        for name in "ac"
        if (out / f"{name}.png").exists()  # those that were complete by then
        for end in (".png", "_overlay.png", f"_probabilities.{kind}")
    ]
    assert names(out) == whole


def test_the_output_must_be_a_folder_with_no_folders_for_results(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"--output=.*a.png is a file: it must be a folder"):
        predict.predict("", str(tmp_path), tmp_path / "a.png")
    (tmp_path / "out" / "a_overlay.png").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"a_overlay.png is a folder"):
        predict.predict("", str(tmp_path), tmp_path / "out", overwrite=True)


def test_an_error_in_the_middle_leaves_no_half_written_file(monkeypatch, small, tmp_path):
    def full(*_):
        raise MemoryError("too large")

    save(tmp_path / "a.png", pixels_of(90, 30))
    monkeypatch.setattr(predict.drawing, "overlay", full)
    with pytest.raises(MemoryError, match="too large"):
        predict.predict("", str(tmp_path), tmp_path / "out")
    assert not [name for name in names(tmp_path / "out") if name.endswith(".tmp")]


def test_the_legend_has_the_classes_of_all_results_in_the_folder(tmp_path):
    colors = class_colors.colors_of("abc", PALETTE)
    legend = tmp_path / "out" / "legend.png"
    for name, gray in (("b", 128), ("a", 0), ("c", 255)):
        save(tmp_path / f"{name}.png", np.full((9, 9, 3), gray, np.uint8))
    (tmp_path / "broken.png").write_bytes((tmp_path / "c.png").read_bytes()[:-30])

    def shown(name, **options):
        predict.predict("", str(tmp_path / f"{name}.png"), tmp_path / "out", **options)
        return read(legend)

    assert predict.predict("", str(tmp_path / "broken.png"), tmp_path / "out")
    assert not legend.exists()
    for name, there in (("b", "b"), ("a", "ab")):
        expected = drawing.legend({name: colors[name] for name in there})
        np.testing.assert_array_equal(shown(name), expected)
    expected = drawing.legend({"b": colors["b"]})
    np.testing.assert_array_equal(shown("b", overwrite=True), expected)
    for content in ((tmp_path / "a.png").read_bytes(), b"notes"):  # not ours
        legend.write_bytes(content)
        (tmp_path / "out" / "c.png").unlink(missing_ok=True)
        (tmp_path / "out" / "c_overlay.png").unlink(missing_ok=True)
        predict.predict("", str(tmp_path / "c.png"), tmp_path / "out")
        assert legend.read_bytes() == content


@pytest.mark.parametrize("blend", [False, True])
def test_outlines_are_those_of_the_whole_image(network, small, tmp_path, blend):
    images = {"a": pixels_of(45, 37).repeat(2, 0), "b": pixels_of(1, 30)}
    for name, pixels in images.items():
        save(tmp_path / f"{name}.png", pixels)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-3000])
    problems = predict.predict("", str(tmp_path), tmp_path / "out", outlines=True, blend=blend)
    assert len(problems) == 1 and "cut.png" in problems[0]
    for name, pixels in images.items():
        classes = read(tmp_path / "out" / f"{name}.png")
        overlay = drawing.overlay(pixels, drawing.outlines(classes), PALETTE, 1.0)
        np.testing.assert_array_equal(read(tmp_path / "out" / f"{name}_overlay.png"), overlay)


@pytest.mark.parametrize("border", [None, "b"])
def test_objects_are_numbered_measured_and_counted(network, small, tmp_path, border):
    images = {"z": pixels_of(12, 10).repeat(5, 0).repeat(6, 1), "a": np.zeros((7, 30, 3), np.uint8)}
    for name, pixels in images.items():
        save(tmp_path / f"{name}.png", pixels)
    out = tmp_path / "out"
    (tmp_path / "cut.png").write_bytes((tmp_path / "z.png").read_bytes()[:-300])
    problems = predict.predict("", str(tmp_path), out, objects=["all"], border_class=border)
    assert len(problems) == 1 and "cut.png" in problems[0]
    kinds = object_maps.kinds("abc", ["all"], border)
    written = list(csv.DictReader((out / "objects.csv").read_text().splitlines()))
    for name, pixels in images.items():
        classes = network(pixels)
        objects = object_maps.number(classes, kinds)
        with Image.open(out / f"{name}_objects.png") as image:
            assert image.mode == "I;16"
            np.testing.assert_array_equal(np.asarray(image), objects)
        confidence = network.probabilities(pixels).max(axis=-1).astype(np.float16)
        rows = object_maps.measure(objects, classes, confidence, kinds)
        lines = [list(map(str, (name, *row))) for row in rows]
        assert lines == [list(line.values()) for line in written if line["image"] == name]
        assert bool(lines) == (name == "z")
    assert len({line["image"] for line in written}) == 1
    counts = list(csv.reader((out / "counts.csv").read_text().splitlines()))
    assert [line[0] for line in counts] == ["image", "a", "z"]
    assert sum(map(int, counts[2][1:])) == len(written) > 9


def test_an_image_with_too_many_objects_is_skipped_and_tables_are_not_lost(
    monkeypatch, network, tmp_path
):
    save(tmp_path / "a.png")
    save(tmp_path / "plain.png", np.zeros((9, 9, 3), np.uint8))
    monkeypatch.setattr(object_maps, "MOST", 3)
    arguments = "", str(tmp_path), tmp_path / "out"
    (problem,) = predict.predict(*arguments, objects=["b", "c"])
    assert re.search(r"a_objects\.png: has \d+ objects, but .* at most 3 numbers", problem)
    assert names(tmp_path / "out") == [
        *("counts.csv", "objects.csv", "plain.png", "plain_objects.png", "plain_overlay.png")
    ]
    for path in (tmp_path / "out").glob("plain*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"objects.csv exists \(2 results do\): pass --overwrite"):
        predict.predict(*arguments, objects=["b"])
    with pytest.raises(ValueError, match="no class 'd'; there are: a, b, c"):
        predict.predict("", str(tmp_path), tmp_path / "new", objects=["d"])
    assert not (tmp_path / "new").exists()


def test_tiles_and_blending_can_be_chosen(tmp_path):
    pixels = pixels_of(50, 40)
    save(tmp_path / "a.png", pixels)
    for options in ({"tile_size": (12, 20), "margin": 4}, {"blend": True, "batch_size": 1}):
        out = tmp_path / json.dumps(sorted(options))
        predict.predict("", str(tmp_path / "a.png"), out, **options)
        classes = np.argmax(logits_step(None, pixels), axis=-1)
        np.testing.assert_array_equal(read(out / "a.png"), classes)
