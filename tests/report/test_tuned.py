"""Tests that rows share a table only if their learning rates were tuned with equal effort."""

import json

import pytest

from dense_jax.report import manifest, tables
from dense_jax.report.rows import build
from tests.report.test_tables import EVALUATION, add


def add_row(root, loss, rate, tried=None, **about):
    """Writes two runs of a row with a learning rate, which was the best of those tried."""
    tuning = {"rates": list(tried or ()), "scores": list((tried or {}).values()), "num_seeds": 1}
    files = {"tuning": tuning | about} if tried else {}
    for seed in (0, 1):
        optimizer = {"learning_rate": rate}
        add(root, f"{loss}-{seed}", 0.5, files, loss=loss, seed=seed, optimizer=optimizer)


def test_rows_with_as_many_trials_share_a_table_which_says_what_was_tried(tmp_path):
    add_row(tmp_path, "dice", 0.003, {0.01: 0.25, 0.003: 0.5, 0.001: 0.125})
    add_row(tmp_path, "focal", 0.1, {0.1: 0.375, 0.03: None, 0.01: 0.25})
    report = build(tmp_path)
    assert [row.group for row in report.rows] == ["", ""] and report.rows[1].p_values
    _, differing = manifest.columns(report)
    assert differing["learning rate"] == [
        "0.003 of 0.01 (0.250), 0.003 (0.500), 0.001 (0.125)",
        "0.1 of 0.1 (0.375), 0.03 (no score), 0.01 (0.250)",
    ]
    best = "own learning rate, the best of 3 (with 1 seed each)"
    assert best in tables.to_markdown(report) and best in tables.caption_to_latex(report)
    assert "on the same split, and thus optimistic" in tables.to_markdown(report)
    (ends,) = [line for line in manifest.remarks(report) if "lowest or the highest" in line]
    assert ends.endswith(": loss=focal,optimizer.learning_rate=0.1.")
    assert manifest.manifest(report)["rows"][0]["tuning"]["rates"] == [0.01, 0.003, 0.001]


@pytest.mark.parametrize(
    ("tried", "about", "what"),
    [
        ({0.1: 0.3, 0.01: 0.2}, {}, r"3 \(with 1 seed each\) \(dice-0, dice-1\); 2 \("),
        ({0.1: 0.3, 0.01: 0.2, 0.02: 0.1}, {"num_seeds": 2}, r"; 3 \(with 2 seeds each\) \(focal"),
        (None, {}, r"; none \(focal-0, focal-1\)"),
    ],
)
def test_rows_tuned_unequally_are_refused_unless_told(tmp_path, tried, about, what):
    add_row(tmp_path, "dice", 0.003, {0.01: 0.25, 0.003: 0.5, 0.001: 0.125})
    add_row(tmp_path, "focal", 0.1, tried, **about)
    with pytest.raises(ValueError, match=f"tuned alike:\n  learning rates tried: .*{what}"):
        build(tmp_path)
    report = build(tmp_path, mixed=True)
    assert [row.group for row in report.rows] == ["1", "2"]
    assert not any(cell.is_bold for line in tables.score_table(report) for cell in line)
    assert not any(row.p_values for row in report.rows)


def test_the_split_that_chose_the_rates_is_told_from_others(tmp_path):
    add_row(tmp_path, "dice", 0.003, {0.01: 0.25, 0.003: 0.5, 0.001: 0.125})
    for seed in (0, 1):
        evaluation = json.dumps(EVALUATION)
        (tmp_path / f"dice-{seed}" / "evaluation_test.json").write_text(evaluation)
    text = tables.to_markdown(build(tmp_path, "test"))
    assert "the best of 3" in text and "optimistic" not in text


def test_an_untuned_table_does_not_speak_of_tuning(tmp_path):
    add_row(tmp_path, "dice", 0.01)
    add_row(tmp_path, "focal", 0.1)
    assert "tried" not in tables.to_markdown(build(tmp_path))


def test_trials_are_no_rows(tmp_path):
    for name in ("a", "tuning/loss=x,learning_rate=1,seed=1000"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        add(tmp_path, name)
    assert len(build(tmp_path).rows[0].runs) + len(build(tmp_path).notes) == 2
    runs = {name: {} for name in ("a", "tuning/loss=x,learning_rate=1,seed=1000")}
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs}))
    report = build(tmp_path)
    assert [run.name for row in report.rows for run in row.runs] == ["a"] and not report.notes
    assert len(build(tmp_path / "tuning").rows) == 1
