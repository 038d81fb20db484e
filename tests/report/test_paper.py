"""Tests the tables as a paper needs them: order, names, digits, few seeds, tests and captions."""

import csv
import io
import re
import shutil
import subprocess

import numpy as np
import pytest
import scipy.stats
from etils import epath

from dense_jax.report import page, tables
from dense_jax.report.__main__ import write
from dense_jax.report.rows import Style, build
from dense_jax.sweep import grid, plan
from tests.report.reported import score_csv
from tests.report.test_over_images import add_rows
from tests.report.test_tables import EVALUATION, add

NASTY = "50% & $x_1$ #{~^\\}|<>"


def remember(root, overrides):
    """Writes the sweep.json of a sweep. Returns the runs by name."""
    runs = dict(zip(plan.run_names(overrides), overrides, strict=True))
    plan.remember(epath.Path(root), {"config": "x.py", "flags": {}, "runs": runs})
    return runs


def cells(table):
    return [[cell.text for cell in line] for line in table]


# Order


def test_rows_and_fields_are_in_the_order_of_the_sweep(tmp_path):
    axes = {"model.upsampling": ["nearest", "bilinear"], "loss": ["soft_dice", "ce"]}
    for name, run in remember(tmp_path, grid(seed=[0, 1, 10], **axes)).items():
        model = {"upsampling": run["model.upsampling"]}  # behind the loss in config.json
        add(tmp_path, name, loss=run["loss"], seed=run["seed"], model=model)
    report = build(tmp_path)
    assert report.fields == ["model.upsampling", "loss"]
    expected = [["nearest", "soft_dice"], ["nearest", "ce"]]
    expected += [["bilinear", "soft_dice"], ["bilinear", "ce"]]
    assert [row.label for row in report.rows] == expected
    assert [row.is_baseline for row in report.rows] == [True, False, False, False]
    assert [len(row.runs) for row in report.rows] == [3] * 4

    # Neither a run that failed nor a row that was added later changes it.
    (tmp_path / "upsampling=nearest,loss=soft_dice,seed=0" / "result.json").unlink()
    added = grid(seed=[0, 1, 10], **axes | {"loss": ["focal", "soft_dice", "ce"]})
    shutil.rmtree(tmp_path / "upsampling=nearest,loss=ce,seed=0")
    remember(tmp_path, added)
    assert [row.label for row in build(tmp_path).rows] == expected
    add(tmp_path, "z", loss="a", model={"upsampling": "a"})  # of no sweep
    assert [row.label for row in build(tmp_path).rows] == [*expected, ["a", "a"]]


def test_the_seeds_of_one_process_have_the_place_of_their_run(tmp_path):
    runs = remember(tmp_path / "sweep", [{"loss": loss} for loss in ("c", "a", "b")])
    for name, run in runs.items():
        for seed in (0, 1):
            add(tmp_path / "sweep", f"{name}/seed={seed}", **run, seed=seed)
    for root in (tmp_path, tmp_path / "sweep"):
        assert [row.label for row in build(root).rows] == [["c"], ["a"], ["b"]]


# Columns, names and digits


def test_columns_are_chosen_and_ordered(tmp_path):
    evaluation = EVALUATION | {"eval/iou/sky": 0.5, "eval/dice/sky": 0.625}
    evaluation |= {"eval/mean_hausdorff95": 12.5}
    add(tmp_path, "a", files={"evaluation_test": evaluation}, loss="a")
    chosen = ["dice/sky", "mean_hausdorff95", "mean_boundary_f1", "mean_iou"]
    report = build(tmp_path, "test", columns=chosen, percent=True)
    head, line = cells(tables.score_table(report))
    assert head[1:5] == [
        *("Dice sky (%)", "mean Hausdorff 95 (pixels)"),
        *("mean boundary F1 (%)", "mean IoU (%)"),
    ]
    assert line[1:5] == ["62.5", "12.5", "75.0", "25.0"]
    with_classes = build(tmp_path, "test", columns=["mean_iou"], per_class=True)
    assert [column.name for column in with_classes.columns] == ["mean_iou", "iou/sky"]
    with pytest.raises(
        ValueError, match=r"no score 'mean_io' among mean_iou, .*did you mean 'mean_iou'"
    ):
        build(tmp_path, "test", columns=["mean_io"])


