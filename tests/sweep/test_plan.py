"""Tests that run names are readable and unique, and that repeating a command resumes the sweep."""

import json
import os
import pathlib
import re

import pytest
from etils import epath

from dense_jax import sweep
from dense_jax.sweep import plan

AXES = {"model.upsampling": ["bilinear", "nearest"], "model.skips": [(), (4, 2)], "seed": [0, 1]}


def test_grid_is_every_combination_with_the_last_axis_fastest():
    runs = sweep.grid(**AXES)
    assert len(runs) == 8
    assert runs[0] == {"model.upsampling": "bilinear", "model.skips": (), "seed": 0}
    assert runs[1] == {"model.upsampling": "bilinear", "model.skips": (), "seed": 1}
    assert runs[-1] == {"model.upsampling": "nearest", "model.skips": (4, 2), "seed": 1}


def test_grid_rejects_a_bare_string():
    with pytest.raises(TypeError, match=r"'loss' needs a list of values, got 'dice'"):
        sweep.grid(loss="dice")


def test_flags_are_one_word_each():
    flags = plan.as_flags({"model.skips": (4, 8), "loss": "soft_dice"})
    assert flags == ["--config.model.skips=(4, 8)", "--config.loss=soft_dice"]


def test_none_cannot_be_a_flag():
    with pytest.raises(ValueError, match=r"optimizer.grad_clip_norm=None cannot be written"):
        plan.as_flags({"optimizer.grad_clip_norm": None})


def test_names_say_what_differs_and_nothing_else():
    runs = [{"num_steps": 50, **run} for run in sweep.grid(**AXES)]
    names = plan.run_names(runs)
    assert names[0] == "upsampling=bilinear,skips=none,seed=0"
    assert names[-1] == "upsampling=nearest,skips=4-2,seed=1"
    assert names == plan.run_names(runs)
    assert len(set(names)) == len(names)


def test_names_stay_when_a_sweep_gets_more_seeds():
    axes = {"loss": ["dice", "focal"], "seed": [0]}
    assert set(plan.run_names(sweep.grid(**axes))) <= set(
        plan.run_names(sweep.grid(**axes | {"seed": [0, 1, 2]}))
    )


def test_names_keep_as_much_of_a_path_as_tells_it_from_the_others():
    names = plan.run_names(sweep.grid(**{"data.name": ["a", "b"], "model.name": ["a", "b"]}))
    assert names[1] == "data.name=a,model.name=b"
    names = plan.run_names(sweep.grid(**{"name": ["a", "b"], "model.name": ["a", "b"]}))
    assert names[1] == "name=a,model.name=b"


def test_a_run_that_changes_nothing_has_a_name():
    assert plan.run_names([{}, {"loss": "focal"}]) == ["default", "loss=focal"]


def test_sums_of_losses_have_readable_names():
    runs = sweep.grid(loss=["focal + 3 * soft_dice", "focal + tversky(alpha=0.3, beta=0.7)"])
    expected = ["loss=focal+3_soft_dice", "loss=focal+tversky_alpha_0.3__beta_0.7_"]
    assert plan.run_names(runs) == expected
    assert plan.as_flags(runs[0]) == ["--config.loss=focal + 3 * soft_dice"]


@pytest.mark.parametrize("value", ["../../etc", "a b", "ü\n", "$(rm)", "x=1,y=2", {"per": (1, 2)}])
def test_names_are_safe_for_files_shells_and_buckets(value):
    (name, _) = plan.run_names([{"data.root": value}, {"data.root": "other"}])
    assert re.fullmatch(r"root=[A-Za-z0-9._+-]+", name)


@pytest.mark.parametrize("values", [["a b", "a/b"], ["Dice", "dice"], [4, (4,)], [1, 1]])
def test_two_runs_never_share_a_folder(values):
    with pytest.raises(ValueError, match="runs 0 and 1 of the sweep would share the folder"):
        plan.run_names([{"x": value, "y": y} for y in (1, 2) for value in values])


def test_a_name_no_file_system_takes_is_an_error():
    with pytest.raises(ValueError, match="run 0 has a name of 302 characters"):
        plan.run_names([{"x": "a" * 300}, {"x": "b"}])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", r"has no get_sweep\(\): to train it once, use dense_jax.main"),
        ("def get_sweep(): return []", "is an empty list"),
        ("def get_sweep(): return {'seed': [1]}", "must return a list of dicts"),
    ],
)
def test_a_bad_experiment_file_is_named(tmp_path, source, message):
    file = tmp_path / "ablation.py"
    file.write_text(source)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{message}"):
        plan.load_sweep(str(file))
    with pytest.raises(ValueError, match=r"no experiment file 'nowhere\.py'"):
        plan.load_sweep("nowhere.py")


def finish(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"status": "finished"}))


