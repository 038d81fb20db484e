"""Tests which runs a table may contain, its statistical tests, its costs and its manifest."""

import csv
import hashlib
import io
import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest
import scipy.stats

from dense_jax.report import manifest, page, statistics, tables
from dense_jax.report.__main__ import write
from dense_jax.report.rows import build
from tests.report.reported import cost_csv, score_csv
from tests.report.test_report import NASTY, add_run

FINGERPRINT, OTHER = "a" * 64, "b" * 64
DATASET = {"class_names": ["sky", "road"], "fingerprint": FINGERPRINT}
EVALUATION = {
    "dataset": "folder",
    "dataset_fingerprint": OTHER,
    "split": "test",
    "step": 10,  # that of the best checkpoint
    "num_images": 7,
    "num_pixels": 700,
    "resolution": "the labels' own",
    "tile_size": [96, 96],
    "margin": [0, 0],
    "class_names": ["sky", "road"],
    "confusion_matrix": [[300, 50], [50, 300]],
    "eval/mean_iou": 0.25,
    "eval/mean_over_images/mean_boundary_f1": 0.75,
    "eval/mean_boundary_iou": 0.5,
}


def add(root, name, score=0.5, files=None, *, status="finished", **config):
    """A run of `add_run` with more files: {name without ending: object, or text as it stands}."""
    data = {"name": "folder", "root": "/data", "train_split": "train", "eval_split": "val"}
    config["data"] = data | config.get("data", {})
    add_run(root, name, score, status=status, **config)
    for stem, content in {"dataset": DATASET, **(files or {})}.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (root / name / f"{stem}.json").write_text(text)


def add_scores(root, **of_rows):
    """A run for each loss and seed, of the mean IoUs given by seed."""
    for loss, of_seeds in of_rows.items():
        for seed, score in of_seeds.items():
            add(root, f"{loss}-{seed}", score, loss=loss, seed=seed)


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


# Statistics


@pytest.mark.parametrize("n", [2, 3, 8])
def test_the_paired_test_is_scipys(n):
    values, others = np.random.default_rng(n).uniform(size=(2, n)).tolist()
    expected = scipy.stats.ttest_1samp(np.subtract(values, others), 0).pvalue
    np.testing.assert_allclose(statistics.paired_p_value(values, others), expected, rtol=1e-9)


def test_the_paired_test_by_hand():
    # d = 1, 2, 3: mean 2, s = 1, t = 2 sqrt(3); with 2 degrees of freedom p = 1 - t / sqrt(2 + t^2).
    t = 2 * math.sqrt(3)
    p = statistics.paired_p_value([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    np.testing.assert_allclose(p, 1 - t / math.sqrt(2 + t**2), rtol=1e-12)


@pytest.mark.parametrize("shift", [0.1, -1e-3])
def test_equal_differences_have_the_limits_p(shift):
    values = [0.5, 0.61, 0.7]
    shifted = [value + shift for value in values]
    assert statistics.paired_p_value(values, values) == 1
    assert statistics.paired_p_value(shifted, values) == 0  # whatever rounding does
    assert statistics.paired_p_value([0.0, 0.0], [0.0, 0.0]) == 1
    assert math.isnan(statistics.paired_p_value([0.5], [0.6]))


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        # By hand: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04, which must not be less than the 0.06.
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.02, math.nan, 0.01], [0.02, math.nan, 0.02]),  # of two tests
        ([0.6, 0.9], [1, 1]),
        ([math.nan], [math.nan]),
        ([], []),
    ],
)
def test_holms_correction(p_values, corrected):
    np.testing.assert_allclose(statistics.holm(p_values), corrected, rtol=1e-12)


