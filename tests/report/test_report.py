"""Tests the numbers in reports against NumPy and SciPy, and how each format escapes names."""

import csv
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
import scipy.stats

from dense_jax.evaluation.tables import escape
from dense_jax.report import page, reading, statistics, tables
from dense_jax.report.__main__ import write
from dense_jax.report.rows import build
from dense_jax.report.tables import Cell
from tests.report.reported import cost_csv, score_csv


def add_run(root, name, scores, *, status="finished", num_parameters=1000, **config):
    """Writes a workdir; `scores` are final mean IoUs, from which the curve and the rest follow."""
    folder = root / name
    folder.mkdir(parents=True)
    nested = {"seed": 0, "num_steps": 20, "loss": "dice", **config}
    (folder / "config.json").write_text(json.dumps(nested))
    lines = [{"step": 10, "eval/mean_iou": scores / 2}, {"step": 20, "eval/mean_iou": scores}]
    lines.insert(1, {"step": 15, "train/loss": 1.0})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 2')
    if status:
        final = {"step": 20, "eval/mean_iou": scores, "eval/mean_dice": scores + 0.1}
        final |= {"eval/pixel_accuracy": 0.9, "eval/mean_accuracy": None, "eval/iou/a": scores}
        result = {"status": status, "num_parameters": num_parameters, "final": final}
        (folder / "result.json").write_text(json.dumps({**result, "best": {"step": 10}}))


def read_csv(root):
    return list(csv.DictReader(io.StringIO(score_csv(build(root)))))


@pytest.mark.parametrize("values", [[0.71, 0.74, 0.69], [0.1, 0.1, 0.4, 0.9, 0.2]])
def test_interval_is_scipys(values):
    mean, half = statistics.interval(values)
    low, high = scipy.stats.t.interval(
        0.95, len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values)
    )
    np.testing.assert_allclose([mean - half, mean + half], [low, high], rtol=1e-12)


def test_two_seeds_are_the_ends_of_their_interval():
    mean, half = statistics.interval([0.6, 0.9])
    np.testing.assert_allclose([mean - half, mean + half], [0.6, 0.9])
    assert str(statistics.interval([0.6])) == "(0.6, nan)"


def test_a_label_stands_for_the_fields_that_follow_from_it(tmp_path):
    for label, skips in (("FCN-8s", [16, 8]), ("FCN-32s", [])):
        for balanced in (True, False):
            name, model = f"{label}-{balanced}", {"skips": skips}
            add_run(tmp_path, name, 0.5, label=label, model=model, balanced=balanced)
    fields, rows, *_ = build(tmp_path)
    assert sorted(fields) == ["balanced", "label"] and len(rows) == 4
    add_run(tmp_path, "other", 0.5, label=None, model={"skips": [8]}, balanced=True)
    assert sorted(build(tmp_path)[0]) == ["balanced", "label", "model.skips"]


def test_rows_are_configs_and_cells_are_means_over_seeds(tmp_path):
    values = {"dice": [0.5, 0.6, 0.58], "focal": [0.4, 0.44, 0.47]}
    for loss, scores in values.items():
        for seed, score in enumerate(scores):
            name = f"{loss}-{seed}"
            add_run(tmp_path, name, score, loss=loss, seed=seed, log_every=seed + 1)
    rows = read_csv(tmp_path)
    assert [row["loss"] for row in rows] == ["dice", "focal"]
    assert "seed" not in rows[0] and "log_every" not in rows[0] and "num_steps" not in rows[0]
    for row in rows:
        expected = np.array(values[row["loss"]])
        half = 4.302652729911275 * expected.std(ddof=1) / math.sqrt(3)  # t(0.975, 2)
        np.testing.assert_allclose(float(row["eval/mean_iou"]), expected.mean(), rtol=1e-12)
        np.testing.assert_allclose(float(row["eval/mean_iou/half_interval"]), half, rtol=1e-9)
        assert row["num_seeds"] == "3"
        assert row["eval/mean_accuracy"] == ""  # null: no number, rather than zero or NaN


