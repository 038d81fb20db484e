"""What a sweep promises: readable unique names, run order, and that the same command goes on."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from dense_jax import sweep

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
    flags = sweep.as_flags({"model.skips": (4, 8), "loss": "soft_dice"})
    assert flags == ["--config.model.skips=(4, 8)", "--config.loss=soft_dice"]


def test_none_cannot_be_a_flag():
    with pytest.raises(ValueError, match=r"optimizer.grad_clip_norm=None cannot be written"):
        sweep.as_flags({"optimizer.grad_clip_norm": None})


def test_names_say_what_differs_and_nothing_else():
    runs = [{"num_steps": 50, **run} for run in sweep.grid(**AXES)]
    names = sweep.run_names(runs)
    assert names[0] == "upsampling=bilinear,skips=none,seed=0"
    assert names[-1] == "upsampling=nearest,skips=4-2,seed=1"
    assert names == sweep.run_names(runs)
    assert len(set(names)) == len(names)


def test_names_stay_when_a_sweep_gets_more_seeds():
    axes = {"loss": ["dice", "focal"], "seed": [0]}
    assert set(sweep.run_names(sweep.grid(**axes))) <= set(
        sweep.run_names(sweep.grid(**axes | {"seed": [0, 1, 2]}))
    )


def test_names_keep_as_much_of_a_path_as_tells_it_from_the_others():
    names = sweep.run_names(sweep.grid(**{"data.name": ["a", "b"], "model.name": ["a", "b"]}))
    assert names[1] == "data.name=a,model.name=b"
    names = sweep.run_names(sweep.grid(**{"name": ["a", "b"], "model.name": ["a", "b"]}))
    assert names[1] == "name=a,model.name=b"


def test_a_run_that_changes_nothing_has_a_name():
    assert sweep.run_names([{}, {"loss": "focal"}]) == ["default", "loss=focal"]


@pytest.mark.parametrize("value", ["../../etc", "a b", "ü\n", "$(rm)", "x=1,y=2", {"per": (1, 2)}])
def test_names_are_safe_for_files_shells_and_buckets(value):
    (name, _) = sweep.run_names([{"data.root": value}, {"data.root": "other"}])
    assert re.fullmatch(r"root=[A-Za-z0-9._+-]+", name)


@pytest.mark.parametrize("values", [["a b", "a/b"], ["Dice", "dice"], [4, (4,)], [1, 1]])
def test_two_runs_never_share_a_folder(values):
    with pytest.raises(ValueError, match="runs 0 and 1 of the sweep would share the folder"):
        sweep.run_names([{"x": value, "y": y} for y in (1, 2) for value in values])


def test_a_name_no_file_system_takes_is_an_error():
    with pytest.raises(ValueError, match="run 0 has a name of 302 characters"):
        sweep.run_names([{"x": "a" * 300}, {"x": "b"}])


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
        sweep.load_sweep(str(file))
    with pytest.raises(ValueError, match=r"no experiment file 'nowhere\.py'"):
        sweep.load_sweep("nowhere.py")


def finish(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"status": "finished"}))


def test_the_state_of_a_run(tmp_path):
    folder = epath.Path(tmp_path / "run")
    assert sweep.state(folder) == "new"
    folder.mkdir()
    (folder / "result.json").write_text('{"status": "fini')  # cut off by a crash
    assert sweep.state(folder) == "unfinished"
    finish(tmp_path / "run")
    assert sweep.state(folder) == "finished"
    (folder / "failure.json").touch()  # of its evaluation
    assert sweep.state(folder) == "failed"


def test_a_run_of_several_seeds_is_finished_when_all_are(tmp_path):
    folder = epath.Path(tmp_path)
    finish(tmp_path / "seed=0")
    (tmp_path / "seed=1").mkdir()
    assert sweep.state(folder) == "unfinished"
    finish(tmp_path / "seed=1")
    assert sweep.state(folder) == "finished"
    assert not sweep.is_evaluated(folder, "test")
    for seed in (0, 1):
        (tmp_path / f"seed={seed}" / "evaluation_test.json").touch()
    assert sweep.is_evaluated(folder, "test")


def test_runs_of_several_seeds_are_not_taken_for_those_of_other_flags(tmp_path):
    started = {"config": "a.py", "flags": {"num_seeds": "2"}, "evaluate": None, "runs": {"r": {}}}
    sweep.remember(epath.Path(tmp_path), started)
    (tmp_path / "r" / "seed=0").mkdir(parents=True)
    (tmp_path / "r" / "seed=0" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="num_steps"):
        other = started | {"flags": {"num_seeds": "2", "num_steps": "9"}}
        sweep.remember(epath.Path(tmp_path), other)


def test_scores_older_than_the_run_are_not_its_own(tmp_path):
    folder = epath.Path(tmp_path)
    finish(tmp_path)
    assert not sweep.is_evaluated(folder, "test")
    (tmp_path / "evaluation_test.json").touch()
    assert sweep.is_evaluated(folder, "test")
    os.utime(tmp_path / "evaluation_test.json", (0, 0))
    assert not sweep.is_evaluated(folder, "test")


def test_a_label_stands_for_all_that_goes_with_it():
    variants = [
        {"label": "FCN-8s", "model.name": "fcn", "model.skips": (16, 8)},
        {"label": "U-Net", "model.name": "unet"},
    ]
    runs = [
        variant | more for variant in variants for more in sweep.grid(seed=[0], loss=["a", "b"])
    ]
    assert sweep.run_names(runs)[0] == "label=FCN-8s,loss=a,seed=0"
    runs.append({"label": "U-Net", "model.name": "unet", "model.skips": (), "seed": 0, "loss": "b"})
    assert sweep.run_names(runs)[-1] == "label=U-Net,skips=none,loss=b,seed=0"


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
    assert sweep.remember(folder, STARTED) == []
    sweep.remember(folder, STARTED | change)  # nothing has begun
    sweep.remember(folder, STARTED)
    (folder / "x").mkdir()
    (folder / "x" / "config.json").touch()
    assert sweep.remember(folder, STARTED) == []
    with pytest.raises(ValueError, match=rf"Use another --workdir, or .*\n  {message}$"):
        sweep.remember(folder, STARTED | change)
    assert sorted(path.name for path in folder.iterdir()) == ["sweep.json", "x"]


def test_runs_may_come_and_go_and_what_they_were_is_remembered(tmp_path):
    folder = epath.Path(tmp_path)
    sweep.remember(folder, STARTED)
    for name in "xy":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    fewer = STARTED | {"evaluate": "test", "runs": {"y": {"seed": 1}, "z": {"seed": 2}}}
    assert sweep.remember(folder, fewer) == ["x"]
    runs = json.loads((tmp_path / "sweep.json").read_text())["runs"]
    assert runs == {"x": {"seed": 0, "model.skips": [4, 2]}, "y": {"seed": 1}, "z": {"seed": 2}}


def test_a_folder_in_which_no_run_can_save_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"^--workdir=.*'\[1\]'"):
        sweep.remember(epath.Path(tmp_path / "[1]" / "runs"), STARTED)
    assert not list(tmp_path.iterdir())


# A trainer in three lines, where `python -m dense_jax.main` looks first: the working directory.
FAKE_MAIN = """
import json, os, pathlib, signal, sys, time
args = dict(arg.removeprefix("--").split("=", 1) for arg in sys.argv[1:] if "=" in arg)
workdir = pathlib.Path(args["workdir"])
workdir.mkdir(parents=True, exist_ok=True)
(workdir / "argv.json").write_text(json.dumps(sys.argv[1:]))
(workdir / "config.json").touch()
if "wait" in os.environ:
    signal.signal(signal.SIGTERM, lambda *_: ((workdir / "saved").touch(), sys.exit(75)))
    (workdir / "ready").touch()
    time.sleep(60)