def test_rows_are_tested_against_the_first_over_the_seeds_they_share(tmp_path):
    first = {0: 0.50, 1: 0.55, 2: 0.61, 3: 0.58}
    better = {0: 0.70, 1: 0.74, 2: 0.82, 7: 0.10}
    same = {0: 0.51, 1: 0.53, 2: 0.62, 3: 0.57}
    add_scores(tmp_path, a=first, b=better, c=same, d={0: 0.9, 9: 0.9})
    a, b, c, d = read(score_csv(build(tmp_path)))
    raw = [
        scipy.stats.ttest_rel([row[s] for s in seeds], [first[s] for s in seeds]).pvalue
        for row, seeds in ((better, range(3)), (same, range(4)))
    ]
    assert raw[0] < raw[1]
    expected = [2 * raw[0], raw[1]]
    found = [float(row["eval/mean_iou/p_value"]) for row in (b, c)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert a["eval/mean_iou/p_value"] == d["eval/mean_iou/p_value"] == ""
    assert float(b["eval/pixel_accuracy/p_value"]) == 1  # 0.9 in all runs

    markdown = tables.to_markdown(build(tmp_path))
    marks = re.findall(r"^\| ([a-d]) \| \**([0-9.]+) [±(][^|*\\]*(\\\*)?", markdown, re.MULTILINE)
    assert [bool(mark) for _, _, mark in marks] == [False, True, False, False]
    assert "The baseline is loss=a." in markdown


def test_the_baseline_may_be_any_row(tmp_path):
    total = "focal + 3 * focal(gamma=1, class_weights=(1, 2))"
    for i, skips in enumerate([[16, 8], [16]]):
        for loss in ("dice", total):
            for seed in range(3):
                name = f"{i}-{len(loss)}-{seed}"
                add(tmp_path, name, 0.5 + 0.1 * seed, loss=loss, model={"skips": skips}, seed=seed)
    for wanted in (f"loss={total},model.skips=16, 8", f"skips=16,8,loss={total}"):
        _, rows, *_ = build(tmp_path, baseline=wanted)
        (label,) = (row.label for row in rows if row.is_baseline)
        assert sorted(label) == ["16, 8", total]
        assert [row.p_values.get("eval/mean_iou") == 1 for row in rows].count(True) == 3
    for wanted in ("loss=focal", "loss=none", "kips=16,loss=focal", "focal"):
        with pytest.raises(
            ValueError, match=r"must be one row, but is [02] of these:\n  loss=dice"
        ):
            build(tmp_path, baseline=wanted)


# Columns


def test_the_scores_of_a_split_are_those_of_its_evaluation(tmp_path):
    add(tmp_path, "a b", 0.5, {"evaluation_test": EVALUATION}, loss="dice")
    better = EVALUATION | {"eval/mean_iou": 0.5, "eval/mean_boundary_iou": None}
    add(tmp_path, "c", 0.5, {"evaluation_test": better}, loss="focal")
    add(tmp_path, "d e", 0.5, {"evaluation_test": '{"eval/mean_iou": 0.'}, loss="cut off")
    add(tmp_path, "f", 0.5, loss="not evaluated")
    add(tmp_path, "g", 0.5, {"evaluation_test": EVALUATION}, loss="unfinished", status=None)
    report = build(tmp_path, split="test")
    dice, focal = read(score_csv(report))
    assert [float(row["eval/mean_iou"]) for row in (dice, focal)] == [0.25, 0.5]
    assert float(dice["eval/mean_over_images/mean_boundary_f1"]) == 0.75
    assert (dice["eval/mean_boundary_iou"], focal["eval/mean_boundary_iou"]) == ("0.5", "")
    command = "python -m dense_jax.evaluate"
    assert report.notes == [
        f"d e: not evaluated on test; do it with: {command} '--workdir={tmp_path}/d e' --split=test",
        f"f: not evaluated on test; do it with: {command} --workdir={tmp_path}/f --split=test",
        "g: unfinished, at step 20 of 20",
    ]
    head = tables.score_table(report)[0]
    assert [cell.text for cell in head][-3:] == ["mean boundary F1", "mean boundary IoU", "seeds"]
    assert "split test (7 images), of the best checkpoint" in tables.to_markdown(report)

    # Training has no such columns.
    assert "boundary" not in str(tables.score_table(build(tmp_path)))


@pytest.mark.parametrize("nasty", NASTY)
def test_class_columns_on_request(tmp_path, nasty):
    add(tmp_path, "a", loss="dice")
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    result["final"] |= {f"eval/iou/{nasty}": 0.125, "eval/iou/void": None}
    (tmp_path / "a" / "result.json").write_text(json.dumps(result))
    assert "IoU a" not in str(tables.score_table(build(tmp_path)))

    report = build(tmp_path, per_class=True)
    head, line = ([cell.text for cell in line] for line in tables.score_table(report))
    classes = {name: cell for name, cell in zip(head, line, strict=True) if name.startswith("IoU")}
    assert classes == {"IoU a": "0.500", f"IoU {nasty}": "0.125", "IoU void": "–"}
    (row,) = read(score_csv(report))
    assert row[f"eval/iou/{nasty}"] == "0.125"

    lines = tables.to_markdown(report).splitlines()[:3]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    latex = tables.to_latex(report)
    assert latex.count("\n") == latex.count("\n%") + 6  # no name opens a line
    assert page.to_html("x", report).count("<script") == 2  # the page's own
    assert manifest.manifest(report)["rows"][0]["classes_without_score"] == ["void"]


# Costs


def test_costs_are_in_a_table_of_their_own(tmp_path):
    environment = {"device_kind": "cpu", "num_devices": 2}
    cost = {"flops_per_image": 2e9, "images_per_second": 30.0, "peak_bytes": 2**21}
    add(tmp_path, "a", 0.5, {"environment": environment, "cost": cost}, seed=0)
    cost |= {"images_per_second": 10.0, "peak_bytes": None}
    add(tmp_path, "b", 0.6, {"environment": environment, "cost": cost}, seed=1)
    add(tmp_path, "c", 0.6, seed=2)  # of an older version
    add(tmp_path, "d", 0.6, loss="other", num_parameters=None)
    report = build(tmp_path)
    body = [[cell.text for cell in line] for line in tables.cost_table(report)[1:]]
    assert body == [
        ["dice", "1,000", "2.00", "20.0", "2", "2 x cpu"],
        ["other", "–", "–", "–", "–", "–"],
    ]
    dice, other = read(cost_csv(report))
    assert (dice["images_per_second"], dice["num_parameters"]) == ("20.0", "1000")
    assert other["images_per_second"] == other["num_parameters"] == ""
    assert "2 x cpu" in page.to_html("x", report)


def test_the_score_csv_does_not_know_when_or_where_it_was_made(tmp_path):
    for machine, speed, root in (("m1", 10.0, "/a"), ("m2", 20.0, "/b")):
        for seed in range(2):
            files = {
                "cost": {"images_per_second": speed},
                "environment": {"git_commit": machine, "device_kind": machine},
            }
            for loss in ("dice", "focal"):
                config = {"seed": seed, "loss": loss, "data": {"root": root}}
                add(tmp_path / machine, f"x/{loss}-{seed}", 0.5 + seed / 7, files, **config)
        write(tmp_path / machine)
    first, second = (tmp_path / machine for machine in ("m1", "m2"))
    for name in ("report.csv", "report_cost.csv"):
        same = (first / name).read_bytes() == (second / name).read_bytes()
        assert same == (name == "report.csv")


# What may share a table


def test_the_same_data_elsewhere_is_the_same_row(tmp_path):
    for seed, root in enumerate(["/a", "/b/c"]):
        add(tmp_path, f"m{seed}/run", seed=seed, data={"root": root})
    fields, (row,), notes, *_ = build(tmp_path)
    assert (fields, len(row.runs), notes) == (["run"], 2, [])
    assert len({run.config_hash for run in row.runs}) == 1


def test_data_made_in_memory_is_known_by_its_name(tmp_path):
    made = DATASET | {"fingerprint": None}
    for seed, root in enumerate(["", "/unused"]):
        data = {"name": "synthetic_of_a_kind", "root": root}
        add(tmp_path, str(seed), files={"dataset": made}, seed=seed, data=data)
    report = _, (row,), *_ = build(tmp_path)
    assert len(row.runs) == 2
    assert "training data: synthetic_of_a_kind, split train\n" in tables.to_markdown(report)


def test_the_training_split_may_be_an_axis(tmp_path):
    for split, fingerprint in (("train", FINGERPRINT), ("tenth", OTHER)):
        dataset = DATASET | {"fingerprint": fingerprint}
        add(tmp_path, split, files={"dataset": dataset}, data={"train_split": split})
    fields, rows, *_ = build(tmp_path)
    assert (fields, [row.label for row in rows]) == (["data.train_split"], [["tenth"], ["train"]])


@pytest.mark.parametrize(
    ("files", "config", "what"),
    [
        ({"dataset": DATASET | {"fingerprint": OTHER}}, {}, "training data of split train: aaaaaa"),
        ({"dataset": "{"}, {}, "training data of split train: .*unknown, at /data"),
        ({"dataset": DATASET | {"class_names": ["sky", "tree"]}}, {}, "classes: sky, road"),
        ({}, {"data": {"eval_split": "test"}}, "evaluation split: val"),
        ({}, {"data": {"name": "camvid"}}, "dataset: folder"),
    ],
)
def test_runs_that_are_not_comparable_are_refused(tmp_path, files, config, what):
    add_scores(tmp_path, dice={0: 0.5, 1: 0.6}, focal={0: 0.6, 1: 0.7})
    add(tmp_path, "odd", 0.9, files, loss="dice", seed=2, **config)
    with pytest.raises(ValueError, match=what) as error:
        build(tmp_path)
    assert "(dice-0, dice-1, focal-0, focal-1)" in str(error.value)
    assert "(odd)" in str(error.value) and "--mixed" in str(error.value)

    # Told apart: not in the mean of the others, no rival of theirs, and not tested against them.
    report = fields, rows, *_ = build(tmp_path, mixed=True)
    assert fields[0] == "data"
    assert [row.label[0] for row in rows] == ["1", "1", "2"]
    assert [len(row.runs) for row in rows] == [2, 2, 1]
    bold = [[cell.text for cell in line if cell.is_bold] for line in tables.score_table(report)[1:]]
    assert any("0.650" in cell for cell in bold[1]) and not bold[2]
    assert "eval/mean_iou" not in rows[2].p_values
    markdown = tables.to_markdown(report)
    assert "Not comparable (--mixed)" in markdown and "data 2: " in markdown


def test_failed_runs_do_not_keep_a_table_from_being_made(tmp_path):
    add(tmp_path, "a")
    add(tmp_path, "b", files={"dataset": DATASET | {"fingerprint": OTHER}}, status=None)
    assert len(build(tmp_path)[1]) == 1


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"dataset_fingerprint": FINGERPRINT}, "evaluated data: b{12} .*; a{12} "),
        ({"class_names": ["sky", "tree"]}, "classes: sky, road .*; sky, tree "),
        ({"num_images": 6}, r"images: 7 \(dice\); 6 \(focal\)"),
        ({"num_pixels": 600}, "valid pixels: 700 .*; 600 "),
        ({"resolution": "half"}, "resolution: the labels' own .*; half "),
        ({"split": "val"}, "evaluation split: test .*; val "),
        ({"metric_convention": "2"}, "metric convention: 1 .*; 2 "),
        ({"step": 20}, "checkpoint: best .*; final "),
        ({"step": 15}, "checkpoint: best .*; neither best nor final "),
    ],
)
def test_evaluations_that_are_not_comparable_are_refused(tmp_path, change, what):
    evaluation = EVALUATION | {"metric_convention": "1"}
    add(tmp_path, "dice", files={"evaluation_test": evaluation}, loss="dice")
    add(tmp_path, "focal", files={"evaluation_test": evaluation | change}, loss="focal")
    with pytest.raises(ValueError, match=what):
        build(tmp_path, split="test")
    assert len(build(tmp_path)[1]) == 2  # the scores of training are comparable


