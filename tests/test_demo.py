"""Tests that the demo page shows image and classes, counts, and predicts only once per file."""

import contextlib
import http.client
import io
import json
import multiprocessing
import pathlib
import re
import socket
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dense_jax import class_colors, data, demo, drawing
from dense_jax.data import decode

NAMES = ("sky", "<b>road</b>", "never")
LIMIT = 0.001  # megapixels


class Predictor:
    """Predicts class 1 where the red channel is bright and 0 elsewhere; counts its calls."""

    class_names, palette = NAMES, class_colors.default_palette(3)
    num_channels, dtype, value_range, regions = 3, "uint8", None, None
    about = "unet, step 7 of <runs>"

    def __init__(self, calls):
        self._calls = calls

    def __call__(self, image):
        self._calls.value += 1
        return (image[..., 0] > 127).astype(np.uint8)


def write(path, height, width, num_bright):
    """Writes an image whose first pixels are bright; returns its labels."""
    pixels = np.zeros(height * width, np.uint8)
    pixels[:num_bright] = 255
    Image.fromarray(pixels.reshape(height, width)).save(path)
    return (pixels > 0).astype(np.uint8).reshape(height, width)


def test_the_table_has_every_class_and_the_largest_area_first():
    colors = {name: (0, 0, 0) for name in "abcde"}
    text = demo.table(np.array([[1, 1, 1], [3, 0, 0]], np.uint8), colors)
    rows = re.findall(r"<td>(\w)</td><td>\d*</td><td>(\d)</td>", text)
    assert rows == [("b", "3"), ("a", "2"), ("d", "1"), ("c", "0"), ("e", "0")]


def test_the_table_counts_the_objects_of_all_classes_but_class_0():
    labels = np.array([[1, 0, 1, 2, 0, 0], [1, 0, 0, 0, 2, 0]], np.uint8)
    text = demo.table(labels, {name: (0, 0, 0) for name in "abcd"})
    rows = re.findall(r"<td>(\w)</td><td>(\d*)</td>", text)
    assert rows == [("a", ""), ("b", "2"), ("c", "2"), ("d", "0")]


def test_examples_are_images_of_the_evaluation_split(tiny_folder, tmp_path, monkeypatch):
    fields = {"name": "folder", "root": str(tiny_folder), "eval_split": "test"}
    (tmp_path / "config.json").write_text(json.dumps({"data": fields}))
    paths = demo.write_examples(str(tmp_path), str(tmp_path))
    source = data.open_dataset("folder", str(tiny_folder), "test")
    for path, i in zip(paths, (0, 1, 3, 4), strict=True):
        assert pathlib.Path(path).name == f"{source.names[i]}.png"
        np.testing.assert_array_equal(demo.read(path, 1, None, LIMIT), source[i]["image"])
    image = np.arange(24, dtype=np.uint8).reshape(3, 4, 2)
    monkeypatch.setattr(demo.folds, "open_split", lambda *_: [{"image": image, "name": "a/b"}])
    (path,) = demo.write_examples(str(tmp_path), str(tmp_path))
    np.testing.assert_array_equal(demo.read(path, 2, None, LIMIT), image)


def test_there_are_no_examples_where_the_data_is_gone(tmp_path):
    fields = {"name": "folder", "root": str(tmp_path / "none"), "eval_split": "val"}
    (tmp_path / "config.json").write_text(json.dumps({"data": fields}))
    for workdir in (tmp_path, tmp_path / "exported.zip"):
        assert demo.write_examples(str(workdir), str(tmp_path)) == []


def test_the_names_in_the_table_are_no_markup():
    colors = class_colors.colors_of(NAMES, class_colors.default_palette(3))
    text = demo.table(np.array([[1, 1, 1], [0, 1, 1]], np.uint8), colors)
    assert text.index("&lt;b&gt;road&lt;/b&gt;") < text.index("sky") < text.index("never")
    assert "<b>" not in text
    assert "<td>1</td><td>5</td><td>83.33&nbsp;%</td>" in text
    assert "<td>0</td><td>0</td><td>0.00&nbsp;%</td>" in text
    for red, green, blue in colors.values():
        assert f"rgb({red} {green} {blue})" in text


def test_an_image_is_read_as_evaluation_reads_it(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    Image.linear_gradient("L").crop((0, 0, 20, 30)).save(path, exif=exif)
    image = demo.read(str(path), 3, None, LIMIT)
    expected = decode.read_image(io.BytesIO(path.read_bytes()), "", 3)
    assert image.shape == (20, 30, 3)
    np.testing.assert_array_equal(image, expected)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    write(tmp_path / "large.png", 40, 30, 0)
    monkeypatch.setattr(decode, "read_image", None)
    with pytest.raises(ValueError, match=r"large.png: has 40 x 30 .* 0.001 megapixels"):
        demo.read(str(tmp_path / "large.png"), 3, None, LIMIT)


def test_without_gradio_the_command_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="pip install"):
        demo.main([])


