"""Tests that the figures draw the numbers in the rows."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import checkerboard
from dense_jax.metrics import boundary
from dense_jax.report import figures
from dense_jax.report.rows import Row, build
from tests.conftest import REPOSITORY
from tests.report.reported import NASTY, write_dataset, write_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("reported")
    write_dataset(root / "data", size=(32, 48))
    write_runs(root / "runs", root / "data", upsamplings=("nearest", "_$\\frac", "bilinear"))
    return root / "runs"


@pytest.fixture(scope="module")
def report(folder):
    return build(folder, "test")


@pytest.fixture(scope="module")
def drawings(report):
    return dict(figures.draw(report))


def drawn(axes):
    """Of each series: label, and x, y and half the vertical bar of each point."""
    series = {}
    for each in axes.containers:
        line, _, bars = each
        ends = np.array(bars[-1].get_segments())[:, :, 1]  # the vertical bars come last
        series[each.get_label()] = (*line.get_data(orig=False), np.diff(ends)[:, 0] / 2)
    return series


def test_the_command_writes_them_says_nothing_else_and_the_same_numbers_give_the_same_bytes(
    folder, report, tmp_path
):
    shutil.copytree(folder, tmp_path / "runs")
    arguments = f"--workdir={tmp_path / 'runs'}", "--split=test"
    command = [sys.executable, "-m", "dense_jax.report", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1
    names = ("by_loss", "by_model.upsampling", "boundary_f1", "flops", "band_width")
    names = (*names, "error_by_phase")
    paths = figures.write(tmp_path / "again", report)
    assert {path.name for path in paths} == {
        f"{name}.{ending}" for name in names for ending in ("png", "pdf")
    }
    for path in paths:
        assert path.read_bytes() == (tmp_path / "runs/figures" / path.name).read_bytes()
    pdf = (tmp_path / "again" / "flops.pdf").read_bytes()
    assert b"/Subtype /Type3" not in pdf and b"/FontFile2" in pdf  # vector fonts


def test_a_figure_whose_data_do_not_exist_is_not_written(folder):
    report = build(folder)  # without an evaluation
    assert [name for name, _ in figures.draw(report)] == [
        *("by_loss", "by_model.upsampling"),
        "flops",
    ]
    for row in report.rows:
        for run in row.runs:
            run.cost.clear()
    assert list(figures.draw(report._replace(rows=report.rows[:1]))) == []
    assert list(figures.draw(report._replace(rows=[]))) == []


def test_scores_by_field_are_those_of_the_table(report, drawings):
    rows = report.rows
    axes = drawings["by_model.upsampling"].axes[0]
    values = [label.get_text() for label in axes.get_xticklabels()]
    assert sorted(values) == sorted({row.label[1] for row in rows})
    for loss in ("dice", NASTY):
        x, y, half = drawn(axes)[f"loss: {loss}"]
        of_loss = [row for row in rows if row.label[0] == loss]
        assert [values[round(at)] for at in x] == [row.label[1] for row in of_loss]
        expected = [row.score("eval/mean_iou") for row in of_loss]
        np.testing.assert_allclose(np.transpose([y, half]), expected)


def test_every_other_field_has_its_panel(report):
    rows = [Row(row.runs, [*row.label, skips]) for row in report.rows for skips in ("none", "4")]
    figure = dict(figures.draw(report._replace(fields=[*report.fields, "skips"], rows=rows)))[
        "by_loss"
    ]
    assert [axes.get_title() for axes in figure.axes] == ["skips: none", "skips: 4"]
    num_points = [len(x) for axes in figure.axes for x, _, _ in drawn(axes).values()]
    assert sum(num_points) == len(rows)


def test_scatters_have_a_point_for_each_row(report, drawings):
    rows = report.rows
    for name, axis in (("boundary_f1", "eval/mean_boundary_f1"), ("flops", "eval/mean_iou")):
        series = drawn(drawings[name].axes[0])
        for i, row in enumerate(rows):
            ((x,), (y,), (half,)) = series[f"{i + 1}: {', '.join(row.label)}"]
            mean, expected_half = figures.evaluated(row, axis)
            np.testing.assert_allclose([y, half], [mean, expected_half])
            if name == "flops":
                flops = [run.cost["flops_per_image"] for run in row.runs]
                assert x == np.mean(flops)
            else:
                assert x == pytest.approx(row.score("eval/mean_iou")[0])


def test_band_widths_have_a_line_for_each_row(report, drawings):
    series = drawn(drawings["band_width"].axes[0])
    for (x, y, half), row in zip(series.values(), report.rows, strict=True):
        np.testing.assert_allclose(x, boundary.BAND_WIDTHS, rtol=0.2)
        expected = [
            figures.evaluated(row, f"eval/trimap_mean_iou/{w}") for w in boundary.BAND_WIDTHS
        ]
        np.testing.assert_allclose(np.transpose([y, half]), expected)


def test_scores_are_drawn_from_0_to_1(drawings):
    for name, figure in drawings.items():
        if name != "error_by_phase":
            low, high = figure.axes[0].get_ylim()
            assert low >= -0.05 and high <= 1.05


def test_errors_that_repeat_show_in_their_phase(report, drawings):
    row = report.rows[0]
    counts = []
    for run in row.runs:
        with np.load(run.folder / "evaluation_test.npz") as kept:
            counts.append(kept["phase_errors"].sum(axis=0))
    wrong, valid = np.moveaxis(sum(counts), -1, 0)
    np.testing.assert_allclose(figures.error_rates(row), wrong / valid)
    figure = drawings["error_by_phase"]
    maps = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(maps) == len(report.rows)
    np.testing.assert_allclose([np.mean(each) for each in maps], 1)


def test_the_plot_of_checkerboards_has_a_point_for_each_run(tmp_path, capsys, monkeypatch):
    write_dataset(tmp_path / "data")
    write_runs(tmp_path / "runs", tmp_path / "data", upsamplings=("nearest", "bed_of_nails"))
    output = tmp_path / "plot.png"
    argv = ["checkerboard", f"--workdir={tmp_path / 'runs'}", f"--output={output}"]
    monkeypatch.setattr(sys, "argv", argv)
    checkerboard.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and output.stat().st_size
    assert all("index 0.00" in line for line in lines if "nearest" in line)
    assert all("index 1.73" in line for line in lines if "bed_of_nails" in line)


def test_the_phase_error_leaves_out_the_pattern_of_the_images():
    rng = np.random.default_rng(0)
    images = rng.uniform(0.1, 0.2, (16, 16))
    board = 1 + 0.1 * np.where(np.indices((16, 16)).sum(axis=0) % 2, 1, -1)
    errors = checkerboard.phase_errors([images, 2 * images, images, images * board])
    np.testing.assert_allclose(errors[:3], 0, atol=1e-12)
    assert errors[3] == pytest.approx(0.1, rel=0.1)