def test_seeds_of_one_config_are_evaluated_by_the_same_tiles(tmp_path):
    add(tmp_path, "a", files={"evaluation_test": EVALUATION}, seed=0)
    tiles = EVALUATION | {"margin": [16, 16]}
    add(tmp_path, "b", files={"evaluation_test": tiles}, loss="other", seed=0)  # its own affair
    assert len(build(tmp_path, split="test")[1]) == 2
    add(tmp_path, "c", files={"evaluation_test": tiles}, seed=1)
    with pytest.raises(
        ValueError, match=r"tiles of config .*: 96, 96 pixels with a margin of 0, 0"
    ):
        build(tmp_path, split="test")


def test_other_training_data_is_another_row_of_a_split(tmp_path):
    for name, fingerprint in (("a", FINGERPRINT), ("b", OTHER)):
        dataset = DATASET | {"fingerprint": fingerprint}
        add(tmp_path, name, files={"dataset": dataset, "evaluation_test": EVALUATION})
    fields, rows, *_ = build(tmp_path, split="test")
    assert fields == ["data.root"]
    labels = [f"/data ({fingerprint[:12]})" for fingerprint in (FINGERPRINT, OTHER)]
    assert [row.label for row in rows] == [[label] for label in labels]


# Failures, manifest, files