def test_names_change_in_every_format_and_paths_do_not(tmp_path):
    for loss in ("soft_dice", "ce"):
        add(tmp_path, loss, loss=loss, model={"skips": [16, 8] if loss == "ce" else [4]})
    names = ["soft_dice=Dice", "skips=Skips", "16, 8=two", "mean_iou=mIoU", "folder=Streets"]
    baseline = "loss=soft_dice,skips=4"
    report = build(tmp_path, names=names, baseline=baseline)
    assert report.fields == ["loss", "Skips"]
    assert [row.label for row in report.rows] == [["ce", "two"], ["Dice", "4"]]
    for text in (tables.to_markdown(report), tables.to_latex(report), page.to_html("x", report)):
        assert "mIoU" in text and "Skips" in text and "mean IoU" not in text.split("Scores")[0]
    rows = list(csv.DictReader(io.StringIO(score_csv(report))))
    assert rows[1]["Skips"] == "4" and rows[1]["eval/mean_iou"] == "0.5"
    assert tables.caption_to_latex(report).startswith("Scores on Streets, split val ")
    for wrong, error in (("soft_dic=D", "no 'soft_dic'; did you mean 'soft_dice'"), ("x", "OLD=")):
        with pytest.raises(ValueError, match=error):
            build(tmp_path, names=[wrong])


@pytest.mark.parametrize(
    ("style", "value", "unit", "shown"),
    [
        (Style(), 0.12345, "", "0.123"),
        (Style(4), 0.12345, "", "0.1235"),
        (Style(1, percent=True), 0.12345, "", "12.3"),
        (Style(0, percent=True), 0.99, "", "99"),
        (Style(1, percent=True), 3.25, "pixels", "3.2"),
        (Style(), -0.5, "", "−0.500"),
        (Style(), -0.0001, "", "0.000"),
        (Style(), np.nan, "", "–"),
    ],
)
def test_scores_have_the_digits_and_unit_that_were_asked_for(style, value, unit, shown):
    assert style.score(value, unit) == shown


def test_percent_is_for_readers_and_csv_keeps_fractions(tmp_path):
    for seed in range(3):
        add(tmp_path, f"a{seed}", 0.5 + seed / 16, loss="a", seed=seed)
        add(tmp_path, f"b{seed}", 0.75, loss="b", seed=seed)
    report = build(tmp_path, percent=True)
    assert score_csv(report) == score_csv(build(tmp_path))
    head, first, second = cells(tables.score_table(report))
    assert head[1] == "mean IoU (%)"
    half = 100 * scipy.stats.t.ppf(0.975, 2) / 16 / np.sqrt(3)
    assert (first[1], second[1]) == (f"56.2 ± {half:.1f}", "75.0 ± 0.0*")
    head, line = cells(tables.seed_table(report))
    assert head[1] == "mean IoU (points)" and line[1].startswith("+18.8 (p = 0.0")
    assert ">56.2<" in page.to_html("x", report)


# Few seeds


def test_fewer_than_three_seeds_are_shown_instead_of_an_interval(tmp_path):
    scores = {"one": [0.5], "two": [0.9, 0.3], "three": [0.5, 0.6, 0.7]}
    for loss, values in scores.items():
        for seed, score in enumerate(values):
            add(tmp_path, f"{loss}-{seed}", score, loss=loss, seed=seed)
    report = build(tmp_path, columns=["mean_iou"])
    shown = {line[0]: line[1] for line in cells(tables.score_table(report))}
    assert (shown["one"], shown["two"]) == ("0.500", "0.600 (0.900, 0.300)")
    assert shown["three"].startswith("0.600 ± 0.248")
    sentence = "Rows with fewer than three seeds have no interval"
    texts = tables.to_markdown(report), tables.to_latex(report), page.to_html("x", report)
    for text in (*texts, tables.caption_to_latex(report)):
        assert sentence in text
    rows = {row["loss"]: row for row in csv.DictReader(io.StringIO(score_csv(report)))}
    assert rows["two"]["eval/mean_iou/seeds"] == "0.9 0.3"
    halves = [rows[loss]["eval/mean_iou/half_interval"] != "" for loss in scores]
    assert halves == [False, False, True]

    for name in ("one-0", "two-0", "two-1"):
        shutil.rmtree(tmp_path / name)
    assert sentence not in tables.to_markdown(build(tmp_path))


# Tests


def test_every_format_has_differences_and_p_values_over_seeds(tmp_path):
    values = {"a": [0.5, 0.55, 0.61], "b": [0.7, 0.74, 0.82], "c": [0.49, 0.55, 0.6]}
    for loss, scores in values.items():
        for seed, score in enumerate(scores):
            add(tmp_path, f"{loss}-{seed}", score, loss=loss, seed=seed)
    paths = {path.name: path for path in write(tmp_path, columns=["mean_iou"])}
    raw = [scipy.stats.ttest_rel(values[loss], values["a"]).pvalue for loss in "bc"]
    p_values = [2 * raw[0], raw[1]]
    differences = [np.mean(np.subtract(values[loss], values["a"])) for loss in "bc"]
    rows = list(csv.DictReader(io.StringIO(paths["report.csv"].read_text())))
    for key, expected in (("difference", differences), ("p_value", p_values)):
        found = [float(row[f"eval/mean_iou/{key}"]) for row in rows[1:]]
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        assert rows[0][f"eval/mean_iou/{key}"] == ""
    shown = [
        f"{difference:+.3f} (p = {p_value:.4f}{'*' * bool(p_value < 0.05)})".replace("-", "−")
        for difference, p_value in zip(differences, p_values, strict=True)
    ]
    for name in ("report.md", "report.html", "report_seeds.tex"):
        text = paths[name].read_text().replace("\\*", "*").replace("$-$", "−")
        assert all(cell in text for cell in shown), name