def test_one_seed_has_no_interval_and_the_best_is_bold(tmp_path):
    add_run(tmp_path, "a", 0.5, loss="dice")
    add_run(tmp_path, "b", 0.75, loss="focal")
    shown = ["mean_iou", "mean_dice", "pixel_accuracy", "mean_accuracy"]
    report = build(tmp_path, columns=shown)
    markdown = tables.to_markdown(report)
    assert "| dice | 0.500 | 0.600 |" in markdown
    assert "| focal | **0.750** | **0.850** | **0.900** | – | 1 |" in markdown
    assert r"focal & \textbf{0.750}" in tables.to_latex(report)
    assert "<b>0.750</b>" in page.to_html("x", report)
    assert "±" not in markdown.split("Scores")[0]


def test_fields_sort_as_a_reader_expects(tmp_path):
    for i, skips in enumerate([[16, 8], [], [16]]):
        for steps in (100, 20):
            name = f"{i}-{steps}"
            add_run(tmp_path, name, 0.5, model={"skips": skips}, num_steps=steps)
    labels = [(row["num_steps"], row["model.skips"]) for row in read_csv(tmp_path)]
    skips = ["none", "16", "16, 8"]
    assert labels == [(steps, skip) for steps in ("20", "100") for skip in skips]


def test_a_field_that_only_some_configs_have_is_shown(tmp_path):
    add_run(tmp_path, "a", 0.5, loss_options={})
    add_run(tmp_path, "b", 0.6, loss_options={"per": "image"})
    assert {row["loss_options.per"] for row in read_csv(tmp_path)} == {"–", "image"}


def test_unfinished_and_failed_runs_are_named_and_never_counted(tmp_path):
    add_run(tmp_path, "a", 0.5, seed=0)
    add_run(tmp_path, "b", 0.9, seed=1, status=None)
    add_run(tmp_path, "c", 0.9, seed=2, status="failed: loss is NaN at step 7")
    add_run(tmp_path, "d", 0.9, seed=3)
    (tmp_path / "d" / "config.json").write_text("{")
    report = fields, rows, notes, *_ = build(tmp_path)
    assert fields == ["run"]
    assert [run.name for row in rows for run in row.runs] == ["a"]
    assert notes == [
        "b: unfinished, at step 20 of 20",
        "c: failed: loss is NaN at step 7",
        "d: its config.json cannot be read",
    ]
    for text in (tables.to_markdown(report), page.to_html("x", report)):
        assert all(note in text for note in notes)


def test_the_same_seed_twice_does_not_narrow_the_interval(tmp_path):
    add_run(tmp_path, "a", 0.5, seed=0)
    add_run(tmp_path, "copy", 0.5, seed=0)
    _, (row,), notes, *_ = build(tmp_path)
    assert len(row.runs) == 1
    assert notes == ["copy: left out, it repeats the config and seed of a"]


def test_the_workdir_may_be_one_run(tmp_path):
    add_run(tmp_path, "only", 0.5)
    assert [row["run"] for row in read_csv(tmp_path / "only")] == ["only"]


def test_curves_survive_a_restart_and_a_crash(tmp_path):
    add_run(tmp_path, "a", 0.5)
    path = tmp_path / "a" / "metrics.jsonl"
    path.write_text('{"step": 20, "eval/mean_iou": 0.4}\n{"st\n' + path.read_text())
    assert reading.read_curve(path) == (20, [(10, 0.25), (20, 0.5)])


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 400.0), (0.83, 0.871), (0.5, 0.5), (0.0, 4e4), (0.0, 1.0), (0.999, 1.0)]
)
def test_ticks_cover_the_values_with_few_round_numbers(low, high):
    ticks = page.ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high
    assert 2 <= len(ticks) <= 6
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0])


NASTY = [
    "<script>alert(1)</script>",
    "a|b",
    "50% & $x_1$ #{~^\\}",
    "*bold* _it_ [x](y) `c`",
    "ü\nn",
]