def test_failures_are_named(tmp_path):
    add(tmp_path, "a")
    failure = {"exit_code": 1, "error": "ValueError: loss='x' is not one of a|b"}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "failure.json").write_text(json.dumps(failure))  # a bad config
    add(tmp_path, "c", status=None, files={"failure": failure | {"error": "NaN"}})
    add(tmp_path, "d", status=None, files={"failure": "{"})
    report = build(tmp_path)
    assert report.notes == [
        "b: failed: ValueError: loss='x' is not one of a|b",
        "c: failed: NaN",
        "d: failed: its failure.json does not say why",
    ]
    assert "a\\|b**" in tables.to_markdown(report)

    add(tmp_path, "a2", files={"failure": failure | {"error": "out of memory"}}, seed=1)
    assert len(build(tmp_path)[1][0].runs) == 2  # trained: it was the evaluation that failed
    notes = build(tmp_path, split="test")[2]
    assert any(note.startswith("a2: not evaluated on test (failed: out of") for note in notes)


def test_the_config_hash_is_that_of_what_makes_the_scores(tmp_path):
    add(tmp_path, "a", seed=0, log_every=1)
    add(tmp_path, "b", seed=1, log_every=2, data={"root": "/elsewhere"})
    add(tmp_path, "c", loss="focal")
    _, rows, *_ = build(tmp_path)
    fields = {"num_steps": 20, "loss": "dice", "data.name": "folder"}
    fields |= {"data.train_split": "train", "data.eval_split": "val"}
    text = json.dumps(dict(sorted(fields.items())), separators=(",", ":"))
    first, second = (row.runs[0].config_hash for row in rows)
    assert first == hashlib.sha256(text.encode()).hexdigest()[:12] != second


