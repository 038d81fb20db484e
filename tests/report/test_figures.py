"""The figures draw the numbers of the rows."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from dense_jax.metrics import boundary
from dense_jax.report import figures, runs
from tests.conftest import REPOSITORY
from tests.report.reported import NASTY, write_dataset, write_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("reported")
    write_dataset(root / "data", size=(32, 48))
    write_runs(root / "runs", root / "data", upsamplings=("nearest", "_$\\frac", "bilinear"))
    return root / "runs"


@pytest.fixture(scope="module")
def found(folder):
    return runs.build(folder, "test")[:2]


def drawn(axes):
    """Of each series: label, and x, y and half the vertical bar of each point."""
    series = {}
    for each in axes.containers:
        line, _, bars = each
        ends = np.array(bars[-1].get_segments())[:, :, 1]  # the vertical bars come last
        series[each.get_label()] = (*line.get_data(orig=False), np.diff(ends)[:, 0] / 2)
    return series


def test_all_are_written_twice_the_same(folder, found, tmp_path):
    names = ("by_loss", "by_model.upsampling", "boundary_f1", "flops", "band_width")
    names = (*names, "error_by_phase")
    contents = []
    for attempt in ("a", "b"):
        paths = figures.write(tmp_path / attempt, *found)
        assert {path.name for path in paths} == {
            f"{name}.{ending}" for name in names for ending in ("png", "pdf")
        }
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]
    pdf = (tmp_path / "a" / "flops.pdf").read_bytes()
    assert b"/Subtype /Type3" not in pdf and b"/FontFile2" in pdf  # vector fonts


def test_the_command_writes_them_and_says_nothing_else(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "runs")
    command = [sys.executable, "-m", "dense_jax.report", f"--workdir={tmp_path / 'runs'}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1
    assert (tmp_path / "runs" / "figures" / "by_loss.pdf").exists()


def test_a_figure_whose_data_do_not_exist_is_not_written(folder):
    fields, rows = runs.build(folder)[:2]  # without an evaluation
    assert [name for name, _ in figures.draw(fields, rows)] == [
        *("by_loss", "by_model.upsampling"),
        "flops",
    ]
    for row in rows:
        for run in row.runs:
            run.cost.clear()
    assert list(figures.draw(fields[:1], rows[:1])) == []
    assert list(figures.draw(fields, [])) == []


def test_scores_by_field_are_those_of_the_table(found):
    fields, rows = found
    axes = dict(figures.draw(fields, rows))["by_model.upsampling"].axes[0]
    values = [label.get_text() for label in axes.get_xticklabels()]
    assert sorted(values) == sorted({row.label[1] for row in rows})
    for loss in ("dice", NASTY):
        x, y, half = drawn(axes)[f"loss: {loss}"]
        of_loss = [row for row in rows if row.label[0] == loss]
        assert [values[round(at)] for at in x] == [row.label[1] for row in of_loss]
        expected = [row.score("eval/mean_iou") for row in of_loss]
        np.testing.assert_allclose(np.transpose([y, half]), expected)


def test_every_other_field_has_its_panel(found):
    fields, rows = found
    rows = [runs.Row(row.runs, [*row.label, skips]) for row in rows for skips in ("none", "4")]
    figure = dict(figures.draw([*fields, "skips"], rows))["by_loss"]
    assert [axes.get_title() for axes in figure.axes] == ["skips: none", "skips: 4"]
    num_points = [len(x) for axes in figure.axes for x, _, _ in drawn(axes).values()]
    assert sum(num_points) == len(rows)


def test_scatters_have_a_point_for_each_row(found):
    rows = found[1]
    drawings = dict(figures.draw(*found))
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


def test_band_widths_have_a_line_for_each_row(found):
    series = drawn(dict(figures.draw(*found))["band_width"].axes[0])
    for (x, y, half), row in zip(series.values(), found[1], strict=True):
        np.testing.assert_allclose(x, boundary.BAND_WIDTHS, rtol=0.2)
        expected = [
            figures.evaluated(row, f"eval/trimap_mean_iou/{w}") for w in boundary.BAND_WIDTHS
        ]
        np.testing.assert_allclose(np.transpose([y, half]), expected)


def test_scores_are_drawn_from_0_to_1(found):
    for name, figure in figures.draw(*found):
        if name != "error_by_phase":
            low, high = figure.axes[0].get_ylim()
            assert low >= -0.05 and high <= 1.05


def test_errors_that_repeat_show_in_their_phase(found, folder):
    row = found[1][0]
    counts = []
    for run in row.runs:
        with np.load(run.folder / "evaluation_test.npz") as kept:
            counts.append(kept["phase_errors"].sum(axis=0))
    wrong, valid = np.moveaxis(sum(counts), -1, 0)
    np.testing.assert_allclose(figures.error_rates(row), wrong / valid)
    figure = dict(figures.draw(*found))["error_by_phase"]
    maps = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(maps) == len(found[1])
    np.testing.assert_allclose([np.mean(each) for each in maps], 1)