class Reader(html.parser.HTMLParser):
    """Collects the tags and texts that a browser would see."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts = set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("nasty", NASTY)
def test_nasty_names_stay_text(tmp_path, nasty):
    add_run(tmp_path, "a", 0.5, loss=nasty)
    add_run(tmp_path, "b", 0.6, loss="dice")
    report = build(tmp_path)._replace(notes=[nasty])

    reader = Reader()
    reader.feed(page.to_html(nasty, report))
    assert "alert(1)" not in reader.texts
    # Title, heading, cells of three tables, curve, note; and the test, if it is not the baseline.
    assert reader.texts.count(nasty) == 7 + (report.rows[0].name != nasty)

    table = tables.to_markdown(report).splitlines()[:4]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {
        len(report.fields) + len(report.columns) + 2  # seeds, and the end of the line
    }

    body = tables.to_latex(report).split("midrule\n")[1].splitlines()
    assert len(body) == 4  # two rows, \bottomrule, \end
    cell = next(line for line in body if "0.500" in line).split(" & 0.500")[0]
    assert not re.search(r"(?<!\\)[#%&_$]", cell)


@pytest.mark.parametrize("name", ["[2pt] x", "*", "[b"])
def test_a_name_is_no_option_of_the_latex_line_before_it(name):
    table = [[Cell("field"), Cell("score")], [Cell(name), Cell("0.5")]]
    for upside_down in (table, table[::-1]):
        text = tables.latex_table(upside_down, 1, [])
        assert name in text and not re.search(r"(\\\\|\\toprule|\\midrule)\s*[\[*]", text)


@pytest.mark.parametrize("name", ["=cmd|'/C calc'!A0", "+1+1", "-2+3", "@SUM(1)", "\t=1"])
def test_a_name_is_no_formula_of_a_spreadsheet_and_a_number_stays_one(tmp_path, name):
    for i, loss in enumerate((name, -0.5, "+1e-3")):
        add_run(tmp_path, f"{i}", -0.25 * i, loss=loss)
    for file in (
        score_csv(build(tmp_path)),
        cost_csv(build(tmp_path)),
    ):
        rows = list(csv.reader(io.StringIO(file, newline="")))
        assert {row[0] for row in rows} == {"loss", f"'{name}", "-0.5", "+1e-3"}
    assert "-0.5" in {row["eval/mean_iou"] for row in read_csv(tmp_path)}


def test_no_character_hides_or_turns_others_around(tmp_path):
    hidden = "a\0b\r\u202etxt.exe\u2066\ud800"
    add_run(tmp_path, "x\u202ey", 0.5, loss=hidden, status="failed")
    add_run(tmp_path, "b", 0.6, loss=hidden)
    add_run(tmp_path, "c", 0.7, **{hidden: 1})
    for path in write(tmp_path):
        if path.suffix not in (".png", ".pdf"):
            text = path.read_bytes().decode()
            assert not re.search("[\0\r\u202e\u2066\ud800]", text)
            if path.name != "report_caption.tex":  # it does not name the rows
                assert r"\u202etxt.exe" in text.replace("textbackslash{}", "")
    assert r"x\u202ey: failed" in (tmp_path / "report.html").read_text()


def test_latex_and_markdown_escapes():
    assert tables.latex("a_b\\~^") == (r"a\_b\textbackslash{}\textasciitilde{}\textasciicircum{}")
    assert tables.latex("0.5 ± 0.1") == r"0.5 $\pm$ 0.1"
    assert escape("bed_of_nails *x* _y_") == r"bed_of_nails \*x\* \_y\_"


def test_the_page_is_self_contained(tmp_path):
    add_run(tmp_path, "a", 0.5)
    html = page.to_html("x", build(tmp_path))
    assert "<polyline" in html and "prefers-color-scheme: dark" in html
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html)


def test_a_report_without_a_finished_run_is_an_empty_table_and_a_note(tmp_path):
    with pytest.raises(
        ValueError, match=f"no runs in {tmp_path}: no folder in it has a config.json"
    ):
        write(tmp_path)
    add_run(tmp_path, "a", 0.5, status=None)
    assert {path.name for path in write(tmp_path)} == {
        *(f"report.{ending}" for ending in ("html", "md", "csv", "tex", "json")),
        *(f"report_{table}.{ending}" for table in ("cost", "images") for ending in ("csv", "tex")),
        *("report_caption.tex", "report_seeds.tex"),
    }
    assert "no finished run yet" in (tmp_path / "report.html").read_text()
    assert "a: unfinished, at step 20 of 20" in (tmp_path / "report.md").read_text()