def test_the_manifest_says_what_the_rows_were_made_of(tmp_path):
    versions = {"jax": "0.10.2", "flax": "0.12.8"}
    commit = "0123456789abcdef"
    for name, change, loss in (("a", "", "dice"), ("b", "+", "dice"), ("c", "", "focal")):
        environment = {"git_commit": commit + change, "python": "3.11.9", "versions": versions}
        origin = {"source": "hf://timm/vgg16.tv_in1k/model.safetensors", "license": "BSD-3-Clause"}
        environment["initial_weights"] = origin if loss == "dice" else None
        files = {"environment": environment, "evaluation_test": EVALUATION}
        add(tmp_path, name, files=files, loss=loss, seed=ord(name))
    add(tmp_path, "d", files={"evaluation_test": EVALUATION, "environment": "["}, loss="other")
    write(tmp_path, split="test")
    found = json.loads((tmp_path / "report.json").read_text())["manifest"]
    assert found["void_policy"] == manifest.VOID_POLICY
    dice, focal, other = found["rows"]
    assert dice["git_commits"] == [commit, commit + "+"]
    assert (dice["fields"], dice["num_seeds"], dice["runs"]) == ({"loss": "dice"}, 2, ["a", "b"])
    assert (dice["dataset"], dice["dataset_fingerprint"]) == ("folder", FINGERPRINT)
    assert focal["versions"] == {"python": ["3.11.9"], "jax": ["0.10.2"], "flax": ["0.12.8"]}
    assert (other["git_commits"], other["versions"]) == (["unknown"], {})
    assert dice["measured"]["valid pixels"] == "700"
    assert (dice["initial_weights"], focal["initial_weights"]) == (origin, None)

    page = (tmp_path / "report.html").read_text()
    assert page.rstrip().endswith("</html>") and page.count("</html>") == 1
    markdown = (tmp_path / "report.md").read_text().replace("\\", "")
    for text in (page, markdown, (tmp_path / "report.tex").read_text()):
        assert "1 of 4 runs were made with changed files (+)" in text and "them: b." in text
        assert "not of one git commit, but of 0123456789, 0123456789+, unknown." in text
        assert text.count("Ignored pixels count nowhere") == 1
        assert "jax 0.10.2, flax 0.12.8" in text
        assert f"{origin['source']} (license: BSD-3-Clause)" in text.replace("\\_", "_")
    comments = (tmp_path / "report.tex").read_text().split("\\begin")[0].splitlines()
    assert all(line.startswith("% ") for line in comments)


