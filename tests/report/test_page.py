"""Tests that the page shows the numbers of the runs, escapes names, and works in a browser."""

import base64
import copy
import html.parser
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from dense_jax import class_colors, data, drawing, metrics
from dense_jax.evaluation import class_maps
from dense_jax.report import figures, gallery, page
from dense_jax.report.rows import Row, build
from tests.report.reported import NASTY, write_dataset, write_runs


class Reader(html.parser.HTMLParser):
    """Collects tags with their attributes, texts, and what the script reads."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.data = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1] == ("script", {"type": "application/json", "id": "data"}):
            self.data += data
        else:
            self.texts.append(data.strip())

    def of_class(self, name):
        return [attrs for _, attrs in self.tags if attrs.get("class") == name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("reported")
    write_dataset(root / "data")
    write_runs(root / "runs", root / "data")
    return root / "runs"


@pytest.fixture(scope="module")
def report(folder):
    return build(folder, "test")


@pytest.fixture(scope="module")
def pictures(report):
    return gallery.build(report[1], 4)


@pytest.fixture(scope="module")
def text(report, pictures):
    return page.to_html("results", report, pictures)


def with_curve(run, curve):
    changed = copy.copy(run)
    changed.curve = curve
    return changed


def decode(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


def test_it_needs_no_other_file_and_no_name_becomes_markup(text, report):
    reader = Reader(text)
    assert not re.search(r"""(src|href|url|import)\s*[=(]?\s*["']?(https?:)?//""", text)
    assert {tag for tag, _ in reader.tags} <= {
        *("html", "meta", "title", "style", "h1", "h2", "h3", "p", "div", "span", "section", "i"),
        *("table", "thead", "tbody", "tr", "th", "td", "b", "a", "svg", "path", "g", "polygon"),
        *("polyline", "ul", "li", "label", "select", "input", "script", "code"),
    }  # no img but what the script makes
    assert not [attrs for _, attrs in reader.tags if any(name.startswith("on") for name in attrs)]
    assert reader.texts.count(NASTY) == 6  # loss in 3 tables and over its curve, class, legend


def test_curves_are_the_seeds_mean_between_lowest_and_highest(report):
    for row in report.rows:
        scores = np.array([[score for _, score in run.curve] for run in row.runs])
        steps, mean, low, high = zip(*page.curve(row), strict=True)
        assert steps == (5, 10, 20)
        np.testing.assert_allclose(mean, scores.mean(axis=0))
        np.testing.assert_allclose(low, scores.min(axis=0))
        np.testing.assert_allclose(high, scores.max(axis=0))


def test_only_steps_that_all_seeds_have_are_in_a_curve(report):
    row = report.rows[0]
    short = [with_curve(run, run.curve[i:]) for i, run in enumerate(row.runs)]
    assert [step for step, *_ in page.curve(Row(short, row.label))] == [10, 20]
    none = [with_curve(run, []) for run in row.runs]
    assert page.plot([Row(none, row.label)]) is None


def test_a_bar_for_each_row_and_class_as_long_as_its_iou(text, report):
    bars = page.bars(report)
    assert list(bars) == ["dark", NASTY]
    for name, class_bars in bars.items():
        for bar, row in zip(class_bars, report[1], strict=True):
            mean, half = row.score(f"eval/iou/{name}")
            assert bar["mean"] == pytest.approx(100 * mean, abs=0.01)
            ends = np.clip([100 * (mean - half), 100 * (mean + half)], 0, 100)
            np.testing.assert_allclose(bar["ends"], ends, atol=0.01)
    assert len(Reader(text).of_class("bar")) == len(Reader(text).of_class("mean")) == 4


def test_confusion_matrices_are_those_of_all_seeds(text, report):
    embedded = json.loads(Reader(text).data)["matrices"]
    for row, matrix in zip(report[1], embedded, strict=True):
        expected = sum(np.array(run.evaluation["confusion_matrix"]) for run in row.runs)
        np.testing.assert_array_equal(matrix["counts"], expected)


def test_an_images_own_score_is_that_of_metrics():
    rng = np.random.default_rng(0)
    matrices = rng.integers(0, 9, (6, 3, 3))
    matrices[0, 2] = matrices[0, :, 2] = 0  # a class that is nowhere
    matrices[1] = 0  # an image without a valid pixel
    expected = [metrics.summarize(matrix)["mean_iou"] for matrix in matrices[[0, 2, 3, 4, 5]]]
    scores = metrics.image_mean_ious(matrices)
    np.testing.assert_allclose(np.delete(scores, 1), expected)
    assert np.isnan(scores[1])


def test_the_gallery_has_the_worst_images_of_the_first_row(report, pictures):
    assert len(pictures["images"]) == 4
    with np.load(report[1][0].runs[0].folder / "evaluation_test.npz") as kept:
        scores = metrics.image_mean_ious(kept["confusion_matrices"])
        names = kept["names"]
    worst = np.argsort(scores)[:4]
    assert [image["name"] for image in pictures["images"]] == names[worst].tolist()
    assert pictures["rows"][0]["scores"] == scores[worst].tolist()
    assert [row["label"] for row in pictures["rows"]] == [f"1: {NASTY}", "2: dice"]


def test_pictures_are_bounded_and_show_what_they_say(folder, report, pictures):
    source = data.open_dataset("folder", str(folder.parent / "data"), "test")
    palette = class_colors.palette_of(source)
    for k, image in enumerate(pictures["images"]):
        i = source.names.index(image["name"])
        label = source[i]["label"]
        shown = {"input": decode(image["input"]), "truth": decode(image["truth"])}
        for row in pictures["rows"]:
            shown["prediction"], shown["errors"] = (
                decode(row[name][k]) for name in ("predictions", "errors")
            )
            assert len({picture.size for picture in shown.values()}) == 1
            assert max(shown["input"].size) == min(drawing.LONGEST, max(label.shape))
            if max(label.shape) > drawing.LONGEST:
                continue
            run = report.rows[row["row"]].runs[0]
            (guess,) = class_maps.read(run.folder / "evaluation_test.zip", [i])
            guess = np.where(label == 255, 255, guess)
            for name, classes in (("truth", label), ("prediction", guess)):
                picture = np.asarray(shown[name].convert("RGB"))
                np.testing.assert_array_equal(picture, class_colors.colorize(classes, palette))
            marked = np.asarray(shown["errors"].convert("RGBA"))
            for color, where in (
                (class_colors.WRONG_COLOR, guess != label),
                (class_colors.IGNORED_COLOR, label == 255),
            ):
                marked_there = (marked == [*color, 255]).all(axis=-1)
                np.testing.assert_array_equal(marked_there, where)
            assert (marked[..., 3] == 0).sum() == (guess == label)[label != 255].sum()


def test_without_the_data_there_are_only_predictions_and_the_page_says_why(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "runs")
    for path in (tmp_path / "runs").rglob("evaluation_test.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"root": "/elsewhere"}))
    rows = build(tmp_path / "runs", "test").rows
    built = gallery.build(rows, 12)
    assert "Only predictions are shown, since the data is not here: /elsewhere" in built["about"]
    assert all(image["input"] is None for image in built["images"]) and len(built["images"]) == 5
    assert all(error is None for row in built["rows"] for error in row["errors"])


def test_other_data_in_the_same_place_is_not_shown_as_the_truth(tmp_path):
    write_dataset(tmp_path / "data")
    write_runs(tmp_path / "runs", tmp_path / "data")
    path = next((tmp_path / "data/labels/test").iterdir())
    with Image.open(path) as label:
        label.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)
    assert gallery.build(build(tmp_path / "runs", "test").rows, 5)["images"][0]["truth"]
    with Image.open(path) as label:
        label.point(lambda value: min(value, 1)).save(path)  # what was ignored no longer is
    built = gallery.build(build(tmp_path / "runs", "test").rows, 5)
    assert "now holds other images" in built["about"] and built["images"][0]["truth"] is None


@pytest.mark.parametrize("ending", ["npz", "zip"])
def test_rows_without_predictions_are_named(folder, tmp_path, ending):
    shutil.copytree(folder, tmp_path / "runs")
    rows = build(tmp_path / "runs", "test").rows
    gone, cut_off = (run.folder / f"evaluation_test.{ending}" for run in rows[0].runs)
    gone.unlink()
    cut_off.write_bytes(b"cut off")
    built = gallery.build(rows, 12)
    assert [row["row"] for row in built["rows"]] == [1]
    assert "Without predictions of these images: row 1." in built["about"]


@pytest.mark.parametrize("ending", ["npz", "zip"])
@pytest.mark.parametrize("cut", [0, 0.5, None])
def test_damaged_predictions_of_a_row_leave_the_others(folder, tmp_path, ending, cut):
    """cut: how much is there; None: all, but for one bit of what is compressed."""
    shutil.copytree(folder, tmp_path / "runs")
    for path in (tmp_path / "runs").glob(f"run00/evaluation_test.{ending}"):
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 1
        path.write_bytes(content if cut is None else content[: int(cut * len(content))])
    report = build(tmp_path / "runs", "test")
    assert gallery.build(report.rows, 3) and dict(figures.draw(report))


def test_runs_that_were_not_evaluated_have_a_page(folder):
    report = build(folder)
    assert gallery.build(report[1], 12) is None
    text = page.to_html("results", report, None)
    assert "python -m dense_jax.evaluate" in text and 'id="images"' not in text


@pytest.fixture
def opened(browser, text, tmp_path):
    """The page as a file, 1400 pixels wide."""
    path = tmp_path / "report.html"
    path.write_text(text, encoding="utf-8")
    browser.set_window_size(1400, 900)
    browser.get(path.as_uri())
    yield browser
    assert browser.get_log("browser") == []
    assert browser.title == "results"  # NASTY would set it


def css(browser, selector):
    return browser.find_elements("css selector", selector)


def test_browser_shows_all_and_fits(opened, report):
    assert len(css(opened, "#scores tbody tr")) == 2
    assert len(css(opened, ".plot polyline")) == 2
    cells = [cell.text for cell in css(opened, "#matrix tbody td")]
    counts = sum(np.array(run.evaluation["confusion_matrix"]) for run in report.rows[0].runs)
    percent = 100 * counts / counts.sum(axis=1, keepdims=True)
    assert cells == [f"{p:.0f}" for p in percent.ravel()]
    assert [figure.text for figure in css(opened, "figcaption")] == [
        image["name"] for image in gallery.build(report[1], 4)["images"]
    ]
    for width in (1400, 400):
        opened.set_window_size(width, 900)
        assert opened.execute_script(
            "const page = document.documentElement; return page.scrollWidth <= page.clientWidth"
        )


def test_browser_follows_clicks(opened, pictures):
    first = css(opened, ".pair span")[0]
    assert first.text == f"1: mean IoU {pictures['rows'][0]['scores'][0]:.3f}"
    css(opened, "#left option")[1].click()
    scores = sorted(pictures["rows"][1]["scores"])
    texts = [span.text for span in css(opened, ".pair span")[::2]]
    assert texts == [f"2: mean IoU {score:.3f}" for score in scores]  # its worst come first
    before = css(opened, "#matrix")[0].text
    css(opened, "#matrix-row option")[1].click()
    assert css(opened, "#matrix")[0].text != before


def test_browser_follows_the_keyboard(opened):
    slider = css(opened, "#images input")[0]
    assert slider.get_attribute("aria-valuetext") == "prediction"
    keys = {"end": "\ue010", "left": "\ue012", "tab": "\ue004"}
    views = {"end": ("errors", 1), "left": ("prediction and errors", 0.5)}
    for key, (view, opacity) in views.items():
        slider.send_keys(keys[key])
        assert slider.get_attribute("aria-valuetext") == view
        layers = css(opened, ".layers")[0].find_elements("css selector", ":scope > div")
        assert [float(layer.value_of_css_property("opacity")) for layer in layers] == [
            *(1, 1, 1),
            opacity,
        ]
    css(opened, "body")[0].send_keys(keys["tab"])
    opened.execute_script("document.querySelectorAll('tr[data-row]')[1].focus()")
    lit = {element.get_attribute("data-row") for element in css(opened, ".lit")}
    assert lit == {"1"} and len(css(opened, ".bar.lit")) == 2
    assert css(opened, ".bar:not(.lit)")[0].value_of_css_property("opacity") == "0.2"


def test_browser_follows_the_mouse_and_the_color_scheme(opened):
    webdriver = pytest.importorskip("selenium.webdriver")
    row = css(opened, "tr[data-row]")[1]
    webdriver.ActionChains(opened).move_to_element(row).perform()
    assert len(css(opened, "g.lit")) == 1
    background = {
        opened.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )
        or css(opened, "body")[0].value_of_css_property("background-color")
        for scheme in ("light", "dark")
    }
    assert len(background) == 2