def test_one_seed_shows_its_differences_and_the_tests_over_images_in_every_format(tmp_path):
    add_rows(tmp_path, seeds=[0], a=0.6, b=0.8)
    paths = {path.name: path for path in write(tmp_path, split="test", columns=["mean_iou"])}
    texts = {
        name: path.read_text()
        for name, path in paths.items()
        if path.suffix != ".png" and path.suffix != ".pdf"
    }
    (row,) = csv.DictReader(io.StringIO(texts["report_images.csv"]))
    assert row["num_seeds"] == "1" and 0 < float(row["p_value"]) < 0.05
    assert 0 < float(row["low"]) < float(row["difference"]) < float(row["high"])
    difference = f"+{float(row['difference']):.3f}"
    for name in ("report.md", "report.html", "report_seeds.tex", "report_images.tex"):
        assert difference in texts[name], name
        assert "nan" not in texts[name].lower().replace("finance", "")
    assert texts["report.md"].index("Tests over seeds") < texts["report.md"].index("over images")


# LaTeX


def is_balanced(text):
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text.replace("\\\\", "")):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


@pytest.fixture
def written(tmp_path):
    """The files of a report whose names hold all that LaTeX reads as a command."""
    for loss, score in ((NASTY, 0.5), ("b_[2pt]", 0.75), ("*", -0.25)):
        for seed in range(3):
            data = {"name": NASTY, "eval_split": "v_%"}
            add(
                tmp_path,
                f"{ord(loss[0])}-{seed}",
                score + seed / 64,
                loss=loss,
                seed=seed,
                data=data,
            )
    paths = write(tmp_path, percent=True, names=[f"mean_iou={NASTY}"])
    return {path.name: path for path in paths if path.suffix == ".tex"}


@pytest.mark.parametrize("name", ["report", "report_seeds", "report_images", "report_cost"])
def test_latex_is_well_formed(written, name):
    lines = written[f"{name}.tex"].read_text().splitlines()
    code = [line for line in lines if not line.startswith("%")]
    text = "\n".join(code)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    assert is_balanced(text)
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1]
    for line in code[1:-2]:  # the rows, of which the first has the rules
        assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1
        assert line.endswith(r"\\ \midrule" if "toprule" in line else r" \\")
        assert not re.search(r"(?<!\\)[%#_^~]", line) and line.count("$") % 2 == 0
    assert text.isascii()


def test_the_caption_says_what_the_table_shows(written):
    caption = written["report_caption.tex"].read_text()
    assert caption.endswith("%\n") and is_balanced(caption) and "\n" not in caption[:-1]
    plain = caption.replace("\\", "")
    assert "split v_% (unknown images), of the final checkpoint. Means over n = 3 seeds" in plain
    assert r"$\pm$ is the half width of the 95 \% t-interval over the seeds" in caption
    assert (
        "Bold: the best mean of a column." in caption and "p \\textless{} 0.05 against" in caption
    )
    assert not re.search(r"(?<!\\)[#_&%]", caption[:-2])


def test_the_caption_of_an_evaluation(tmp_path):
    for name, seeds in (("a", range(3)), ("b", range(2))):
        for seed in seeds:
            files = {"evaluation_test": EVALUATION}
            add(tmp_path, f"{name}{seed}", files=files, loss=name, seed=seed)
    caption = tables.caption_to_latex(build(tmp_path, "test"))
    assert caption.startswith(
        "Scores on folder, split test (7 images), of the best checkpoint. Means over n = 2 to 3 "
        r"seeds; $\pm$ is the half width of the 95 \% t-interval over the seeds. Rows with fewer "
        "than three seeds have no interval; the scores of two seeds are in parentheses. "
    )
    assert "against" not in caption  # nothing is significant


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_pdflatex_compiles_the_tables_as_they_are(written):
    folder = written["report.tex"].parent
    inputs = "".join(
        rf"\begin{{table}}\input{{{path.stem}}}\caption{{\protect\input{{report_caption}}}}"
        r"\end{table}"
        for path in written.values()
        if path.stem != "report_caption"
    )
    head = r"\documentclass{article}\usepackage{booktabs}\begin{document}"
    (folder / "paper.tex").write_text(rf"{head}{inputs}\end{{document}}")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "paper"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