@pytest.mark.parametrize("junk", ["", "{", "[]", "3", '"text"'])
def test_junk_in_one_folder_is_named_and_harmless(tmp_path, junk):
    add(tmp_path, "good")
    for name in ("config", "result", "dataset", "environment", "cost", "failure", "metrics"):
        add(tmp_path, name, seed=["config", name], files={name: junk, "evaluation_test": junk})
    (tmp_path / "metrics" / "metrics.jsonl").write_text('{}\n{"step": null}\n{"st')
    for split in (None, "test"):
        report = _, rows, notes, *_ = build(tmp_path, split=split, mixed=True)
        manifest.manifest(report)
        tables.to_markdown(report)
        cost_csv(report)
        named = {note.split(":")[0] for note in notes}
        shown = {run.name for row in rows for run in row.runs}
        assert named | shown == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("metrics.jsonl", content) for content in (b'{"step": 1e400}', b"\xff", b'{"step": 4')),
        ("evaluation_val.json", b'{"eval/mean_iou": 0.5'),
    ],
)
def test_a_damaged_file_ends_no_report_of_other_runs(tmp_path, file, content):
    for name in "ab":
        add(tmp_path, name, files={"evaluation_val": EVALUATION}, loss=name)
    (tmp_path / "a" / file).write_bytes(content)
    report = build(tmp_path, mixed=True)
    assert "b" in {row.runs[0].name for row in report.rows}
    assert page.to_html("title", report) and cost_csv(report)


def test_a_run_of_another_format_is_named_and_left_out(tmp_path):
    for name, version in (("a", 1), ("b", 2)):
        add(tmp_path, name, files={"environment": {"format_version": version}}, loss=name)
    report = build(tmp_path)
    assert [run.name for row in report.rows for run in row.runs] == ["a"]
    assert "b: " in tables.to_markdown(report)
    assert "environment.json has version 2 of its format" in tables.to_markdown(report)


def test_classes_below_a_baseline_are_marked_and_named(tmp_path):
    final = {"step": 20, "eval/mean_iou": 0.5, "eval/iou/sky": 0.9, "eval/iou/road": 0.1}
    always = {"is": "always sky", "mean_iou": 0.31, "iou": {"sky": 0.62}}
    for loss, below in (("a", {}), ("b", {"road": {"iou": 0.1, "baseline": "threshold"}})):
        result = {"status": "finished", "final": final, "baselines": {"commonest_class": always}}
        add(tmp_path, loss, loss=loss, files={"result": result | {"below_baseline": below}})
    report = build(tmp_path, per_class=True)
    head, *body = tables.score_table(report)
    marked = {
        (line[0].text, cell.text)
        for line in body
        for cell, title in zip(line, head, strict=True)
        if "†" in cell.text and title.text in ("mean IoU", "IoU sky", "IoU road")
    }
    assert marked == {("b", "0.500†"), ("b", "0.100†")}
    text = tables.to_markdown(report)
    assert "Mean IoU without a network: 0.310 (always sky)." in text
    assert (
        "† marks classes whose IoU is lower than without a network, for any seed: loss=b: road."
        in text
    )
    assert r"0.100\textdagger{}" in tables.to_latex(report)
    assert r"\textdagger{}: a class has a lower IoU than" in tables.caption_to_latex(report)


# Folds


def add_folds(root, loss, scores, *, num_folds=3, seeds=(0,), shift=0.0, **files):
    """Runs of each seed on each fold, whose held-out images differ between folds."""
    for (k, score), seed in itertools.product(enumerate(scores), seeds):
        dataset = DATASET | {"num_examples": 10 - k, "eval_fingerprint": f"{k}" * 64}
        folds = {"folds": num_folds, "fold": k}
        content = {"dataset": dataset} | files
        name = f"{loss}-{k}-{seed}"
        add(root, name, score + seed * shift, content, loss=loss, seed=seed, data=folds)
        result = json.loads((root / name / "result.json").read_text())
        (root / name / "result.json").write_text(json.dumps(result | {"num_eval_images": 5 + k}))


def test_scores_without_a_network_are_a_range_over_folds(tmp_path):
    for fold, score in enumerate([0.31, 0.29, 0.3]):
        baselines = {"threshold": {"is": f"sky from {fold}", "mean_iou": score, "iou": {}}}
        result = {"status": "finished", "final": {"eval/mean_iou": 0.5}, "baselines": baselines}
        data = {"folds": 3, "fold": fold}
        add(tmp_path, f"run-{fold}", files={"result": result}, data=data)
    text = tables.to_markdown(build(tmp_path))
    assert "Mean IoU without a network: 0.290 to 0.310 (sky from 0 and 2 more)." in text