def test_the_status_of_a_run(tmp_path):
    folder = epath.Path(tmp_path / "run")
    assert plan.status(folder) == "new"
    folder.mkdir()
    (folder / "result.json").write_text('{"status": "fini')  # cut off by a crash
    assert plan.status(folder) == "unfinished"
    finish(tmp_path / "run")
    assert plan.status(folder) == "finished"
    (folder / "failure.json").touch()  # of its evaluation
    assert plan.status(folder) == "failed"


def test_a_run_of_several_seeds_is_finished_when_all_are(tmp_path):
    folder = epath.Path(tmp_path)
    finish(tmp_path / "seed=0")
    (tmp_path / "seed=1").mkdir()
    assert plan.status(folder) == "unfinished"
    finish(tmp_path / "seed=1")
    assert plan.status(folder) == "finished"
    assert not plan.is_evaluated(folder, "test")
    for seed in (0, 1):
        (tmp_path / f"seed={seed}" / "evaluation_test.json").touch()
    assert plan.is_evaluated(folder, "test")


def test_runs_of_several_seeds_are_not_taken_for_those_of_other_flags(tmp_path):
    started = {"config": "a.py", "flags": {"num_seeds": "2"}, "evaluate": None, "runs": {"r": {}}}
    plan.remember(epath.Path(tmp_path), started)
    (tmp_path / "r" / "seed=0").mkdir(parents=True)
    (tmp_path / "r" / "seed=0" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="num_steps"):
        other = started | {"flags": {"num_seeds": "2", "num_steps": "9"}}
        plan.remember(epath.Path(tmp_path), other)


def test_scores_older_than_the_run_are_not_its_own(tmp_path):
    folder = epath.Path(tmp_path)
    finish(tmp_path)
    assert not plan.is_evaluated(folder, "test")
    (tmp_path / "evaluation_test.json").touch()
    assert plan.is_evaluated(folder, "test")
    os.utime(tmp_path / "evaluation_test.json", (0, 0))
    assert not plan.is_evaluated(folder, "test")


def test_a_label_stands_for_all_that_goes_with_it():
    variants = [
        {"label": "FCN-8s", "model.name": "fcn", "model.skips": (16, 8)},
        {"label": "U-Net", "model.name": "unet"},
    ]
    runs = [
        variant | more for variant in variants for more in sweep.grid(seed=[0], loss=["a", "b"])
    ]
    assert plan.run_names(runs)[0] == "label=FCN-8s,loss=a,seed=0"
    runs.append({"label": "U-Net", "model.name": "unet", "model.skips": (), "seed": 0, "loss": "b"})
    assert plan.run_names(runs)[-1] == "label=U-Net,skips=none,loss=b,seed=0"


STARTED = {
    "config": "a.py",
    "flags": {"num_steps": "5"},
    "evaluate": None,
    "runs": {"x": {"seed": 0, "model.skips": (4, 2)}, "y": {"seed": 1}},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": "b.py"}, "--config: 'a.py' there, 'b.py' now"),
        ({"flags": {"num_steps": "6"}}, "--config.num_steps: '5' there, '6' now"),
        ({"flags": {}}, "--config.num_steps: '5' there, 'not set' now"),
        ({"runs": {"x": {"seed": 0}}}, r"x: model.skips: \[4, 2\] there, 'not set' now"),
    ],
)
def test_a_folder_with_runs_of_another_config_is_refused(tmp_path, change, message):
    folder = epath.Path(tmp_path / "runs")
    assert plan.remember(folder, STARTED) == []
    plan.remember(folder, STARTED | change)  # nothing has begun
    plan.remember(folder, STARTED)
    (folder / "x").mkdir()
    (folder / "x" / "config.json").touch()
    assert plan.remember(folder, STARTED) == []
    with pytest.raises(ValueError, match=rf"Use another folder, or .*\n  {message}$"):
        plan.remember(folder, STARTED | change)
    assert sorted(path.name for path in folder.iterdir()) == ["sweep.json", "x"]


def test_runs_may_come_and_go_and_what_they_were_is_remembered(tmp_path):
    folder = epath.Path(tmp_path)
    plan.remember(folder, STARTED)
    for name in "xy":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    fewer = STARTED | {"evaluate": "test", "runs": {"y": {"seed": 1}, "z": {"seed": 2}}}
    assert plan.remember(folder, fewer) == ["x"]
    runs = json.loads((tmp_path / "sweep.json").read_text())["runs"]
    assert runs == {"x": {"seed": 0, "model.skips": [4, 2]}, "y": {"seed": 1}, "z": {"seed": 2}}
    assert list(runs) == ["y", "z", "x"]  # the order of the report's rows


def test_a_folder_in_which_no_run_can_save_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"^--workdir=.*'\[1\]'"):
        plan.remember(epath.Path(tmp_path / "[1]" / "runs"), STARTED)
    assert not list(tmp_path.iterdir())