if args["config.seed"] == "1":
    sys.exit("no such thing")
(workdir / "result.json").write_text('{"status": "finished"}')
"""
FAKE_EVALUATE = """
import pathlib, sys
args = dict(arg.removeprefix("--").split("=", 1) for arg in sys.argv[1:])
(pathlib.Path(args["workdir"]) / f"evaluation_{args['split']}.json").touch()
print("evaluated")
"""
CONFIG = """
from ml_collections import ConfigDict
def get_config():
    sections = {"model": {"skips": ()}, "data": {"name": ""}}
    return ConfigDict({"seed": 0, "num_steps": 1, "batch_size": 1, **sections})
"""
EXPERIMENT = f"""{CONFIG}
from dense_jax import sweep
def get_sweep():
    return sweep.grid(**{{"model.skips": [(4, 8), ()], "seed": [0, 1]}})
"""


@pytest.fixture
def command(tmp_path):
    """Returns the argv of the sweep command in a folder with a fake trainer."""
    package = tmp_path / "dense_jax"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "main.py").write_text(FAKE_MAIN)
    (package / "evaluate.py").write_text(FAKE_EVALUATE)
    names = ("sweep", "jobs", "distributed", "command", "spelling", "workdir")
    for name in (f"{name}.py" for name in names):
        (package / name).write_text((pathlib.Path(sweep.__file__).parent / name).read_text())
    (tmp_path / "ablation.py").write_text(EXPERIMENT)
    return [sys.executable, "-m", "dense_jax.sweep", "--config=ablation.py", "--workdir=runs"]


def call(command, folder, *args):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [*command, *args],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )


def test_the_command_runs_lists_and_skips(command, tmp_path):
    flag = "--config.data.name=my data"
    first = call(command, tmp_path, flag)
    assert first.returncode == 1
    assert first.stderr.splitlines() == [
        "2 of 4 runs failed; the same command tries them again:",
        "  skips=4-8,seed=1: no such thing (exit code 1), see runs/skips=4-8,seed=1/log.txt",
        "  skips=none,seed=1: no such thing (exit code 1), see runs/skips=none,seed=1/log.txt",
    ]
    argv = json.loads((tmp_path / "runs/skips=4-8,seed=0/argv.json").read_text())
    assert argv == [
        "--config=ablation.py",
        "--workdir=runs/skips=4-8,seed=0",
        "--config.model.skips=(4, 8)",
        "--config.seed=0",
        flag,
    ]
    listing = call(command, tmp_path, "--list", "--config.batch_size=2")
    assert listing.returncode == 0
    lines = listing.stdout.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["0", "finished", "skips=4-8,seed=0"],
        ["1", "failed", "skips=4-8,seed=1"],
        ["2", "finished", "skips=none,seed=0"],
        ["3", "failed", "skips=none,seed=1"],
    ]
    assert lines[0].endswith("'--config.model.skips=(4, 8)' --config.seed=0 --config.batch_size=2")
    again = call(command, tmp_path, flag)
    assert again.stdout.startswith(
        "2 of 4 runs are already finished\n[2/4] skips=4-8,seed=1: starts"
    )


def test_a_finished_sweep_is_not_taken_for_one_with_other_flags(command, tmp_path):
    call(command, tmp_path, "--index=0")
    other = call(command, tmp_path, "--config.num_steps=500")
    assert other.returncode == 1
    assert other.stderr.endswith("  --config.num_steps: 'not set' there, '500' now\n")
    assert "Traceback" not in other.stderr


def test_each_run_is_evaluated_once(command, tmp_path):
    for split, times in (("test", 1), ("test", 1), ("val", 2)):
        assert call(command, tmp_path, "--index=0", f"--evaluate={split}").returncode == 0
        log = (tmp_path / "runs/skips=4-8,seed=0/log.txt").read_text()
        assert log.count("\nevaluated\n") == times
        assert log.count("dense_jax.main") == 1


def test_each_run_is_told_of_the_other_processes(command, tmp_path):
    peers = ["--coordinator=host:1", "--num_processes=2", "--process_id=0"]
    assert call(command, tmp_path, "--index=0", *peers).returncode == 0
    argv = json.loads((tmp_path / "runs/skips=4-8,seed=0/argv.json").read_text())
    assert argv[1:4] == peers


def test_an_index_runs_that_one_only(command, tmp_path):
    assert call(command, tmp_path, "--index=2").returncode == 0
    made = {path.name for path in (tmp_path / "runs").iterdir()}
    assert made == {"skips=none,seed=0", "sweep.json"}


def test_a_flag_over_what_all_rows_set_alike_is_refused(command, tmp_path):
    row = "def get_sweep(): return [{'model.skips': (4, 2), 'seed': seed} for seed in (0, 1)]"
    (tmp_path / "ablation.py").write_text(CONFIG + row)
    result = call(command, tmp_path, "--list", "--config.model.skips=()")
    assert result.returncode == 1
    assert (
        result.stderr == "error: --config.model.skips is what this sweep sets; edit ablation.py\n"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--index=4"], "--index=4 is not in 0..3"),
        (["--config.seed=3"], "--config.seed is what this sweep sets; edit ablation.py"),
        (["--confg.seed=3"], "unexpected argument '--confg.seed=3'; overrides are --config.x=y"),
        (["--config.batch_size", "3"], "unexpected argument '--config.batch_size'"),
        (["--list", "--index=1"], "--list and --index exclude each other"),
        (["--index=x"], "--index=x"),
        (["--jobs=2", "--index=1"], "--jobs is for all runs on this machine"),
        (["--jobs=2", "--multihost"], "--jobs is for all runs on this machine"),
        (["--jobs=0"], "--jobs=0"),
        (["--jobs=1000"], "error: --jobs=1000 at once, but there are "),
        (["--evaluate=test", "--multihost"], "--evaluate is for runs of one process"),
        (["--process_id=0"], "together; missing: --coordinator, --num_processes"),
    ],
)
def test_bad_arguments_are_one_clear_error(command, tmp_path, args, message):
    result = call(command, tmp_path, *args)
    assert result.returncode != 0
    assert message in result.stderr + result.stdout
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("num_jobs", [1, 2])
def test_a_signal_lets_the_current_runs_save_and_starts_no_other(
    command, tmp_path, number, num_jobs
):
    if num_jobs > len(os.sched_getaffinity(0)):
        pytest.skip("needs as many cores as jobs")
    process = subprocess.Popen(
        [*command, f"--jobs={num_jobs}"],
        cwd=tmp_path,
        env={**os.environ, "wait": "1", "JAX_PLATFORMS": "cpu"},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    names = ["skips=4-8,seed=0", "skips=4-8,seed=1"][:num_jobs]
    deadline = time.monotonic() + 30
    while not all((tmp_path / "runs" / name / "ready").exists() for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, number)  # as a terminal does
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "stopped at skips=4-8,seed=" in err and "the same command resumes there" in err
    assert all((tmp_path / "runs" / name / "saved").exists() for name in names)
    assert len([path for path in (tmp_path / "runs").iterdir() if path.is_dir()]) == num_jobs


def test_importing_it_brings_neither_jax_nor_flags():
    code = "import sys; from dense_jax import sweep; from absl import flags; "
    code += "assert 'jax' not in sys.modules; assert 'config' not in flags.FLAGS"
    cwd = pathlib.Path(sweep.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=cwd)


def test_fields_that_do_not_exist_are_refused_before_any_run(command, tmp_path):
    for rows, flag in (
        ("[{'sed': 0}]", "--config.num_steps=2"),
        ("[{'seed': 0}]", "--config.sed=1"),
    ):
        (tmp_path / "ablation.py").write_text(f"{CONFIG}\ndef get_sweep(): return {rows}")
        result = call(command, tmp_path, flag)
        assert result.returncode == 1
        assert result.stderr.startswith("error: --config.sed: no such field")
        assert "did you mean 'seed'" in result.stderr
    assert not (tmp_path / "runs").exists()