def test_intervals_and_tests_are_over_folds(tmp_path):
    dice, focal = [0.5, 0.6, 0.58], [0.4, 0.52, 0.47]
    add_folds(tmp_path, "dice", dice)
    add_folds(tmp_path, "focal", focal, seeds=(0, 1), shift=0.02)  # a fold's score: its mean
    report = build(tmp_path)
    assert report.fields == ["loss"] and not report.notes
    first, second = read(score_csv(report))
    assert (first["num_folds"], second["num_folds"]) == ("3", "3")
    for row, scores in ((first, np.array(dice)), (second, np.array(focal) + 0.01)):
        low, high = scipy.stats.t.interval(
            0.95, len(scores) - 1, loc=scores.mean(), scale=scipy.stats.sem(scores)
        )
        np.testing.assert_allclose(float(row["eval/mean_iou"]), scores.mean(), rtol=1e-9)
        half = float(row["eval/mean_iou/half_interval"])
        np.testing.assert_allclose(half, (high - low) / 2, rtol=1e-9)
    expected = scipy.stats.ttest_rel(np.array(focal) + 0.01, dice).pvalue
    np.testing.assert_allclose(float(second["eval/mean_iou/p_value"]), expected, rtol=1e-9)
    markdown = tables.to_markdown(report)
    assert "Folds share training images" in markdown and "fewer than two folds" in markdown
    assert "evaluation split one of 3 folds of train" in markdown
    assert "## Tests over folds" in markdown and "paired t-test over these folds" in markdown


def test_folds_are_paired_with_equal_folds_only_and_never_with_seeds(tmp_path):
    add_folds(tmp_path, "dice", [0.5, 0.6, 0.58])
    for k in (0, 1):
        folder = tmp_path / f"dice-{k}-0"
        (folder / "evaluation_test.json").write_text(json.dumps(EVALUATION))
        add(tmp_path, f"seed{k}", 0.5, {"evaluation_test": EVALUATION}, loss="dice", seed=k)
    rows = read(score_csv(build(tmp_path, "test")))
    assert [row["num_folds_or_seeds"] for row in rows] == ["2", "2"]
    assert [row["eval/mean_iou/p_value"] for row in rows] == ["", ""]


def test_a_fold_that_is_there_twice_is_left_out(tmp_path):
    add_folds(tmp_path, "dice", [0.5, 0.6, 0.58])
    shutil.copytree(tmp_path / "dice-1-0", tmp_path / "twice")
    report = build(tmp_path)
    assert report.notes == ["twice: left out, it repeats the config and seed of dice-1-0"]
    assert [row.num_units for row in report.rows] == [3]


def test_other_folds_are_not_comparable(tmp_path):
    add_folds(tmp_path, "dice", [0.5, 0.6, 0.58])
    add_folds(tmp_path, "focal", [0.5, 0.6], num_folds=2)
    with pytest.raises(ValueError, match=r"one of 3 folds of train .*; one of 2 folds of train"):
        build(tmp_path)
    for k in range(2):
        shutil.rmtree(tmp_path / f"focal-{k}-0")
    moved = DATASET | {"fingerprint": "c" * 64}
    add_folds(tmp_path, "lovasz", [0.5, 0.6], dataset=moved)
    with pytest.raises(ValueError, match="training data of split train"):
        build(tmp_path)


def test_one_fold_of_other_images_is_not_comparable(tmp_path):
    for loss in ("dice", "focal"):
        add_folds(tmp_path, loss, [0.5, 0.6])
        for k in (0, 1):
            changed = "f" * 64 if (loss, k) == ("focal", 1) else f"{k}" * 64
            evaluation = EVALUATION | {"split": "fold", "dataset_fingerprint": changed}
            path = tmp_path / f"{loss}-{k}-0" / "evaluation_fold.json"
            path.write_text(json.dumps(evaluation | {"num_images": 5 + k}))
    with pytest.raises(ValueError, match=r"evaluated data of fold 1: 1.*dice.*; f.*focal") as error:
        build(tmp_path, "fold")
    assert "of fold 0" not in str(error.value) and "images" not in str(error.value)