def serve(calls, port, address, example):
    """Serves from a process of its own, where warnings of Gradio are no errors."""
    page = demo.serve(Predictor(calls), "127.0.0.1", port, LIMIT, [example])
    address.put(page.local_url)
    page.block_thread()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The number of calls of the predictor, and the address of the page."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    calls, address = spawn.Value("i", 0), spawn.Queue()
    example = tmp_path_factory.mktemp("examples") / "example.png"
    write(example, 10, 20, 50)
    arguments = calls, port, address, str(example)
    server = spawn.Process(target=serve, args=arguments, daemon=True)
    server.start()
    yield calls, address.get(timeout=60)
    server.terminate()
    server.join()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("localhost:7860", "LOCALHOST", "127.0.0.1", "[::1]:7860")),
        *((host, 421) for host in ("evil.example", "evil.example:7860", "127.0.0.1.evil.example")),
        *((host, 421) for host in ("localhost.evil.example", "", "[", "localhost@evil.example")),
    ],
)
def test_only_requests_to_this_machines_names_are_served(served, host, status):
    address = served[1].removeprefix("http://").strip("/")
    with contextlib.closing(http.client.HTTPConnection(address)) as connection:
        connection.request("GET", "/", headers={"Host": host, "Origin": f"http://{host}"})
        answer = connection.getresponse()
        assert answer.status == status
        assert (b"gradio" in answer.read()) == (status == 200)


def wait(condition):
    """Waits until the condition is true; returns its value."""
    last = time.monotonic() + 30
    while not (value := condition()):
        assert time.monotonic() < last, "waited for too long"
        time.sleep(0.05)
    return value


@pytest.fixture
def opened(browser, served):
    browser.get(served[1])
    wait(lambda: browser.find_elements("css selector", "input[type=file]"))
    yield browser
    asked = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    local = (served[1], "data:", "blob:")
    assert all(name.startswith(local) for name in browser.execute_script(asked))


def shown(browser, which):
    """Returns the pixels of the image (0) or its overlay (1), [h, w, 3], or else a black pixel."""
    height, width, pixels = browser.execute_script(
        """
        const image = document.querySelectorAll("#picture img")[arguments[0]];
        const canvas = document.createElement("canvas");
        if (!image?.naturalWidth) return [1, 1, [0, 0, 0, 0]];
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        const {data} = context.getImageData(0, 0, canvas.width, canvas.height);
        return [canvas.height, canvas.width, [...data]];
        """,
        which,
    )
    return np.array(pixels).reshape(height, width, 4)[..., :3]


def upload(browser, path):
    browser.find_element("css selector", "input[type=file]").send_keys(str(path))


def test_browser_shows_the_areas_and_the_slider_does_not_predict(opened, served, tmp_path):
    labels = write(tmp_path / "a b ä.png", 20, 30, 150)
    image = 255 * labels[..., None]
    before = served[0].value

    def css(selector):
        return opened.find_elements("css selector", selector)

    upload(opened, tmp_path / "a b ä.png")
    wait(lambda: css("#areas tr"))
    rows = [
        [cell.text for cell in row.find_elements("css selector", "td")] for row in css("#areas tr")
    ]
    assert rows[1:] == [
        ["", "sky", "", "450", "75.00 %"],
        ["", "<b>road</b>", "1", "150", "25.00 %"],
        ["", "never", "0", "0", "0.00 %"],
    ]
    # The last two are the End and the Home key.
    for opacity, key in ((drawing.OPACITY, ""), (1.0, "\ue010"), (0.0, "\ue011")):
        css("input[type=range]")[0].send_keys(key)
        expected = drawing.overlay(image, labels, Predictor.palette, opacity)
        wait(lambda e=expected: np.abs(shown(opened, 1) - e).mean() < 8)  # a JPEG file
        assert np.abs(shown(opened, 0) - drawing.to_rgb(image)).mean() < 8
    np.testing.assert_array_equal(shown(opened, 0), shown(opened, 1))
    assert opened.title == "dense_jax: unet, step 7 of <runs>" == f"dense_jax: {css('h1')[0].text}"
    assert served[0].value == before + 1
    opened.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    opened.find_element("xpath", "//button[contains(., 'Class ids')]").click()
    result = tmp_path / "a b ä_classes.png"
    wait(result.exists)
    with Image.open(result) as written:
        assert written.mode == "P"
        np.testing.assert_array_equal(np.asarray(written), labels)
    css("button[aria-label='Clear']")[0].click()
    wait(lambda: not css("#areas tr") and not css("#picture img"))


def test_browser_shows_an_example_at_a_click(opened):
    def css(selector):
        return opened.find_elements("css selector", selector)

    css("#examples button.thumbnail-item")[0].click()
    wait(lambda: "25.00 %" in " ".join(row.text for row in css("#areas tr")))
    assert shown(opened, 0).shape == (10, 20, 3)


@pytest.mark.parametrize(
    "name, message",
    [
        ("b & i.png", "b & i.png: not a readable image (none of PNG, JPEG, WEBP, TIFF"),
        ("pixels.png", "pixels.png: has 40 x 30 pixels"),
        ("bytes.png", "maximum allowed size"),
    ],
)
def test_browser_says_what_is_wrong_with_a_file(opened, served, tmp_path, name, message):
    write(tmp_path / "pixels.png", 40, 30, 0)
    (tmp_path / "b & i.png").write_bytes(b"not an image")
    (tmp_path / "bytes.png").write_bytes(bytes(8001))
    upload(opened, tmp_path / name)
    wait(lambda: message in opened.find_element("css selector", "body").text)
