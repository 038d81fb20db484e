"""A user's mistake ends every command with one line that names it; flags mean what they say."""

import os
import re
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from dense_jax import command
from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "dense_jax"
COMMANDS = [path for path in PACKAGE.rglob("*.py") if "command.run(" in path.read_text()]
COMPUTING = {"main", "evaluate", "predict", "export", "demo", "memory"}


def test_every_command_is_run_alike():
    names = COMPUTING | {"sweep", "__main__", "summary", "doctor", "prepare"}
    assert {path.stem for path in COMMANDS} == names
    for path in PACKAGE.rglob("*.py"):
        assert "app.run(" not in path.read_text() or path.stem == "command", path
    for path in COMMANDS:
        assert ("startup.prepare()" in path.read_text()) == (path.stem in COMPUTING), path


def run(statement, *arguments, folder=REPOSITORY, **environment):
    """Runs a command whose main is one statement."""
    code = (
        "import os; from absl import flags; from dense_jax import command\n"
        "command.define_folder('output', 'Results.')\n"
        f"def main(argv): {statement}\n"
        "command.run(main)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("raise ValueError('seed=-1')", "seed=-1"),
        ("raise FloatingPointError('step 3')", "step 3"),
        ("open('nowhere/a')", "[Errno 2] No such file or directory: 'nowhere/a'"),
        (
            "raise OSError(28, 'No space left on device')",
            "[Errno 28] No space left on device; the command writes to --output=masks",
        ),
        ("raise OSError('cannot save')", "cannot save"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_1(statement, message):
    done = run(statement, "--output=masks")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {message}\n"


@pytest.mark.parametrize(
    ("statement", "arguments"),
    [("raise ValueError('x')", ["--verbosity=1"]), ("raise RuntimeError('x')", [])],
)
def test_who_mends_the_program_sees_where_it_was(statement, arguments):
    done = run(statement, *arguments)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "in main" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png", "b.png"], r"unexpected arguments: a.png b.png \(flags are --NAME=VALUE; quote"),
        (["output=x"], "unexpected arguments: output=x .* did you mean 'output'"),
        (["--outptu=x"], "Unknown command line flag 'outptu'. Did you mean: output"),
        (["--output="], "--output=: must not be empty"),
        ([f"--output={__file__}"], "test_command.py: is a file, not a folder"),
    ],
)
def test_a_bad_flag_is_one_line(arguments, message):
    done = run("print('never')", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(f"error: .*{message}.*\n", done.stderr)


def test_the_homes_sign_is_expanded_where_the_shell_left_it():
    done = run("print(flags.FLAGS.output)", "--output=~/masks", HOME="/home/me")
    assert done.stdout == "/home/me/masks\n"


def test_what_the_terminal_cannot_show_is_printed_nevertheless():
    done = run(r"print('stra\xdfe')", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "stra\\xdfe\n")


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        ("evaluate", "--batch_size=0"),
        ("predict", "--margin=-1"),
        ("predict", "--tile_size=big,big"),
        ("data.doctor", "--picture=pic"),
    ],
)
def test_a_value_that_no_command_can_use_is_a_bad_flag(module, flag):
    done = subprocess.run(
        [sys.executable, "-m", f"dense_jax.{module}", flag],
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"flag {flag}: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", ["10", "", "8,8,8", "0,8", "-8,8", "8,x"])
def test_a_size_is_two_positive_numbers(words):
    assert command._Size().parse("8,16") == (8, 16)
    with pytest.raises(ValueError, match="must be HEIGHT,WIDTH in pixels"):
        command._Size().parse(words)


MISTYPED = """
from experiments import base
def get_config():
    config = base.get_config()
    config.num_steps = "many"
    return config
"""


@pytest.mark.parametrize(
    ("source", "flag", "message"),
    [
        (None, "", "no experiment file '.*unet_cee.py' .*; did you mean 'experiments/unet_ce.py'"),
        ("", "", r"unet_cee.py has no get_config\(\)"),
        ("def get_config(): return 1", "", "must return a ConfigDict, got 1"),
        ("def get_config(): raise ValueError('small or large')", "", "small or large"),
        (
            MISTYPED,
            "",
            "get_config.* of .*unet_cee.py: .*'num_steps'",
        ),
        (
            "from experiments.base import get_config",
            "--config.model.widhts=(1,)",
            "--config.model.widhts: no such field. Valid there: .*; did you mean 'widths'",
        ),
    ],
)
def test_what_is_wrong_with_an_experiment_file_is_said(
    source, flag, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(REPOSITORY)
    file = tmp_path / "unet_cee.py"
    if source is not None:
        file.write_text(source)
    with pytest.raises(ValueError, match=message):
        command.parse_flags(["command", "--config", str(file), flag])


@pytest.fixture
def parsed(monkeypatch):
    """Returns the config that parse_flags makes of arguments."""

    def parse(*arguments):
        values = flags.FlagValues()
        argv = ["command", "--config=experiments/unet_ce.py", *arguments]
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        monkeypatch.setattr(flags, "FLAGS", values)
        monkeypatch.chdir(REPOSITORY)
        command.parse_flags(argv)
        return values.config

    return parse


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_the_last_of_several_flags_wins_for_every_field(parsed):
    config = parsed(
        *("--config.model.widths=(4, 8)", "--config.seed=1", "--config.model.skips=(4, 2)"),
        *("--config.model.widths", "(16, 32)", "--config.seed=2", "--config.model.skips=()"),
        *("--config.border.classes=cell", "--config.border.classes=nucleus"),
    )
    assert (config.model.widths, config.seed, config.model.skips) == ((16, 32), 2, ())
    assert config.border.classes == ("nucleus",)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_paths_of_the_config_may_begin_at_home(parsed, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = parsed("--config.data.root=~/images", "--config.model.pretrained=~/vgg16.npz")
    assert config.data.root == "/home/me/images"
    assert config.model.pretrained == "/home/me/vgg16.npz"
